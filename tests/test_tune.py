"""`vitedge tune` from end to end on a tiny model, and what its parts promise: time, resumption, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines import ROOT, Made, Silent
from tests.models import tiny_vit, write_noise
from vitedge import cli
from vitedge.bench.choice import choose
from vitedge.bench.document import load_document
from vitedge.designs import Design, Found, Goal, Space, Trial
from vitedge.errors import VitEdgeError
from vitedge.pipeline import ModelSource
from vitedge.search import Search
from vitedge.specs import Recipe, Target
from vitedge.tune import FINAL, Budget, Told, Tuned, TuneJob, check_minutes, describe, run, rungs_of, space_of, suitable, tune
from vitedge.workshop import Clocked, Journal, Materials, OutOfTime, Workshop
from vitedge.workspace import load_recipe, load_target

pytest.importorskip("torch")
pytest.importorskip("openvino")
FACTORY = "from tests.models import tiny_vit\n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a tiny model, noise to calibrate on, and a recipe that takes little of it."""
    root = tmp_path_factory.mktemp("tune")
    (root / "vit.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FACTORY}")
    write_noise(root / "noise", 24)
    (root / "calibration" / "recipes").mkdir(parents=True)
    (root / "engines").mkdir()
    return root


def job(root: Path) -> TuneJob:
    source = ModelSource(f"{root / 'vit.py'}:tiny_vit")
    return TuneJob(source, root / "noise", root, minutes=10, recipes=("int8-fast", "bf16"))


class Stopping(Silent):
    """A Watcher that raises when it has heard of so many trials."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        super().__init__()
        self.after, self.error = after, error

    def progress(self, fraction: float, phase: str = "") -> None:
        if len(self.lines) == self.after:
            self.after = -1
            raise self.error


class Killed(BaseException):
    """The process ends here."""


def test_a_tiny_model_is_tuned_killed_resumed_and_ended_by_ctrl_c(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One story in one test, since the second run goes on from the first."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("vitedge.tune.HURRY_S", 1.0)
    monkeypatch.setattr("vitedge.workshop.TIMED_S", 0.05)
    with pytest.raises(Killed):
        tune(job(workspace), Stopping(3, Killed))
    (journal,) = workspace.glob("engines/tiny-vit/tune-*.jsonl")
    assert [entry["found"]["design"]["recipe"] for entry in Journal(journal).read()] == ["bf16", "int8-fast"]

    with journal.open("a") as file:  # what a kill in the midst of a line leaves
        file.write('{"found": {"design": {"rec')
    watcher = Stopping(2, KeyboardInterrupt)
    found = tune(job(workspace), watcher)
    assert watcher.lines[1] == "tune: 2 designs were measured by an earlier run"
    assert not any(line.startswith(("tune: bf16: ", "tune: int8-fast: ")) for line in watcher.lines)
    assert "interrupted" in watcher.lines[2] and "finalists: " in watcher.lines[3]
    variants = [one.variant for one in found.document.candidates]
    assert variants[:3] == ["fp32", "bf16", "int8-fast"]
    assert found.tried == 3 and len(Journal(journal).read()) == 2  # the reference is measured in every run
    assert not any(one.failed for one in found.document.candidates)
    assert all(one.layers for one in found.document.candidates)
    assert set(found.engines) == {one.name for one in found.document.candidates}
    assert all((folder / "manifest.json").is_file() for folder in found.engines.values())
    assert any("flatters" in note for note in found.document.notes)
    assert choose([found.document]).candidate.name in found.engines


def test_the_command_writes_what_it_found_and_fails_where_nothing_is_fast_enough(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a second there is time for the reference alone, and for what an earlier test has measured."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("vitedge.workshop.TIMED_S", 0.05)
    given = ["tune", "vit.py:tiny_vit", "--images", "noise", "--minutes", "0.01", "--json", "found.json"]
    cli.app(given, standalone_mode=False)
    said = capsys.readouterr().out
    found = load_document(workspace / "found.json")
    (engine,) = re.findall(r"^engine: (engines/tiny-vit/[\w-]+)$", said, re.MULTILINE)
    assert (workspace / engine / "manifest.json").is_file() and found.candidates[0].variant == "fp32"
    assert "report: engines/tiny-vit/tune.html" in said and "tiny-vit/fp32@openvino" in said
    assert "<svg" in (workspace / "engines/tiny-vit/tune.html").read_text("utf-8")
    monkeypatch.setattr("vitedge.tune.tune", lambda job, watcher: Tuned(found, {}, workspace, 1))  # what it has just found
    with pytest.raises(VitEdgeError, match=r"0\.0001"):
        cli.app([*given, "--report", "other.html", "--budget-ms", "0.0001"], standalone_mode=False)
    assert (workspace / "other.html").is_file() and re.search(r"^\W* fp32 ", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(VitEdgeError, match="would be overwritten"):
        cli.app([*given, "--report", "noise"], standalone_mode=False)
    with pytest.raises(VitEdgeError, match="some minutes"):
        cli.app([*given, "--minutes", "0"], standalone_mode=False)


@dataclass
class Fake:
    """A workshop that takes made-up time and finds made-up figures."""

    now: float = 0.0
    told: Told | None = None
    interrupt_at: float = math.inf

    def clock(self) -> float:
        return self.now

    def seconds(self, trial: Trial) -> float:
        return 5.0

    def measure(self, trial: Trial) -> Found:
        if trial.design.merged:
            raise VitEdgeError("its attention looks at windows")
        assert self.told is not None
        self.told.clocked.begin("quantize")
        for _ in range(10):
            self.now += 1.5 if trial.design.recipe == "int8" else 0.5
            self.told.clocked.progress(0.5)
            if self.now > self.interrupt_at:
                raise KeyboardInterrupt
        self.told.clocked.end("quantize", "done")
        return Found(trial.design, 0.5, 0.1 * (trial.design.size > 0), 0.01, trial.images)

    def entry(self, found: Found) -> dict[str, object]:
        return {"design": dataclasses.asdict(found.design)}


SPACE = Space(("fp32", "bf16", "int8"), frozenset({"int8"}), (1, 2), (), ((2,), (4,)), (192,), 196, 12, 224)


def fake_run(seconds: float, tmp_path: Path, fake: Fake) -> tuple[Search, Silent, list[str], bool]:
    watcher, notes = Silent(), list[str]()
    fake.told = Told(watcher, Budget(seconds, fake.clock))
    search = Search(SPACE, Goal(points=True), fake.seconds, (64, 256))
    search.add(Found(Design("fp32"), 1.0, 0.0, 0.0, 256))
    hurried = run(search, fake, Journal(tmp_path / "journal.jsonl"), fake.told, notes)  # type: ignore[arg-type]
    return search, watcher, notes, hurried


def test_a_trial_that_takes_too_long_is_broken_off_where_the_last_part_begins(tmp_path: Path) -> None:
    fake = Fake()
    search, watcher, _, hurried = fake_run(30, tmp_path, fake)
    assert (1 - FINAL) * 30 < fake.now <= (1 - FINAL) * 30 + 1.5 and not hurried
    assert "not finished, as the time is up" in watcher.lines[-1]
    assert len(Journal(tmp_path / "journal.jsonl").read()) == len(search.found) - 1
    fake.told.clocked.progress(0.5)  # the finalists are measured whatever the time is  # type: ignore[union-attr]


def test_what_cannot_be_built_is_left_out_once_with_a_note(tmp_path: Path) -> None:
    search, watcher, notes, _ = fake_run(10_000, tmp_path, Fake())
    assert sum("merging" in line for line in watcher.lines) == 1
    (note,) = notes
    assert "was left out: its attention looks at windows" in note and "merging" in note
    assert search.next(1e9) is None and not any(one.merged for one in search.found)


def test_ctrl_c_ends_the_search_and_keeps_what_was_found(tmp_path: Path) -> None:
    search, watcher, _, hurried = fake_run(10_000, tmp_path, Fake(interrupt_at=20))
    assert hurried and "interrupted" in watcher.lines[-1]
    assert len(search.found) >= 2


def test_a_step_that_was_fresh_took_no_time_and_one_in_time_is_counted() -> None:
    times: Iterator[float] = iter(range(100))
    clocked = Clocked(lambda: float(next(times)), lambda phase: None)
    clocked.end("export", "x is fresh")
    assert clocked.taken == {}
    clocked.begin("build")
    clocked.end("build", "done")
    assert clocked.taken["build"] > 0
    clocked.ends = 0
    with pytest.raises(OutOfTime):
        clocked.begin("quantize")


def test_a_journal_reads_what_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "engines" / "tune-x.jsonl")
    assert journal.read() == []
    journal.append({"a": 1})
    journal.path.write_bytes(journal.path.read_bytes() + b'\xff{"a": \n[1]\n{"b"')
    journal.append({"a": 2})
    assert journal.read() == [{"a": 1}, {"a": 2}]
    assert all(json.loads(line) for line in journal.path.read_text("utf-8", "replace").splitlines()[-1:])


def test_recipes_that_suit_a_target_are_tried(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    found = suitable((), Target(backend="onnxruntime"))
    assert set(found) == {"int8", "int8-fast"}  # its floats are fp32, it fuses no attention, and the search frees Linears itself
    (workspace / "calibration" / "recipes" / "mine.toml").write_text('smoothing = "none"\n')
    assert "mine" in suitable((), Target(backend="onnxruntime"))
    assert list(suitable(("int8-attention", "fp32"), Target())) == ["int8-attention"]
    with pytest.raises(VitEdgeError, match="there is no recipe 'int9'"):
        suitable(("int9",), Target())


def test_only_a_plain_vit_gets_fewer_tokens(made: Made) -> None:
    recipes = {"int8": Recipe()}
    graph = made.graphs["fp32"]
    card = tiny_vit()[1]
    square = dataclasses.replace(card, patch=4, preprocess=dataclasses.replace(card.preprocess, size=(28, 28)))
    space = space_of(recipes, square, graph, ("bf16", "fp32"))
    assert (space.tokens, space.size) == (49, 28) and space.blocks > 1 and space.floats == ("fp32",)
    assert space.sizes == (24, 20, 16) and all(0 < 1 - space.work(rate, 0) < 0.7 for rate in space.merged)
    merging = {sum(count > 0 for count in rate) for rate in space.merged}
    assert merging == {1, 2, space.blocks} and len(set(space.merged)) == len(space.merged) >= 5
    assert {len(rate) for rate in space.merged} == {space.blocks}
    assert not space_of(recipes, dataclasses.replace(square, task="dense"), graph, ("fp32",)).sizes
    hierarchical = space_of(recipes, dataclasses.replace(square, patch=None), graph, ("fp32",))
    assert not (hierarchical.merged or hierarchical.sizes or hierarchical.floats) and hierarchical.freed
    oblong = space_of(recipes, dataclasses.replace(card, patch=8), graph, ("fp32",))
    assert oblong.merged and not oblong.sizes


@pytest.mark.parametrize(
    ("images", "image_s", "seconds", "rungs"),
    [
        (10_000, 0.001, 300, (1500, 10_000)),
        (32, 0.1, 300, (16, 32)),
        (1, 0.1, 300, (1,)),
        (50_000, 0.05, 60, (30, 120)),
        (50_000, 9, 60, (16,)),
        (1266, 0.019, 300, (78, 312, 1266)),
        (100, 0.025, 300, (100,)),
    ],
)
def test_rungs_begin_with_what_is_quick_and_end_with_what_time_allows(
    images: int, image_s: float, seconds: float, rungs: tuple[int, ...]
) -> None:
    assert rungs_of(images, image_s, 1.5, seconds, 16) == rungs


def test_a_trial_is_one_line_for_people() -> None:
    found = Found(Design("int8"), 0.5, 0.25, 0.1, 640)
    assert describe(found, Goal(points=True)) == "2.00 times as fast as fp32, loses 0.25 ± 0.20 points, on 640 images"
    assert describe(dataclasses.replace(found, loss=1e-3), Goal(points=False)).endswith("30.0 dB, on 640 images")


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_a_search_lasts_some_minutes(minutes: float) -> None:
    with pytest.raises(VitEdgeError, match="some minutes"):
        check_minutes(minutes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "orin-nano"}, "tune has to measure engines"),
        ({"target": "none"}, "there is no target 'none'"),
        ({"recipes": ("int9",)}, "there is no recipe 'int9'"),
        ({"images": Path("nowhere")}, "there is no folder nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_done(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(workspace)
    watcher = Silent()
    with pytest.raises(VitEdgeError, match=message):
        tune(dataclasses.replace(job(workspace), **changes), watcher)  # type: ignore[arg-type]
    assert watcher.lines == []


def test_what_a_damaged_journal_says_is_not_recalled(tmp_path: Path) -> None:
    ours = Materials(ModelSource("model.py:vit"), [], [], {"int8": load_recipe("int8")}, load_target("cpu"), tmp_path)
    workshop = Workshop(ours, Clocked(time.monotonic, lambda phase: None), time.monotonic)
    workshop.use_space(Space(("fp32", "int8"), frozenset({"int8"})))
    found = Found(Design("int8"), 0.5, 0.25, 0.1, 640)
    whole = workshop.entry(found)
    figures = ({"ratio": math.nan}, {"ratio": 0.0}, {"loss": math.inf}, {"spread": -1.0}, {"images": 0}, {"doubt": math.nan})
    entries = [{**whole, "found": {**whole["found"], **change}} for change in figures]
    entries += [{**whole, "took": took} for took in ({"build": "soon"}, {"build": math.nan}, {"build": 10**400}, 3)]
    entries += [workshop.entry(dataclasses.replace(found, design=Design("int8", merged=(10**9,))))]
    assert [workshop.recall(entry) for entry in [whole, *entries]] == [found, *[None] * len(entries)]
    journal = Journal(tmp_path / "tune.jsonl")
    journal.path.write_text("[" * 100_000 + "\n3\n{")
    journal.append(whole)
    assert journal.read() == [whole]
