"""The report in a headless Chromium: it sorts, lights up, fits a phone, is dark where that is wanted, and says no error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.documents import candidate, document, labelled
from tests.bench.test_report import rich
from vitedge.bench.choice import choose
from vitedge.bench.report import write_outputs

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs Debian's packages chromium and chromium-driver")

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-dev-shm-usage")
COLUMN = """
return [...document.querySelectorAll("table.sortable")[0].tBodies[0].rows].map((row) => row.querySelector(".key").textContent);
"""
CONTRAST = """
const numbers = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = (color) => numbers(color).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
const clear = (node) => getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)";
const behind = (node) => { while (node && clear(node)) node = node.parentElement;
  return getComputedStyle(node ?? document.body).backgroundColor; };
const found = [];
for (const node of document.querySelectorAll("h1, h1 span, p, td, th, dd, dt, summary, li, svg text")) {
  if (!node.textContent.trim() || node.closest(".confusion") || node.closest("details:not([open]) > :not(summary)")) continue;
  const style = getComputedStyle(node);
  const [a, b] = [light(node.closest("svg") ? style.fill : style.color), light(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(`${node.tagName} ${node.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
}
return found;
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    slow = candidate(
        "vit/a-name-that-is-long-enough-to-need-two-lines-on-a-phone", 40.0, labelled(89.0, 2.2, 96.0), batches=(1, 8)
    )
    failed = candidate("vit/fp16", 1.0, failed="opening: no driver", timings=())
    unjudged = candidate("vit/unjudged", 9.0, batches=(1, 8))
    doc = document(rich("vit/fp32"), rich("vit/int8"), slow, unjudged, failed, notes=("another process was busy",))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_outputs([doc], report=path, choice=choose([doc], budget_ms=20.0))
    return path


@pytest.fixture
def opened(driver: Any, page: Path) -> Iterator[Any]:
    resize(driver, 1280)
    driver.get(page.as_uri())
    driver.get_log("browser")
    yield driver
    assert driver.get_log("browser") == []


def resize(driver: Any, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def press(driver: Any, head: str) -> str:
    """Press a heading of the first table as a key does; what the table then says of its order."""
    return str(
        driver.execute_script(
            """const head = [...document.querySelectorAll("table.sortable")[0].tHead.rows[0].cells]
              .find((one) => one.textContent === arguments[0]);
            head.querySelector("button").click();
            return head.getAttribute("aria-sort");""",
            head,
        )
    )


def test_a_press_on_a_heading_sorts_and_another_turns_it_round(opened: Any) -> None:
    first = opened.execute_script(COLUMN)
    assert first == ["fp32", "int8", "a-name-that-is-long-enough-to-need-two-lines-on-a-phone", "unjudged", "fp16"]
    assert press(opened, "p50 ms") == "ascending"
    assert opened.execute_script(COLUMN) == [*first[:2], "unjudged", first[2], "fp16"]
    assert press(opened, "p50 ms") == "descending"
    assert opened.execute_script(COLUMN) == [first[2], "unjudged", *first[:2], "fp16"]
    assert press(opened, "top-1 %") == "descending"  # best first; what is not known and what failed stay last
    assert opened.execute_script(COLUMN)[2:] == [first[2], "unjudged", "fp16"]
    assert press(opened, "candidate") == "ascending"
    assert opened.execute_script(COLUMN) == [*sorted(first[:4]), "fp16"]
    assert opened.execute_script("return document.querySelectorAll('th[aria-sort]').length") == 1


def test_a_line_and_its_point_light_up_together(opened: Any) -> None:
    lit = opened.execute_script(
        """const row = document.querySelector("tr.chosen");
        row.dispatchEvent(new PointerEvent("pointerenter"));
        const lit = [...document.querySelectorAll(".hot")].map((one) => one.tagName);
        row.dispatchEvent(new PointerEvent("pointerleave"));
        return [lit, document.querySelectorAll(".hot").length];"""
    )
    assert lit == [["g", "TR", "TR", "TR"], 0]  # its point, its line, and its two batches in the table of all


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_it_fits_every_width_and_its_words_stand_out(opened: Any, width: int, scheme: str) -> None:
    resize(opened, width, scheme)
    opened.execute_script("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    assert opened.execute_script(CONTRAST) == []
    dark = opened.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(11, 13, 18)"
    assert dark == (scheme == "dark")


def test_all_is_there_without_a_script(driver: Any, page: Path) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(page.as_uri())
        text = driver.execute_cdp_cmd("DOM.getDocument", {"depth": 0}) and driver.page_source
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "<button" not in text and "opening: no driver" in text


def test_pictures_are_shown(opened: Any) -> None:
    sizes = opened.execute_script("return [...document.images].map((one) => one.naturalWidth)")
    assert sizes and set(sizes) == {96}
