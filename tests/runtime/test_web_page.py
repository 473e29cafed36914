"""The live page in a headless Chromium: pictures change, figures move, pause, snapshot, loss and return, desktop and phone."""

from __future__ import annotations

import http.server
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.engines import ROOT, Made, start_python
from tests.runtime.web import answer, ask, card_of, frame_of, port_of, publishing
from vitedge.runtime.web import WebView
from vitedge.specs import Prediction, Timing

pytest.importorskip("cv2")
pytest.importorskip("uvicorn")
webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs Debian's packages chromium and chromium-driver")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
TOKEN = "a-token"
VITEDGE = "from vitedge.cli import main; main()"
PICTURE = """
const canvas = document.querySelectorAll(".picture")[arguments[0]];
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let sum = 0;
for (let i = 0; i < data.length; i += 41) sum = (sum * 31 + data[i]) % 1000000007;
return `${canvas.width}x${canvas.height}:${sum}`;
"""
INK = """
const canvas = document.querySelectorAll(".timeline")[arguments[0]];
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let sum = 0;
for (let i = 3; i < data.length; i += 4) sum += data[i] > 0 ? i % 9973 : 0;
return sum;
"""


class Browser:
    """A headless Chromium, and what is asked of a page over and over."""

    def __init__(self, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        self.downloads = folder / "downloads"
        options.add_experimental_option("prefs", {"download.default_directory": str(self.downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(10)

    def open(self, url: str) -> None:
        self.resize(1280, 800)
        self.driver.get(url)

    def resize(self, width: int, height: int, scheme: str = "light") -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    def text(self, selector: str, camera: int = 0) -> str:
        code = "return document.querySelectorAll('.camera')[arguments[1]]?.querySelector(arguments[0])?.textContent ?? ''"
        return str(self.run(code, selector, camera))

    def state(self, camera: int = 0) -> str:
        return str(self.run("return document.querySelectorAll('.camera')[arguments[0]]?.dataset.state ?? ''", camera))

    def link(self) -> str:
        return str(self.run("return document.getElementById('link').dataset.state"))

    def picture(self, camera: int = 0) -> str:
        return str(self.run(PICTURE, camera))

    def press(self, selector: str, camera: int = 0) -> None:
        self.run("document.querySelectorAll('.camera')[arguments[1]].querySelector(arguments[0]).click()", selector, camera)

    def wait(self, holds: Callable[[], object], seconds: float = 15.0) -> None:
        end = time.perf_counter() + seconds
        while not holds():
            assert time.perf_counter() < end, "it did not come about"
            time.sleep(0.05)

    def changes(self, look: Callable[[], object]) -> None:
        before = look()
        self.wait(lambda: look() != before)

    def errors(self) -> list[str]:
        """What the console says, which chromedriver hands over once; not what looking at canvases over and over brings about."""
        said = [str(entry["message"]) for entry in self.driver.get_log("browser")]
        return [message for message in said if "Multiple readback operations" not in message]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.driver.quit()


@pytest.fixture
def live(browser: Browser) -> Iterator[tuple[Browser, WebView]]:
    """A page of two cameras that shows pictures; at its end the console must be empty."""
    with WebView(["cam", "/dev/video1"], card_of(), title="tiny/int8", port=0) as view, publishing(view, 2):
        browser.open(view.url)
        browser.wait(lambda: browser.state(0) == browser.state(1) == "live")
        browser.errors()
        yield browser, view
        assert browser.errors() == []
        browser.driver.get("about:blank")


def test_pictures_change_and_figures_move(live: tuple[Browser, WebView]) -> None:
    browser, _ = live
    for camera in (0, 1):
        browser.changes(lambda camera=camera: browser.picture(camera))  # type: ignore[misc]
        browser.changes(lambda camera=camera: browser.text(".dropped b", camera))  # type: ignore[misc]
        browser.changes(lambda camera=camera: browser.run(INK, camera))  # type: ignore[misc]
    assert browser.picture().startswith("320x240:")
    assert browser.driver.title == "tiny/int8 · vitedge"
    assert [browser.text(".name span", camera) for camera in (0, 1)] == ["cam", "/dev/video1"]
    assert browser.text(".total b") == "25.0" and browser.text(".share") == "50.0 %"
    assert 5 < float(browser.text(".fps b")) < 60
    assert (
        re.sub(r"\s+", " ", browser.text(".legend"))
        == "capture age3.0 msqueue0.50 mspreprocess1.3 msinference20.0 msanswer0.25 mstotal25.0 ms"
    )


def test_labels_are_bars_with_percentages_and_no_label_is_code(live: tuple[Browser, WebView]) -> None:
    browser, _ = live
    rows = browser.run(
        "return [...document.querySelectorAll('.camera')[0].querySelectorAll('.labels li')].map((row) => row.textContent)"
    )
    assert rows == ["Ankle boot75.0 %", "Bär <b>25.0 %"]
    bars = browser.run(
        "return [...document.querySelectorAll('.camera')[0].querySelectorAll('.labels i')].map((bar) => bar.style.transform)"
    )
    assert bars == ["scaleX(0.75)", "scaleX(0.25)"]
    assert browser.text(".answer") == "Ankle boot75.0 %"


def test_pause_stops_one_picture_and_its_figures_and_resume_goes_on(live: tuple[Browser, WebView]) -> None:
    browser, _ = live
    button = browser.driver.find_element("css selector", ".pause")
    assert button.get_attribute("aria-label") == "Pause cam"
    button.send_keys(" ")  # by the keyboard
    browser.wait(lambda: browser.state() == "paused")
    assert button.get_attribute("aria-pressed") == "true" and button.get_attribute("aria-label") == "Go on with cam"
    time.sleep(0.3)  # for a picture that was on its way
    before = (browser.picture(), browser.text(".dropped b"), browser.text(".fps b"))
    browser.changes(lambda: browser.picture(1))
    time.sleep(1.0)
    assert (browser.picture(), browser.text(".dropped b"), browser.text(".fps b")) == before
    assert browser.state(1) == "live" and browser.link() == "live"
    browser.press(".pause")
    browser.wait(lambda: browser.state() == "live")
    browser.changes(browser.picture)
    browser.changes(lambda: browser.text(".dropped b"))


def test_all_cameras_can_be_paused_and_figures_go_on_being_heard(live: tuple[Browser, WebView]) -> None:
    browser, _ = live
    for camera in (0, 1):
        browser.press(".pause", camera)
    time.sleep(1.0)
    assert browser.link() == "live"
    browser.press(".pause", 1)
    browser.changes(lambda: browser.picture(1))


def test_a_snapshot_is_saved_as_a_jpeg_also_of_a_paused_picture(live: tuple[Browser, WebView]) -> None:
    browser, _ = live
    shutil.rmtree(browser.downloads, ignore_errors=True)
    assert browser.driver.find_element("css selector", ".snapshot").get_attribute("aria-label") == "Save a snapshot of cam"
    browser.driver.find_element("css selector", ".snapshot").send_keys("\n")
    browser.wait(lambda: list(browser.downloads.glob("cam-*.jpg")))
    (saved,) = browser.downloads.glob("cam-*.jpg")
    with Image.open(saved) as image:
        assert (image.format, image.size) == ("JPEG", (320, 240))
    browser.press(".pause", 1)
    browser.wait(lambda: browser.state(1) == "paused")
    browser.driver.find_elements("css selector", ".snapshot")[1].click()
    browser.wait(lambda: list(browser.downloads.glob("video1-*.jpg")))
    (saved,) = browser.downloads.glob("video1-*.jpg")
    with Image.open(saved) as image:
        assert (image.format, image.size) == ("JPEG", (320, 240))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (768, 1024), (390, 844), (320, 568)])
def test_nothing_is_wider_than_the_window(live: tuple[Browser, WebView], width: int, height: int, scheme: str) -> None:
    browser, _ = live
    browser.resize(width, height, scheme)
    browser.changes(browser.picture)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    wide = "return [...document.querySelectorAll('button')].every((b) => b.offsetWidth >= 44 && b.offsetHeight >= 44)"
    assert browser.run(wide)  # a finger hits them


def test_a_lost_camera_says_so_and_the_others_go_on(live: tuple[Browser, WebView]) -> None:
    browser, view = live
    view.tell(0, "cam is lost, the next try is in 4 s")
    browser.wait(lambda: browser.state() == "lost")
    assert browser.text(".trouble strong") == "Camera lost"
    assert browser.text(".trouble span") == "cam is lost, the next try is in 4 s"
    assert browser.state(1) == "live" and browser.link() == "live"
    view.tell(0, "")
    browser.wait(lambda: browser.state() == "live")
    browser.changes(browser.picture)


def test_a_lost_connection_says_so_and_comes_back_by_itself(browser: Browser) -> None:
    view = WebView(["cam"], card_of(), title="t", port=0)
    with publishing(view):
        browser.open(view.url)
        browser.wait(lambda: browser.state() == "live")
        view.close()
        browser.wait(lambda: browser.link() == "lost")
        browser.wait(lambda: browser.state() == "lost")
        assert browser.text(".trouble strong") == "No connection to vitedge"
    again = WebView(["cam"], card_of(), title="t", port=port_of(view))
    with again, publishing(again):
        browser.wait(lambda: browser.link() == browser.state() == "live")
        browser.changes(browser.picture)
        browser.changes(lambda: browser.text(".dropped b"))
        browser.driver.get("about:blank")


def test_a_model_without_labels_shows_the_picture_alone(browser: Browser) -> None:
    with WebView(["cam"], card_of("dense"), title="t", port=0) as view:
        browser.errors()
        browser.open(view.url)
        browser.wait(lambda: browser.state() == "waiting")
        said = Prediction((), answer(shape=(1, 4, 4)).array, Timing(1, 1, 1, 1))
        for index in range(5):
            view.publish(frame_of(index), said, camera=0, captured=index + 1, dropped=0)
        browser.wait(lambda: browser.state() == "live" and browser.text(".dropped b") == "0")
        assert browser.run("return document.querySelector('.labels').hidden && document.querySelector('.answer').hidden")
        assert browser.errors() == []
        browser.driver.get("about:blank")


def test_the_token_leaves_the_address_bar_also_when_a_link_elsewhere_led_here(browser: Browser) -> None:
    view = WebView(["cam"], card_of(), title="t", port=0, token=TOKEN)
    with view, publishing(view):
        browser.open(view.url)
        browser.wait(lambda: browser.link() == "live" and browser.state() == "live")
        assert browser.driver.current_url == f"http://127.0.0.1:{port_of(view)}/"
        assert browser.run("return document.cookie") == ""  # no script reads it
        browser.driver.delete_all_cookies()
        with other_site(f'<a href="{view.url}">look</a>') as url:
            browser.driver.get(url)
            browser.driver.find_element("css selector", "a").click()
            browser.wait(lambda: browser.driver.current_url == f"http://127.0.0.1:{port_of(view)}/")
            browser.wait(lambda: browser.state() == "live")
        browser.errors()
        browser.driver.get("about:blank")
    assert ask_is_refused(view)


def ask_is_refused(view: WebView) -> bool:
    try:
        ask(view, "/")
    except ConnectionError:
        return True
    return False


def test_another_site_can_neither_show_nor_read_the_pictures(browser: Browser) -> None:
    with WebView(["cam"], card_of(), title="t", port=0) as view, publishing(view):
        place = f"http://127.0.0.1:{port_of(view)}"
        page = f"""<img id="a" src="{place}/stream/0"><img id="b" src="{place}/snapshot/0.jpg"><iframe src="{place}/"></iframe>
        <script>fetch("{place}/api/latest").then(() => document.title = "read", () => document.title = "refused")</script>"""
        with other_site(page) as url:
            browser.driver.get(url)
            browser.wait(lambda: browser.driver.title == "refused")
            browser.wait(lambda: browser.run("return a.complete && b.complete"))
            assert browser.run("return [a.naturalWidth, b.naturalWidth]") == [0, 0]
            assert b"vitedge_viewers 0" in ask(view, "/metrics").body
            browser.driver.get("about:blank")
    browser.errors()


class other_site:  # noqa: N801  it reads as one word in `with`
    """A page of another origin, http://localhost:PORT, while the block runs."""

    def __init__(self, page: str) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(f"<!doctype html><link rel=icon href=data:,>{page}".encode())

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://localhost:{self._server.server_address[1]}/"

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


HIDE = """
Object.defineProperty(document, "hidden", { value: arguments[0], configurable: true });
document.dispatchEvent(new Event("visibilitychange"));
"""


def test_a_page_costs_the_device_nothing_while_it_is_hidden(live: tuple[Browser, WebView]) -> None:
    browser, view = live
    browser.run(HIDE, True)
    browser.wait(lambda: b"vitedge_viewers 0" in ask(view, "/metrics").body)
    browser.run(HIDE, False)
    browser.changes(browser.picture)


@pytest.fixture
def running(made: Made) -> Iterator[str]:
    """The address of `vitedge run --web`: the ViT-S on the video where `make demo` has made both, else what the tests have."""
    built, bikes = sorted((ROOT / "engines/focus-vits14").glob("int8-*/manifest.json")), ROOT / "examples/focus/.cache/bikes.mp4"
    sources = (
        (built[-1].parent, "--source", bikes)
        if built and bikes.exists()
        else (made.engines["openvino", "int8"], "--source", "synthetic")
    )
    process = start_python(VITEDGE, "run", *sources, "--realtime", "--loop", "--web", 0, "--json")
    assert process.stdout is not None and process.stderr is not None
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    said = process.stderr.readline()
    while not said.startswith("web: "):
        assert said, "it ended before there was a page"
        said = process.stderr.readline()
    yield said.removeprefix("web: ").strip()
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    drain.join()
    assert process.wait(30) == 0 and "Traceback" not in rest, rest


def test_a_run_is_watched_from_the_first_to_the_last(browser: Browser, running: str) -> None:
    browser.errors()
    browser.open(running)
    browser.wait(lambda: browser.state() == "live", 60)
    for look in (browser.picture, lambda: browser.text(".fps b"), lambda: browser.text(".total b"), lambda: browser.run(INK, 0)):
        browser.changes(look)
    browser.press(".pause")
    browser.wait(lambda: browser.state() == "paused")
    time.sleep(0.3)
    before = browser.picture()
    time.sleep(1.0)
    assert browser.picture() == before
    browser.press(".pause")
    browser.changes(browser.picture)
    shutil.rmtree(browser.downloads, ignore_errors=True)
    browser.press(".snapshot")
    browser.wait(lambda: list(browser.downloads.glob("*.jpg")))
    with Image.open(next(browser.downloads.glob("*.jpg"))) as image:
        assert image.format == "JPEG" and image.width >= 640
    assert browser.errors() == []
    browser.driver.get("about:blank")
