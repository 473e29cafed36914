"""What the page, the Markdown, the CSV and the picture say, and that the page is one sound file."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.documents import candidate, document, labelled, timed
from vitedge.bench.choice import choose, usual_choice
from vitedge.bench.document import Candidate, Confused, Disagreement, Document, Interval, Judged, LayerTime
from vitedge.bench.environment import environment
from vitedge.bench.report import beaten, headline, html, mismatches, write_outputs
from vitedge.errors import MissingPackageError, VitEdgeError

FP32 = candidate("vit/fp32", 5.2, labelled(91.2))
INT8 = replace(
    candidate("vit/int8", 3.21, labelled(91.1, 0.1, 98.6)),
    timings=(timed(3.21, speedup=1.62),),
)
VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = """</title><script>alert("1")</script><img src=x onerror='x'>&amp;{style}{0}"""


class Page(HTMLParser):
    """Checks that tags close in the order they opened; keeps tags and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.texts.append(data)

    @property
    def points(self) -> list[tuple[float, float]]:
        """Where the points stand that are circles, as all of one group are."""
        paths = [attrs["d"] or "" for tag, attrs in self.tags if tag == "path" and attrs.get("class") == "point"]
        return [(float(x) + 7, float(y)) for path in paths for x, y in re.findall(r"^M([\d.]+) ([\d.]+)a7", path)]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def page(*documents: Document) -> tuple[Page, str]:
    text = html(documents, usual_choice(documents))
    return Page(text), text


def rich(name: str, **more: object) -> Candidate:
    """One of which everything is known."""
    layers = tuple(
        LayerTime(f"{block}.{part}", block, part, precision, 0.1)
        for block in ("blocks.0", "blocks.1")
        for part, precision in (("q/k/v", "int8"), ("attention", "bf16"))
    )
    image = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").save(image, "JPEG", quality=60)
    picture = base64.b64encode(image.getvalue()).decode()
    worst = tuple(Disagreement(f"{place}.png", "cat", "cat", "dog", 0.9, picture) for place in range(12))
    judged = replace(labelled(91.0, 0.2, 98.0), confusion=(Confused(0, 1, 12), Confused(1, 2, 3)), worst=worst)
    values = {"layers": layers, "peak_mib": 88.0, "open_ms": 300.0, "first_ms": 4.0, **more}
    base = candidate(name, 3.0, judged, batches=(1, 8))
    return replace(base, timings=tuple(replace(one, power_w=8.0, energy_mj=24.0) for one in base.timings), **values)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ((FP32, INT8), "int8 is 1.62× as fast as fp32 and loses 0.10 points of top-1, within the noise of 1,000 images."),
        (
            (FP32, replace(INT8, judged=labelled(90.7, 0.5))),
            "int8 is 1.62× as fast as fp32 and loses 0.50 points of top-1.",
        ),
        ((FP32, replace(INT8, judged=labelled(91.9, -0.7))), "int8 is 1.62× as fast as fp32 and gains 0.70 points of top-1."),
        ((FP32, replace(INT8, judged=labelled(91.2, 0.0))), "int8 is 1.62× as fast as fp32 and keeps its top-1 of 91.20%."),
        (
            (FP32, replace(INT8, timings=(timed(5.1, speedup=1.02, width=0.03),))),
            "int8 cannot be told apart in speed from fp32 and loses 0.10 points of top-1, within the noise of 1,000 images.",
        ),
        (
            (replace(FP32, judged=Judged(1000)), replace(INT8, judged=Judged(1000, agreement=98.6))),
            "int8 is 1.62× as fast as fp32 and agrees with it on 98.60% of 1,000 images.",
        ),
        (
            (replace(FP32, judged=Judged(9)), replace(INT8, judged=Judged(9, sqnr_db=30.04))),
            "int8 is 1.62× as fast as fp32 and matches its output to 30.0 dB.",
        ),
        ((replace(FP32, judged=None), replace(INT8, judged=None)), "int8 is 1.62× as fast as fp32."),
        ((FP32,), "fp32 takes 5.20 ms for an image and gets 91.20% of 1,000 images right."),
        (
            (FP32, replace(INT8, judged=labelled(80.0, 11.2))),
            "fp32 is the one to ship: it takes 5.20 ms for an image and gets 91.20% of 1,000 images right.",
        ),
        ((replace(FP32, judged=None, timings=(timed(9.0, batch=8),)),), "fp32 takes 9.00 ms for a batch of 8."),
    ],
)
def test_the_headline_is_made_of_measured_numbers(candidates: tuple[Candidate, ...], expected: str) -> None:
    doc = document(*candidates)
    assert headline(doc, choose([doc])) == expected


def test_the_page_is_one_sound_file_without_outside_assets(tmp_path: Path) -> None:
    doc = document(rich("vit/fp32"), rich("vit/int8"), environment=environment())
    (path,) = write_outputs([doc], report=tmp_path / "report.html")
    parsed = Page(text := path.read_text("utf-8"))
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert not {tag for tag, _ in parsed.tags} & {"link", "iframe", "object"}
    assert all((attrs["src"] or "").startswith("data:image/jpeg;base64,") for tag, attrs in parsed.tags if "src" in attrs)
    assert not any("href" in attrs or "style" in attrs for _, attrs in parsed.tags)
    assert "prefers-color-scheme: dark" in text
    assert headline(doc, choose([doc])) in parsed.text and choose([doc]).why in parsed.text
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_the_policy_lets_in_this_style_and_script_alone() -> None:
    _, text = page(document(FP32, INT8))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        ((content,),) = [re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_what_comes_from_outside_is_escaped() -> None:
    evil = replace(
        rich(EVIL),
        model=EVIL,
        runtime=EVIL,
        layers=(LayerTime(EVIL, EVIL, EVIL, EVIL, 1.0),),
        judged=replace(
            labelled(91.0, 0.1), confusion=(Confused(0, 1, 3),), worst=(Disagreement(EVIL, EVIL, EVIL, EVIL, 1.0, EVIL),)
        ),
    )
    failed = candidate(EVIL + "failed", 1.0, failed=EVIL)
    doc = document(FP32, evil, failed, machine=EVIL, dataset=EVIL, labels=(EVIL, EVIL), notes=(EVIL,), environment={EVIL: EVIL})
    parsed, text = page(doc, replace(doc, environment={"machine": EVIL, "date": EVIL}))
    assert [tag for tag, _ in parsed.tags].count("script") == 1 and "img" not in {tag for tag, _ in parsed.tags}
    assert text.count("<script") == 1 and "<img" not in text
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert EVIL in parsed.text


def test_everything_known_is_shown() -> None:
    doc = document(rich("vit/fp32"), rich("vit/int8"), candidate("vit/fp16", 1.0, failed="opening: no driver"), notes=("busy",))
    parsed, _ = page(doc)
    for section in (
        "Measurements",
        "How steady, how much at a time",
        "Layer by layer",
        "What it gets wrong",
        "Notes",
        "Environment",
    ):
        assert section in parsed.text
    for figure in ("opening: no driver", "busy", "vitedge bench vit/fp32 vit/int8", "mJ an image", "memory MiB", "q/k/v"):
        assert figure in parsed.text
    assert sum(tag == "img" for tag, _ in parsed.tags) == 12 + 6  # the choice's, then fewer
    assert sum(tag == "tr" for tag, _ in parsed.tags) == (1 + 2 + 1) + (1 + 4) + (1 + 2)  # narrow, all, confused


def test_of_little_known_little_is_shown() -> None:
    parsed, text = page(document(replace(FP32, judged=None)))
    assert "Layer by layer" not in text and "What it gets wrong" not in text and "Notes" not in text
    assert len(parsed.points) == 1
    nothing, _ = page(document(replace(FP32, failed="it broke", timings=())))
    assert "Nothing was timed to its end." in nothing.text and "it broke" in nothing.text


def test_points_stand_where_their_numbers_say() -> None:
    slow = replace(INT8, name="vit/mixed", timings=(timed(7.0),), judged=labelled(91.15, 0.05))
    parsed, _ = page(document(FP32, INT8, slow))
    (x1, y1), (x0, y0), (x2, y2) = sorted(parsed.points)
    assert (x2 - x0) / (x0 - x1) == pytest.approx((7.0 - 5.2) / (5.2 - 3.21), abs=0.01)
    assert y0 < y2 < y1  # SVG counts downwards
    assert (y1 - y2) / (y2 - y0) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("metric", ["top1", "agreement", "sqnr_db", None])
@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_every_candidate_has_a_point_inside_the_frame(metric: str | None, count: int) -> None:
    judged = [Judged(100, 100, **{metric: 70.0 + index % 3}) if metric else None for index in range(count)]
    if metric and metric != "top1":
        judged[0] = Judged(100)
    doc = document(*(candidate(f"v{index}", 5.2 + index, judged[index]) for index in range(count)))
    parsed, _ = page(doc)
    assert len(parsed.points) == count
    assert all(62 <= x <= 542 and 22 <= y <= 336 for x, y in parsed.points)


@pytest.mark.parametrize(
    "candidates",
    [
        (FP32, replace(FP32, name="vit/twin")),
        (replace(FP32, judged=labelled(100.0)), replace(INT8, judged=labelled(100.0, 0.0))),
        (replace(FP32, judged=labelled(0.0)), replace(INT8, judged=labelled(0.0, 0.0))),
        (candidate("fast", 1e-6, labelled(90.0)), candidate("slow", 1e6, labelled(90.0, 0.0))),
        (candidate("zero", 0.0, labelled(90.0), timings=(timed(0.0),)), candidate("one", 1.0, labelled(90.0))),
        (replace(FP32, timings=(timed(5.0, centiles_ms=(5.0,) * 101, p50=Interval(5.0, 5.0)),)), INT8),
    ],
)
def test_equal_and_extreme_values_make_a_page(candidates: tuple[Candidate, ...]) -> None:
    parsed, text = page(document(*candidates))
    assert len(parsed.points) == 2
    assert not re.search(r'["\s>](nan|inf)', text)
    ticks = re.findall(r'dy=".35em" text-anchor="end">([-\d.,]+)<', text.partition("</svg>")[0])
    assert ticks and all(0 <= float(tick) <= 100 for tick in ticks)


def test_thirty_candidates_of_which_all_is_known_stay_under_a_megabyte(tmp_path: Path) -> None:
    doc = document(rich("vit/fp32"), *(rich(f"vit/int8-{place}") for place in range(29)))
    deep = tuple(LayerTime(f"{b}.{p}", f"blocks.{b}", f"part {p}", "int8", 0.1) for b in range(40) for p in range(12))
    doc = replace(doc, candidates=tuple(replace(one, layers=deep) for one in doc.candidates))
    (path,) = write_outputs([doc, replace(doc, environment={"machine": "board"})], report=tmp_path / "report.html")
    assert 100_000 < path.stat().st_size < 1_000_000
    Page(path.read_text("utf-8"))


def test_machines_have_their_colours_frontiers_and_choices() -> None:
    board = document(
        *(replace(one, timings=(timed(one.timings[0].p50_ms * 9, speedup=1.6),)) for one in (FP32, INT8)), machine="board"
    )
    parsed, text = page(document(FP32, INT8), board)
    assert "int8 is the one to ship on both machines." in parsed.text
    assert text.count('class="front') == 3  # of each machine, and of both
    assert {"a CPU", "board"} <= set(parsed.texts)
    worse = replace(board, candidates=(board.candidates[0], replace(INT8, judged=labelled(80.0, 11.2))))
    assert "differs from machine to machine" in page(document(FP32, INT8), worse)[0].text


def test_what_makes_machines_hard_to_compare_is_said() -> None:
    doc = document(FP32, INT8)
    other = document(replace(FP32, name="x/fp32", model="x"), dataset="others", images_key="z")
    assert mismatches([doc]) == [] and mismatches([doc, doc]) == []
    assert [found.partition(",")[0] for found in mismatches([doc, other])] == [
        "these benchmarks are of different models",
        "they were not judged on the same images (others",
        "they have different references",
    ]
    assert "different models" in page(doc, other)[0].text


def test_threads_and_streams_are_named_where_they_were_swept() -> None:
    swept = tuple(timed(ms, threads=threads, streams=streams) for ms, threads, streams in ((5.0, 2, 1), (9.0, 1, 1), (8.0, 1, 2)))
    parsed, _ = page(document(replace(FP32, timings=swept), INT8))
    assert {"fp32, 2 threads", "fp32, 1 thread, 2 streams"} <= set(parsed.texts)
    assert "fp32" in page(document(FP32, INT8))[0].texts


def test_limits_are_drawn() -> None:
    doc = document(FP32, INT8)
    text = html([doc], choose([doc], budget_ms=4.0, max_drop=1.0))
    assert "budget 4 ms" in text and "1 point lost" in text


def test_a_timing_that_beats_its_bound_is_noted() -> None:
    doc = document(*(replace(one, timings=(timed(3.0, bound_ms=bound),)) for one, bound in ((FP32, 2.9), (INT8, 3.1))))
    (note,) = beaten(doc)
    assert note.startswith("vit/int8 at batch 1 is faster than its bound")
    assert "faster than its bound" in page(doc)[0].text


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VitEdgeError, match="cannot write"):
        write_outputs([document(FP32)], report=tmp_path / "file" / "report.html")


def test_a_choice_made_before_the_last_note_is_still_shown() -> None:
    doc = document(FP32, INT8)
    choice = choose([doc])
    assert 'class="chosen"' in html([replace(doc, notes=("one more",))], choice)


def test_without_matplotlib_a_picture_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="matplotlib") as error:
        write_outputs([document(FP32)], png=tmp_path / "x.png")
    assert "[report]" in (error.value.hint or "") and not list(tmp_path.iterdir())


def test_all_outputs_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    doc = document(rich("vit/fp32$_x$"), rich("vit/int8"))
    paths = [tmp_path / name for name in ("report.html", "report.md", "report.csv", "frontier.png")]
    assert write_outputs([doc], report=paths[0], markdown=paths[1], csv=paths[2], png=paths[3]) == paths
    with Image.open(paths[3]) as picture:
        assert picture.format == "PNG" and picture.width == 1600 and sum(map(bool, picture.convert("L").histogram())) > 50
    assert len(list(csv.DictReader(paths[2].open()))) == 4
    with pytest.raises(VitEdgeError, match="nothing was timed"):
        write_outputs([document(replace(FP32, failed="no"))], png=tmp_path / "no.png")
