"""The benchmark of the quantizers judges rightly, does nothing twice, and names what could not be run."""

from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peers, quantizers, subjects
from benchmarks.judge import Tally
from benchmarks.modelopt_peer import peak_mib
from benchmarks.peers import one_sentence
from benchmarks.quantizers import Candidate, candidate_rows, candidates, chosen, command, spread, top1
from benchmarks.subjects import Subject, classes, pooled, reference, scores, train
from tests.models import tiny_vit, write_noise
from vitedge.errors import VitEdgeError
from vitedge.images import list_images
from vitedge.specs import Recipe

LABELS = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny classifier and pictures of noise."""
    module, card = tiny_vit()
    files = tuple(list_images(write_noise(tmp_path_factory.mktemp("noise"), 36)))
    return Subject("tiny", module, card, "0", files[:20], 16, files[20:], (), LABELS)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (subjects, quantizers):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    return tmp_path


def test_a_recipe_is_quantized_and_judged_in_every_way_but_once(
    subject: Subject, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = ("exact", "engine fp32", "engine")
    candidate = Candidate("int8", "recipe", partial(peers.vitedge, recipe=Recipe()), "0", ways)
    answers = reference(subject)
    assert answers.outputs.shape == (16, 5)
    rows = candidate_rows(candidate, subject, answers)
    assert [row["judged"].partition(",")[0] for row in rows] == ["exact", "engine", "engine"]
    assert rows[1]["judged"] == "engine, fp32"
    assert all(15 < row["sqnr_db"] < 80 for row in rows)
    assert abs(rows[0]["sqnr_db"] - rows[1]["sqnr_db"]) < 3
    assert all(row["seconds"] > 0 and row["peak_mib"] >= row["before_mib"] > 0 for row in rows)
    monkeypatch.setattr(quantizers, "run_alone", None)
    monkeypatch.setattr(quantizers, "judge", None)
    assert candidate_rows(candidate, subject, answers) == rows
    with pytest.raises(TypeError):  # what is asked anew is not there
        candidate_rows(replace(candidate, seed=1), subject, answers)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (VitEdgeError("no wheel"), "^no wheel$"),
        (ModuleNotFoundError("No module", name="nncf"), "^the package 'nncf' is not installed$"),
        (RuntimeError("first\nsecond"), "^RuntimeError: first$"),
        (BrokenProcessPool(), "^its process was killed"),
    ],
)
def test_what_stops_a_quantizer_is_one_sentence(error: Exception, reason: str) -> None:
    with pytest.raises(VitEdgeError, match=reason), one_sentence():
        raise error


def test_a_tally_counts_power_and_classes() -> None:
    wanted = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
    outputs = np.array([[3.0, 0.0], [0.5, 0.0]], np.float32)
    tally = Tally(None)
    tally.add(outputs[:1], wanted[:1], np.array([1]))
    tally.add(outputs[1:], wanted[1:], np.array([0]))
    assert tally.figures() == pytest.approx({"sqnr_db": 10 * np.log10(25 / 16.25), "top1": 50, "agreement": 50})
    with pytest.raises(VitEdgeError, match="not finite"):
        tally.add(outputs * np.nan, wanted, np.array([0, 1]))


def test_an_exact_answer_has_a_finite_sqnr() -> None:
    tally = Tally(None)
    tally.add(np.ones((1, 2), np.float32), np.ones((1, 2), np.float32), np.array([0]))
    assert 100 < tally.figures()["sqnr_db"] < 200


def test_a_probe_learns_the_class_from_tokens_and_always_the_same() -> None:
    random = np.random.default_rng(0)
    truth = np.arange(60) % 3
    tokens = random.normal(size=(60, 5, 4)).astype(np.float32)
    tokens[:, 0, :3] += 6 * np.eye(3, dtype=np.float32)[truth]
    features = pooled(tokens)
    assert features.shape == (60, 8)
    probe = train(features, truth, 3)
    assert (scores(tokens, probe).argmax(axis=1) == truth).all()
    assert np.array_equal(probe.weight, train(features, truth, 3).weight)
    assert top1(subjects.Reference(tokens, truth, probe)) == 100


def test_a_strange_class_is_an_error(subject: Subject) -> None:
    with pytest.raises(VitEdgeError, match="there is no class 'b'; there are a, c"):
        classes(subject.judge, ("a", "c"))


def test_candidates_differ_in_name_and_key_and_can_be_chosen() -> None:
    found = candidates()
    assert len({candidate.name for candidate in found}) == len(found)
    for group in ("recipe", "ablation", "peer"):
        keys = [candidate.key for candidate in found if candidate.group == group]
        assert len(set(keys)) == len(keys) > 0
    names = [candidate.name for candidate in chosen(["int8 seed *", "NNCF"])]
    assert names == ["NNCF", *(f"int8 seed {seed}" for seed in range(5))]
    with pytest.raises(VitEdgeError, match="fits no candidate"):
        chosen(["nothing"])


@pytest.mark.parametrize("words", [["--images", "/home/me/photos", "--judge", "9"], ["--images=/home/me/photos", "--judge", "9"]])
def test_the_command_does_not_name_the_folder_of_the_images(words: list[str]) -> None:
    assert command(words).replace("=", " ") == "python -m benchmarks.quantizers --images DIR --judge 9"


def test_the_spread_of_the_seeds() -> None:
    rows: list[dict[str, Any]] = [{"name": str(i), "group": "seed", "judged": "exact", "sqnr_db": 20.0 + i} for i in range(5)]
    rows.append({"name": "int8", "group": "recipe", "judged": "exact", "sqnr_db": 99.0})
    assert spread(rows) == {"sqnr_db": {"min": 20.0, "median": 22.0, "max": 24.0}}
    assert spread(rows[-1:]) == {}


def test_the_peak_is_that_of_this_process() -> None:
    before = peak_mib()
    assert np.ones(1 << 23).sum() > 0  # 64 MiB
    assert before <= peak_mib() < before + 200
