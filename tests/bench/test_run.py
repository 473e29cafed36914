"""Whole benchmarks: of real engines, and of contenders that fail at every stage."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import Made
from vitedge.bench import latency, run, timing
from vitedge.bench.contenders import Contender, Origin, Setting, open_contenders
from vitedge.bench.document import Candidate, Document, Timed, load_document, rows_of, save_document
from vitedge.bench.plan import Plan
from vitedge.bench.run import benchmark
from vitedge.errors import EngineError, VitEdgeError
from vitedge.images import list_images
from vitedge.preprocess import write_input
from vitedge.specs import ModelCard, PixelFormat, Preprocess, Target

CARD = ModelCard("tiny", "classify", Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3), None, ("a", "b"))


class Session:
    """The brightness of a picture as two logits; `broken` is called before each run."""

    def __init__(self, broken: Callable[[], None], closing: Callable[[], None] = lambda: None) -> None:
        self.input = np.zeros((4, 8, 8, 3), np.uint8)
        self.streams, self.closed, self.broken, self.closing = 1, 0, broken, closing

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat = "rgb") -> None:
        write_input(picture, CARD, self.input[row], pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        self.broken()
        mean = self.input[:count].reshape(count, -1).mean(1, dtype=np.float32)
        return np.stack([mean, 255 - mean], 1)

    def fork(self) -> Session:
        return Session(self.broken)

    def close(self) -> None:
        self.closed += 1
        self.closing()


def contender(
    name: str,
    broken: Callable[[], None] = lambda: None,
    opening: Callable[[Setting], None] = lambda how: None,
    closing: Callable[[], None] = lambda: None,
) -> Contender:
    def opener(how: Setting) -> Session:
        opening(how)
        return Session(broken, closing)

    facts = Candidate(name, "tiny", name, "numpy")
    return Contender(Origin(name, "numpy", max_batch=4), facts, CARD, opener)


def after(calls: int) -> Callable[[], None]:
    """Fails from that call on."""
    left = [calls]

    def call() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the device is lost\nand here is its trace")

    return call


@pytest.fixture(autouse=True)
def shortest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "TURN_S", 0.0)
    monkeypatch.setattr(latency, "SETTLE_S", 0.0)


@pytest.fixture
def files(made: Made) -> list[Any]:
    return list_images(made.images)


NONE = Plan(seconds=0)


def test_a_document_of_real_engines_holds_every_figure(made: Made, files: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    engines = [str(made.engines["openvino", variant]) for variant in ("fp32", "int8")]
    told: list[str] = []
    plan = Plan((2, 1), threads=(1,), seconds=0.02, layers=True, dataset="clothes")
    with open_contenders(engines) as found:
        document = benchmark(found, files, plan, notes=[], progress=lambda stage, part: told.append(stage))
    first, second = document.candidates
    settings = [(timed.batch, timed.threads, timed.streams) for timed in first.timings]
    assert settings == [(2, 1, 1), (1, 1, 1)]
    assert document.reference == first.name and document.dataset == "clothes" and document.images_key
    for one in (first, second):
        assert one.open_ms > 0 and one.first_ms > 0 and one.judged and one.judged.top1 and one.judged.top1 > 80 and one.layers
        for timed in one.timings:
            assert len(timed.centiles_ms) == 101 and list(timed.centiles_ms) == sorted(timed.centiles_ms)
            assert len(timed.rounds_ms) >= latency.MIN_SAMPLES // latency.TURN_CALLS and timed.p50.low < timed.p50.high
            assert (timed.end_to_end_ms is not None) == (timed.batch == timed.streams == 1)
            assert timed.images_per_s > 0 and timed.bound_ms and (timed.power_w is None) == (timed.energy_mj is None)
    assert all(timed.speedup is None for timed in first.timings)
    for timed, other in zip(second.timings, first.timings, strict=True):
        ratios = np.array(other.rounds_ms) / timed.rounds_ms
        assert timed.speedup == pytest.approx(np.exp(np.median(np.log(ratios))))
        assert timed.speedup_interval and timed.speedup_interval.low < timed.speedup < timed.speedup_interval.high
    assert {"opening", "accuracy", "layers", "latency, batch 2, 1 thread"} <= set(told)
    save_document(document, tmp_path / "document.json")
    assert load_document(tmp_path / "document.json") == document
    assert "NaN" not in (tmp_path / "document.json").read_text()


def test_without_images_latency_alone_is_measured() -> None:
    document = benchmark([contender("a")], [], NONE, notes=[])
    (one,) = document.candidates
    assert one.judged is None and document.images_key == "" and rows_of(document)[0].images == 0
    assert one.timings[0].end_to_end_ms is None


@pytest.mark.parametrize(("calls", "stage"), [(0, "opening"), (1, "judging"), (20, "timing (latency, batch 1)")])
def test_one_that_fails_is_shown_and_the_others_finish(calls: int, stage: str, files: list[Any]) -> None:
    document = benchmark([contender("a"), contender("b", after(calls)), contender("c")], files, NONE, notes=[])
    broken = document.candidate("b")
    assert broken.failed.startswith(f"{stage}: ") and "the device is lost" in broken.failed and "trace" not in broken.failed
    assert [one.name for one in document.finished] == ["a", "c"] and document.reference == "a"
    assert all(one.timings and one.judged and one.judged.images == len(files) for one in document.finished)
    assert {row.variant for row in rows_of(document)} == {"a", "c"}


@pytest.mark.parametrize("calls", [0, 1, 20])
def test_where_the_reference_fails_the_next_one_is_it(calls: int, files: list[Any]) -> None:
    notes: list[str] = []
    document = benchmark([contender("a", after(calls)), contender("b"), contender("c")], files, NONE, notes=notes)
    assert document.reference == "b" and "a failed, so the others are compared with b" in notes
    assert document.candidate("b").timings[0].speedup is None and document.candidate("c").timings[0].speedup is not None


def test_one_that_does_not_open_in_another_setting_keeps_what_it_has() -> None:
    def opening(how: Setting) -> None:
        if how.streams == 2:
            raise EngineError("no memory for two")

    plan = dataclasses.replace(NONE, streams=(1, 2))
    document = benchmark([contender("a"), contender("b", opening=opening)], [], plan, notes=[])
    assert document.candidate("b").failed == "opening with 2 streams: no memory for two"
    assert [timed.streams for timed in document.candidate("a").timings] == [1, 2]


def test_an_engine_has_the_threads_of_its_target_unless_others_are_asked_for() -> None:
    a, b = contender("a"), contender("b")
    a.manifest = SimpleNamespace(target=Target(threads=2))
    assert timing.conditions_of([a, b], Plan((1, 8))) == [(1, 2, 1), (8, 2, 1), (1, None, 1), (8, None, 1)]
    assert timing.conditions_of([a, b], Plan(threads=(3,), streams=(1, 2))) == [(1, 3, 1), (1, 3, 2)]


def test_in_every_setting_real_images_are_timed(files: list[Any]) -> None:
    a = contender("a")
    benchmark([a], files, dataclasses.replace(NONE, threads=(1, 2), end_to_end=False), notes=[])
    assert a.input.any()


def test_where_all_fail_that_is_an_error(files: list[Any]) -> None:
    with pytest.raises(VitEdgeError, match="all 2 failed; a failed while opening: the device is lost"):
        benchmark([contender("a", after(0)), contender("b", after(0))], files, NONE, notes=[])
    with pytest.raises(VitEdgeError, match=r"^a failed while timing"):
        benchmark([contender("a", after(4))], [], NONE, notes=[])


def test_a_batch_that_one_does_not_take_is_refused_before_anything_runs() -> None:
    ran: list[int] = []
    with pytest.raises(VitEdgeError, match="a takes 1 to 4 images at once, not 8") as caught:
        benchmark([contender("a", lambda: ran.append(1))], [], Plan((1, 8)), notes=[])
    assert caught.value.hint and not ran


def test_what_is_undecided_is_timed_longer_and_that_has_an_end() -> None:
    asked: list[int] = []

    def undecided(timed: Mapping[str, Timed]) -> bool:
        asked.append(timed["b"].calls)
        return len(asked) != 2

    document = benchmark([contender("a"), contender("b")], [], Plan((1, 2), seconds=1e-6), notes=[], undecided=undecided)
    assert asked == [asked[0] * n for n in (1, 1, 2, 3, 4)]
    assert [len(timed.rounds_ms) for timed in document.candidate("b").timings] == [4 * timing.OPENINGS, timing.OPENINGS]


def test_what_opens_quickly_is_timed_in_several_openings_as_memory_lies_elsewhere_in_each() -> None:
    def opener(seconds: float, log: list[str]) -> Callable[[Setting], None]:
        def opening(how: Setting) -> None:
            time.sleep(seconds)
            log.append("opened")

        return opening

    quick, slow = list[str](), list[str]()
    contenders = [
        contender("a", opening=opener(0.0, quick), closing=lambda: quick.append("closed")),
        contender("b", opening=opener(0.2, slow)),
    ]
    document = benchmark(contenders, [], Plan((1, 2), seconds=0.1), notes=[])
    assert quick == ["opened", *["opened", "closed"] * (timing.OPENINGS - 1)], (
        "the old one has its memory until the new one is open"
    )
    assert slow == ["opened"]
    rounds = {len(timed.rounds_ms) for one in document.finished for timed in one.timings if timed.batch == 1}
    assert len(rounds) == 1, "rounds are of all, so that ratios can be taken"


def test_what_compiles_in_its_first_call_is_opened_once() -> None:
    opened, first = list[Setting](), [0.2]
    compiling = contender("a", lambda: time.sleep(first.pop()) if first else None, opened.append)
    benchmark([compiling, contender("b")], [], Plan(seconds=0.1), notes=[])
    assert len(opened) == 1


def test_an_engine_that_does_not_open_again_goes_on_as_it_was() -> None:
    opened: list[Setting] = []

    def once(how: Setting) -> None:
        opened.append(how)
        if len(opened) > 1:
            raise MemoryError

    document = benchmark([contender("a", opening=once), contender("b")], [], Plan(seconds=0.1), notes=[])
    assert len(opened) == timing.OPENINGS and not any(one.failed for one in document.candidates)


def test_those_that_cannot_be_told_apart_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    benchmark([contender("a"), contender("b")], [], Plan((1, 2), seconds=1e-6), notes=notes)
    alike = [note for note in notes if "cannot be told apart" in note]
    assert len(alike) <= 1 and all("b and a" in note for note in alike)
    monkeypatch.setattr(
        timing, "speedup", lambda *arguments: (1.0, dataclasses.replace(timing.median_interval([1.0, 2.0]), low=0.9, high=1.1))
    )
    notes.clear()
    benchmark([contender("a"), contender("b")], [], Plan((1, 2), seconds=1e-6), notes=notes)
    assert "at batch 1 and 2, b and a cannot be told apart on this machine: time them longer" in notes


def test_a_busy_machine_and_a_broken_clock_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter(range(10**6))
    for others, seconds, expected in (
        (lambda: 10.0 * next(busy), 1e-6, True),
        (lambda: 10.0 * next(busy), 0, False),
        (lambda: 0.0, 1e-6, False),
    ):
        monkeypatch.setattr(latency, "_others_s", others)
        notes: list[str] = ["earlier"]
        benchmark([contender("a")], [], Plan(seconds=seconds), notes=notes)
        busy_note = f"another process was busy in {timing.OPENINGS} of {timing.OPENINGS} turns: the times are rough"
        assert (busy_note in notes) == expected
        assert "earlier" in notes
    dropped = dataclasses.replace(latency.take_turn((lambda: None,)), dropped=3)
    assert "went back in 3 calls" in timing._disturbances([latency.Latency(1, (dropped,))])[0]


def test_memory_is_of_a_process_beyond_a_bare_one_and_its_failure_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(origin: Origin | None, batch: int = 1) -> float:
        if origin and origin.given == "b":
            raise VitEdgeError("the process that tells its memory failed: killed")
        return 50.0 + 10 * batch if origin else 50.0

    monkeypatch.setattr(run, "peak_mib", peak)
    notes: list[str] = []
    document = benchmark(
        [contender("a"), contender("b")], [], dataclasses.replace(NONE, batches=(1, 3), memory=True), notes=notes
    )
    assert [one.peak_mib for one in document.candidates] == [30.0, None]
    assert notes == ["b: the process that tells its memory failed: killed"]


def test_the_document_is_plain_json(files: list[Any], tmp_path: Path) -> None:
    document: Document = benchmark([contender("a")], files, NONE, notes=["said"])
    save_document(document, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["notes"][0] == "said"
