// What vitedge sends in, a card for each camera out. One connection carries figures and pictures (see web_server.py: as_frame).

const STAGES = [["capture", "capture age"], ["queue", "queue"], ["preprocess", "preprocess"], ["infer", "inference"], ["postprocess", "answer"]];
const WINDOW_S = 15;     // of the timeline
const DELAY_S = 0.25;    // it lags by, so that it moves evenly
const TYPICAL_S = 5;     // over which times are summed up
const TEXT_EVERY_MS = 250;
const DRAW_EVERY_MS = 30;
const SILENCE_MS = 4000; // after which a connection counts as lost
const FIGURES = 0xffffffff;
const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");

const cameras = [];
let colours = readColours();
let offset = null;       // of this clock from the device's, in seconds: the least that was seen, so the way here counts little
let connection = null;

// ---- the connection

async function* messages(body) {
  const reader = body.getReader();
  let rest = new Uint8Array(0);
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const bytes = new Uint8Array(rest.length + value.length);
    bytes.set(rest);
    bytes.set(value, rest.length);
    let at = 0;
    const view = new DataView(bytes.buffer);
    while (bytes.length - at >= 8 && bytes.length - at - 8 >= view.getUint32(at + 4)) {
      const end = at + 8 + view.getUint32(at + 4);
      yield [view.getUint32(at), bytes.subarray(at + 8, end)];
      at = end;
    }
    rest = bytes.slice(at);
  }
}

async function watch(signal, heard) {
  const shown = cameras.map((camera, number) => (camera.paused ? null : number)).filter((number) => number !== null);
  const query = cameras.length ? `?pictures=${shown.join(",")}` : "";
  const answer = await fetch(`/live${query}`, { signal, cache: "no-store" });
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
  for await (const [camera, bytes] of messages(answer.body)) {
    heard();
    if (camera === FIGURES) tell(JSON.parse(new TextDecoder().decode(bytes)));
    else cameras[camera]?.show(new Blob([bytes], { type: "image/jpeg" }));
  }
  throw new Error("vitedge has ended");
}

async function stayConnected() {
  for (let tries = 0; ; ) {
    await visible();
    const mine = (connection = new AbortController());
    let timer = 0;
    const heard = () => {
      tries = 0;
      clearTimeout(timer);
      timer = setTimeout(() => mine.abort("silent"), SILENCE_MS);
      say("live", "live");
    };
    try {
      timer = setTimeout(() => mine.abort("silent"), SILENCE_MS);
      await watch(mine.signal, heard);
    } catch (error) {
      clearTimeout(timer);
      if (mine.signal.reason === "anew") continue; // other pictures are wanted, or the page is hidden
      const known = { 401: "open the address that vitedge printed", 503: "too many viewers" };
      say("lost", known[error.status] ?? "no connection");
      cameras.forEach((camera) => camera.refresh());
      tries += 1;
      await new Promise((done) => setTimeout(done, error.status ? 5000 : Math.min(400 * 2 ** tries, 5000)));
    }
  }
}

function reconnect() {
  connection?.abort("anew");
}

function visible() {
  if (!document.hidden) return undefined;
  return new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
}

function say(state, text) {
  const link = document.getElementById("link");
  if (link.dataset.state === state && link.lastElementChild.textContent === text) return;
  link.dataset.state = state;
  link.lastElementChild.textContent = text;
  cameras.forEach((camera) => camera.refresh());
}

function isLinked() {
  return document.getElementById("link").dataset.state === "live";
}

function tell(news) {
  if (!cameras.length) open(news);
  const lead = performance.now() / 1000 - news.now;
  offset = offset === null || Math.abs(lead - offset) > 5 ? lead : Math.min(offset, lead);
  news.cameras.forEach((found, number) => cameras[number].tell(found));
  tellVitals(news.vitals);
}

function open(news) {
  document.title = `${news.title} · vitedge`;
  document.getElementById("title").textContent = news.title;
  const place = document.getElementById("cameras");
  place.classList.toggle("single", news.cameras.length === 1);
  news.cameras.forEach((found, number) => cameras.push(new Camera(place, number, found.name)));
}

function tellVitals(vitals) {
  const hottest = vitals.filter((found) => found.kind === "temperature").sort((a, b) => b.value - a.value)[0];
  const power = vitals.find((found) => found.kind === "power");
  const shown = [hottest && [hottest.sensor, `${hottest.value.toFixed(0)} °C`], power && [power.sensor, `${power.value.toFixed(1)} W`]].filter(Boolean);
  const list = document.getElementById("vitals");
  list.title = vitals.map((found) => `${found.sensor}: ${found.value.toFixed(1)} ${found.kind === "power" ? "W" : "°C"}`).join("\n");
  fill(list, shown, () => make("li", [["", "span"], ["", "b"]]), (item, [sensor, value]) => {
    put(item.children[0], sensor);
    put(item.children[1], value);
  });
}

// ---- a camera

class Camera {
  constructor(place, number, name) {
    const card = document.getElementById("camera").content.firstElementChild.cloneNode(true);
    this.card = card;
    this.number = number;
    this.name = name;
    this.paused = false;
    this.samples = [];
    this.known = -1;      // the number of the newest sample
    this.news = null;
    this.scale = 0;       // of the timeline, in ms
    this.seen = false;    // whether there is a picture
    this.waiting = null;  // the newest picture, while another is decoded
    this.decoding = false;
    this.told = 0;
    this.failure = "";    // why there is no snapshot, for a while
    this.find = (selector) => card.querySelector(selector);
    this.picture = this.find(".picture");
    this.pauseButton = this.find(".pause");
    this.snapshotButton = this.find(".snapshot");
    put(this.find(".name span"), name);
    this.find(".name span").title = name;
    this.snapshotButton.title = "Save a snapshot";
    this.snapshotButton.setAttribute("aria-label", `Save a snapshot of ${name}`);
    this.pauseButton.addEventListener("click", () => this.pause(!this.paused));
    this.snapshotButton.addEventListener("click", () => this.save());
    for (const [stage, title] of [...STAGES, ["total", "total"]]) {
      const item = make("li", [["", "i"], [title, "span"], ["–", "b"]]);
      item.className = stage;
      this.find(".legend").append(item);
    }
    for (const [stage] of STAGES) this.find(".stack").append(Object.assign(document.createElement("i"), { className: stage }));
    this.namePause();
    place.append(card);
    this.refresh();
  }

  show(jpeg) {
    if (this.paused) return;
    this.waiting = jpeg;
    if (!this.decoding) this.decode();
  }

  async decode() {
    this.decoding = true;
    while (this.waiting) {
      const jpeg = this.waiting;
      this.waiting = null;
      try {
        const bitmap = await createImageBitmap(jpeg);
        if (!this.paused) this.paint(bitmap);
        bitmap.close();
      } catch { /* the next one comes */ }
    }
    this.decoding = false;
  }

  paint(bitmap) {
    const { picture } = this;
    if (picture.width !== bitmap.width || picture.height !== bitmap.height) Object.assign(picture, { width: bitmap.width, height: bitmap.height });
    picture.getContext("2d", { alpha: false }).drawImage(bitmap, 0, 0);
    if (!this.seen) {
      this.seen = true;
      this.refresh();
    }
  }

  tell(news) {
    const before = this.news;
    this.news = news;
    if (before && news.processed < before.processed) [this.samples, this.known] = [[], -1]; // vitedge was started anew
    for (const sample of news.samples) {
      if (sample[0] > this.known) this.samples.push(sample);
    }
    this.known = Math.max(this.known, this.samples.at(-1)?.[0] ?? -1);
    const oldest = (this.samples.at(-1)?.[1] ?? 0) - WINDOW_S - 2;
    while (this.samples.length && this.samples[0][1] < oldest) this.samples.shift();
    if (before?.state !== news.state) this.refresh();
    const now = performance.now();
    if (now - this.told < TEXT_EVERY_MS && before) return;
    this.told = now;
    if (!this.paused) this.write();
  }

  write() {
    const { news } = this;
    put(this.find(".fps b"), rounded(news.fps));
    put(this.find(".of"), `camera ${rounded(news.camera_fps)}`);
    const newest = this.samples.at(-1)?.[1] ?? 0;
    const recent = this.samples.filter((sample) => sample[1] > newest - TYPICAL_S);
    const totals = recent.map(total).sort(ascending);
    put(this.find(".total b"), totals.length ? rounded(at(totals, 0.5)) : "–");
    put(this.find(".p99"), totals.length ? `p99 ${rounded(at(totals, 0.99))} ms` : "\u00a0");
    put(this.find(".dropped b"), news.dropped.toLocaleString("en"));
    put(this.find(".share"), `${rounded((100 * news.dropped) / Math.max(1, news.captured))} %`);
    if (recent.length) this.writeStages(recent, at(totals, 0.5));
    this.writeLabels(news.top);
    this.remark(news.note);
  }

  remark(text) {
    const note = this.find(".note");
    note.hidden = !(this.failure || text);
    put(note, this.failure || text);
  }

  writeStages(recent, typical) {
    const times = STAGES.map((_, stage) => at(recent.map((sample) => sample[2 + stage]).sort(ascending), 0.5));
    const sum = times.reduce((one, other) => one + Math.max(0, other), 0) || 1;
    [...this.find(".legend").children].forEach((item, stage) => put(item.lastElementChild, `${rounded(times[stage] ?? typical)} ms`));
    [...this.find(".stack").children].forEach((part, stage) => { part.style.width = `${(100 * Math.max(0, times[stage])) / sum}%`; });
  }

  writeLabels(top) {
    this.card.classList.toggle("unlabelled", !top.length);
    this.find(".labels").hidden = !top.length;
    fill(this.find(".labels ol"), top, () => make("li", [["", "i"], ["", "span"], ["", "b"]]), (item, { label, probability }) => {
      item.children[0].style.transform = `scaleX(${probability})`;
      put(item.children[1], label);
      item.children[1].title = label;
      put(item.children[2], percent(probability));
    });
    const best = top[0];
    this.find(".answer").hidden = !best;
    put(this.find(".answer span"), best?.label ?? "");
    put(this.find(".answer b"), best ? percent(best.probability) : "");
    this.picture.setAttribute("aria-label", `${this.name}${best ? `: ${best.label}, ${percent(best.probability)}` : ""}`);
    this.find(".timeline").setAttribute("aria-label", `${this.find(".total b").textContent} ms from capture to answer, typically`);
  }

  refresh() {
    const linked = isLinked();
    const [state, title, what] = !linked && this.seen ? ["lost", "No connection to vitedge", "The page tries again by itself."]
      : this.news?.state ? ["lost", "Camera lost", this.news.state]
      : this.paused && linked ? ["paused", "", ""]
      : this.seen ? ["live", "", ""] : ["waiting", "Waiting for the first picture", ""];
    this.card.dataset.state = state;
    put(this.find(".trouble strong"), title);
    put(this.find(".trouble span"), what);
    this.snapshotButton.disabled = !this.seen;
  }

  namePause() {
    const text = this.paused ? "Go on" : "Pause";
    this.pauseButton.title = text;
    this.pauseButton.setAttribute("aria-label", `${this.paused ? "Go on with" : "Pause"} ${this.name}`);
    this.pauseButton.setAttribute("aria-pressed", String(this.paused));
  }

  pause(paused) {
    this.paused = paused;
    this.frozen = this.clock();
    this.namePause();
    this.refresh();
    if (!paused && this.news) this.write();
    reconnect(); // without its pictures: what is not looked at shall cost the device nothing
  }

  async save() {
    this.snapshotButton.disabled = true;
    try {
      save(await this.snapshot(), `${this.name.replace(/^.*[/\\]/, "").replace(/[^\w.-]+/g, "-") || "camera"}-${stamp()}.jpg`);
      this.card.classList.remove("flash");
      void this.card.offsetWidth; // begins the flash anew
      this.card.classList.add("flash");
    } catch (error) {
      this.failure = `The snapshot failed: ${error.message}`;
      setTimeout(() => { this.failure = ""; this.remark(this.news.note); }, 5000);
      this.remark("");
    } finally {
      this.snapshotButton.disabled = false;
    }
  }

  async snapshot() {
    if (this.paused) return new Promise((done) => this.picture.toBlob(done, "image/jpeg", 0.92)); // that picture, and not the newest
    const answer = await fetch(`/snapshot/${this.number}.jpg`, { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.blob();
  }

  clock() {
    return this.paused && this.frozen ? this.frozen : performance.now() / 1000 - (offset ?? 0) - DELAY_S;
  }

  draw() {
    const canvas = this.find(".timeline");
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const ratio = Math.min(devicePixelRatio || 1, 2);
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const now = this.clock();
    const shown = this.samples.filter((sample) => sample[1] > now - WINDOW_S - 1 && sample[1] <= now + 1);
    this.rescale(shown);
    const plot = { left: 0, right: width, top: 16, bottom: height - 20, now, scale: this.scale };
    drawGrid(pen, plot);
    drawStages(pen, plot, shown);
    drawLabels(pen, plot);
  }

  rescale(shown) {
    if (!shown.length && this.scale) return;
    const totals = shown.map(total).sort(ascending);
    const wanted = nice(Math.max(1, Math.min(totals.at(-1) ?? 1, 3 * (at(totals, 0.95) ?? 1))) * 1.06); // what is rare may run out of it
    this.scale = !this.scale || still.matches ? wanted : this.scale + (wanted - this.scale) * 0.18;
  }
}

// ---- the timeline

function drawGrid(pen, { left, right, top, bottom, scale }) {
  pen.lineWidth = 1;
  pen.strokeStyle = colours.line;
  for (const value of [0, ...ticks(scale)]) {
    const y = Math.round(bottom - (value / scale) * (bottom - top)) + 0.5;
    pen.beginPath();
    pen.moveTo(left, y);
    pen.lineTo(right, y);
    pen.stroke();
  }
}

function drawLabels(pen, { left, right, top, bottom, scale }) {
  pen.font = "11.5px system-ui, sans-serif";
  pen.textBaseline = "alphabetic";
  pen.lineJoin = "round";
  pen.lineWidth = 4;
  pen.strokeStyle = colours.card; // a rim, so that it can be read on the stages
  pen.fillStyle = colours.soft;
  const write = (text, x, y, align) => {
    pen.textAlign = align;
    pen.strokeText(text, x, y);
    pen.fillText(text, x, y);
  };
  const values = ticks(scale);
  for (const value of values) write(value === values.at(-1) ? `${short(value)} ms` : short(value), left, bottom - (value / scale) * (bottom - top) - 4, "left");
  for (let second = 0; second <= WINDOW_S; second += 5) {
    const align = second === WINDOW_S ? "left" : second ? "center" : "right";
    write(second ? `−${second} s` : "now", right - (second / WINDOW_S) * (right - left), bottom + 15, align);
  }
}

function ticks(scale) {
  const step = nice(scale / 3.2);
  return [1, 2, 3, 4].map((count) => count * step).filter((value) => value <= scale * 1.02);
}

function drawStages(pen, { left, right, top, bottom, now, scale }, samples) {
  pen.save();
  pen.beginPath();
  pen.rect(left, 0, right - left, bottom + 1);
  pen.clip();
  const x = (at) => right - ((now - at) / WINDOW_S) * (right - left);
  const y = (ms) => bottom - (ms / scale) * (bottom - top);
  for (const run of runs(samples)) {
    let below = run.map(() => 0);
    STAGES.forEach(([stage], number) => {
      const above = run.map((sample, index) => below[index] + Math.max(0, sample[2 + number]));
      pen.beginPath();
      run.forEach((sample, index) => pen.lineTo(x(sample[1]), y(above[index])));
      for (let index = run.length - 1; index >= 0; index -= 1) pen.lineTo(x(run[index][1]), y(below[index]));
      pen.closePath();
      pen.fillStyle = colours[stage];
      pen.globalAlpha = 0.88;
      pen.fill();
      below = above;
    });
    pen.globalAlpha = 1;
    pen.beginPath();
    run.forEach((sample, index) => pen.lineTo(x(sample[1]), y(below[index])));
    pen.strokeStyle = colours.ink;
    pen.globalAlpha = 0.55;
    pen.lineWidth = 1.25;
    pen.lineJoin = "round";
    pen.stroke();
    pen.globalAlpha = 1;
  }
  pen.restore();
}

// Samples without a gap between them: where no frame came there was no latency.
function runs(samples) {
  const found = [];
  let usual = 0.1;
  samples.forEach((sample, index) => {
    const gap = index ? sample[1] - samples[index - 1][1] : Infinity;
    if (gap > Math.max(0.5, usual * 4)) found.push([]);
    else usual = 0.9 * usual + 0.1 * gap;
    found.at(-1).push(sample);
  });
  return found;
}

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.999) * power;
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["ink", "soft", "line", "card", ...STAGES.map(([stage]) => stage)].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

// ---- small parts

const total = (sample) => sample[2] + sample[3] + sample[4] + sample[5] + sample[6];
const ascending = (one, other) => one - other;
const at = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
const rounded = (value) => (value >= 100 ? Math.round(value).toLocaleString("en") : value >= 0.95 || value === 0 ? value.toFixed(1) : value.toFixed(2));
const short = (value) => String(Number(value.toPrecision(3)));
const percent = (share) => `${(100 * share).toFixed(share >= 0.9995 ? 0 : 1)} %`;
const stamp = () => new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-");

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, children) {
  const element = document.createElement(tag);
  for (const [text, child] of children) {
    const made = document.createElement(child);
    made.textContent = text;
    element.append(made);
  }
  return element;
}

function fill(list, values, create, update) {
  while (list.children.length > values.length) list.lastElementChild.remove();
  while (list.children.length < values.length) list.append(create());
  values.forEach((value, index) => update(list.children[index], value));
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

let drawn = 0;
function animate(now) {
  requestAnimationFrame(animate);
  if (now - drawn < (still.matches ? 500 : DRAW_EVERY_MS)) return;
  drawn = now;
  cameras.forEach((camera) => camera.draw());
}

dark.addEventListener("change", () => { colours = readColours(); });
document.addEventListener("visibilitychange", () => { if (document.hidden) reconnect(); });
requestAnimationFrame(animate);
stayConnected();
