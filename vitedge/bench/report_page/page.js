"use strict";
// Tables sort by a press on a heading; a line of a table and its point in the plot light up together. Without this all is there, too.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(head, column));
  });

  function sort(head, column) {
    const number = head.classList.contains("number");
    const before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : !number || head.dataset.best !== "high";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column]?.dataset.value ?? "";
    const rows = [...body.rows].filter((row) => !row.classList.contains("failed"));
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1); // what is not known stays last
      const order = number ? Number(x) - Number(y) : x.localeCompare(y);
      return up ? order : -order;
    });
    const failed = [...body.rows].filter((row) => row.classList.contains("failed"));
    body.append(...rows, ...failed);
  }
}

const keyed = [...document.querySelectorAll("[data-key]")];
for (const one of keyed) {
  const light = (on) => keyed.forEach((other) => other.dataset.key === one.dataset.key && other.classList.toggle("hot", on));
  one.addEventListener("pointerenter", () => light(true));
  one.addEventListener("pointerleave", () => light(false));
}
