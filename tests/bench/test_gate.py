"""What a gate calls worse, on documents whose truth is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from vitedge.bench.document import Candidate, Document, Interval, Judged, Timed
from vitedge.bench.gate import Gate, Verdict
from vitedge.bench.statistics import median_interval, speedup
from vitedge.errors import VitEdgeError

ROUNDS = 60
HERE = {"machine": "a CPU", "cores": "4"}


def timed(rounds: np.ndarray, reference: np.ndarray | None = None, batch: int = 1) -> Timed:
    """A timing of these rounds, in milliseconds."""
    ratio, interval = speedup(reference, rounds) if reference is not None else (None, None)
    centiles = tuple(np.percentile(rounds, np.arange(101)).tolist())
    return Timed(
        batch, None, 1, 4 * len(rounds), tuple(rounds.tolist()), 0, centiles, 0.0, median_interval(rounds), 1.0, ratio, interval
    )


def run(seed: int, slow: float = 1.0, mood: float = 1.0, noise: float = 0.012, rounds: int = ROUNDS) -> Document:
    """FP32 and INT8 in turns, on a machine in some mood; INT8 is `slow` times as slow as it should be."""
    random = np.random.default_rng(seed)
    drift = mood * np.exp(np.cumsum(random.normal(0, 0.01, rounds)))
    fp32, int8 = (ms * drift * np.exp(random.normal(0, noise, rounds)) for ms in (20.0, 10.0 * slow))
    return document(timed(fp32), timed(int8, fp32))


def document(reference: Timed, given: Timed, judged: Judged | None = None, right: Judged | None = None) -> Document:
    candidates = (
        Candidate("vit/fp32@openvino", "vit", "fp32", "openvino", judged=judged, timings=(reference,)),
        Candidate("vit/int8@openvino", "vit", "int8", "openvino", judged=right, timings=(given,)),
    )
    return Document(HERE, candidates, "vit/fp32@openvino", images_key="k")


def held(now: Document, before: Document, max_slower: float = 2.0, max_drop: float = 0.2) -> Verdict:
    return Gate(before, "base.json", max_slower, max_drop).verdict(now)


def test_five_percent_are_caught_and_nothing_else_whatever_the_mood_of_the_machine() -> None:
    base = run(0)
    for seed in range(1, 21):
        fine = held(run(seed, mood=1 + seed % 3), base)
        assert not fine.worse, fine.worse
        caught = held(run(seed, slow=1.05, mood=1 + seed % 3), base)
        assert len(caught.worse) == 1 and "vit/int8@openvino at batch 1 is" in caught.worse[0]
        assert "more than the 2 % that --max-slower allows" in caught.worse[0]


def test_faster_is_not_worse_and_the_limit_is_the_users() -> None:
    base = run(0)
    assert not held(run(1, slow=0.8), base).worse
    assert not held(run(1, slow=1.05), base, max_slower=10).worse
    assert "0 %" in held(run(1, slow=1.05), base, max_slower=0).worse[0]


def test_what_is_within_the_noise_is_undecided_and_passes() -> None:
    base, now = run(0, noise=0.1, rounds=10), run(1, slow=1.03, noise=0.1, rounds=10)
    gate = Gate(base, "base.json")
    assert gate.undecided({"vit/int8@openvino": now.candidates[1].timings[0]})
    verdict = gate.verdict(now)
    assert not verdict.worse and any("or not (" in note for note in verdict.notes)
    sure = run(2, slow=1.5)
    assert not gate.undecided({"vit/int8@openvino": sure.candidates[1].timings[0]})


def test_the_baseline_may_be_the_first_of_the_same_run() -> None:
    for slow, worse in ((1.0, 0), (1.05, 1)):
        random = np.random.default_rng(5)
        old, new = (ms * np.exp(random.normal(0, 0.02, ROUNDS)) for ms in (10.0, 10.0 * slow))
        assert len(Gate(None, "the old one").verdict(document(timed(old), timed(new, old))).worse) == worse


def test_without_a_common_reference_times_are_compared_as_they_are() -> None:
    before, now = (dataclasses.replace(one, candidates=one.candidates[:1]) for one in (run(0), run(1, mood=1.3)))
    assert "vit/fp32@openvino" in held(now, before).worse[0], "the machine is slower, and nothing tells"
    assert not held(now, before, max_slower=60).worse


RIGHT = Judged(200, labelled=200, top1=95.0)


def bits(right: str) -> str:
    return f"{int(right, 2):0{len(right) // 4}x}"


def judged(right: str) -> Judged:
    return Judged(len(right), len(right), 100 * right.count("1") / len(right), right=bits(right))


@pytest.mark.parametrize(
    ("now", "limit", "worse"),
    [
        ("1" * 200, 0.0, 0),
        ("0" * 6 + "1" * 194, 0.0, 1),  # six lost, none won: a chance of 1 in 64
        ("0" * 5 + "1" * 195, 0.0, 0),  # of 1 in 32
        ("0" * 40 + "1" * 160, 10.0, 1),  # 20 points
        ("0" * 40 + "1" * 160, 19.0, 0),  # may be 18
    ],
)
def test_accuracy_is_compared_image_by_image(now: str, limit: float, worse: int) -> None:
    clock = timed(np.full(ROUNDS, 10.0) + np.arange(ROUNDS) / 1000)
    before = document(clock, timed(np.full(ROUNDS, 5.0)), right=judged("1" * 200))
    after = document(clock, timed(np.full(ROUNDS, 5.0)), right=judged(now))
    assert len(held(after, before, max_drop=limit).worse) == worse


def test_as_many_lost_as_won_are_no_loss() -> None:
    clock = timed(np.full(ROUNDS, 10.0))
    before = document(clock, clock, right=judged("1" * 10 + "0" * 10))
    after = document(clock, clock, right=judged("0" * 10 + "1" * 10))
    assert not held(after, before, max_drop=0).worse


def test_other_images_are_compared_as_two_samples() -> None:
    clock = timed(np.full(ROUNDS, 10.0))
    before = document(clock, clock, right=judged("1" * 100 + "0" * 100))
    same = dataclasses.replace(document(clock, clock, right=judged("0" * 8 + "1" * 92 + "0" * 100)), images_key="others")
    far = dataclasses.replace(document(clock, clock, right=judged("0" * 160 + "1" * 40)), images_key="others")
    assert not held(same, before, max_drop=0).worse, "eight images of 200 others are chance"
    assert "points of top-1" in held(far, before).worse[0]


def test_agreement_stands_in_for_labels_that_are_missing() -> None:
    clock = timed(np.full(ROUNDS, 10.0))
    before, after = (document(clock, clock, right=Judged(1000, agreement=percent)) for percent in (99.0, 90.0))
    assert "points of agreement" in held(after, before).worse[0]
    assert not held(before, before).worse


def test_what_failed_now_and_not_before_is_worse() -> None:
    now = run(1)
    broken = dataclasses.replace(now.candidates[1], failed="opening: no memory", timings=())
    verdict = held(dataclasses.replace(now, candidates=(now.candidates[0], broken)), run(0))
    assert verdict.worse == ("vit/int8@openvino failed while opening: no memory, which it did not in base.json",)


NAMES = ["vit/fp32@openvino", "vit/int8@openvino"]


def comparable(
    base: Document, names: list[str] = NAMES, batch: int = 1, where: dict[str, str] = HERE, images: str = "k"
) -> list[str]:
    return Gate(base, "base.json").require_comparable(names, [(batch, None, 1)], where, images)


def test_what_cannot_be_compared_is_said_before_anything_is_measured() -> None:
    base = run(0)
    assert comparable(base) == []
    with pytest.raises(VitEdgeError, match=r"another machine: machine a CPU, here a GPU") as caught:
        comparable(base, where={**HERE, "machine": "a GPU"})
    assert "--baseline" in str(caught.value.hint)
    with pytest.raises(VitEdgeError, match=r"base.json has none of vit/int4@openvino"):
        comparable(base, ["vit/int4@openvino"])
    with pytest.raises(VitEdgeError, match=r"base.json was timed at batch 1, and this run is at batch 8"):
        comparable(base, batch=8)
    with pytest.raises(VitEdgeError, match=r"--max-slower is -1"):
        Gate(base, "base.json", -1)
    with pytest.raises(VitEdgeError, match=r"--max-drop is nan"):
        Gate(base, "base.json", 2, math.nan)


def test_what_is_left_out_of_the_comparison_is_noted() -> None:
    base = run(0)
    notes = comparable(base, ["vit/fp32@openvino", "vit/int4@openvino"], images="others")
    assert any("vit/int4@openvino is not in base.json" in note for note in notes)
    assert any("vit/int8@openvino is in base.json, and is not measured now" in note for note in notes)
    assert any("looks like a slower engine" in note for note in notes) and any("other images" in note for note in notes)
    assert Gate(None, "x").require_comparable(NAMES, [], {}, "") == []


def test_an_interval_that_is_a_point_is_taken_as_it_is() -> None:
    exact = dataclasses.replace(timed(np.full(ROUNDS, 10.0)), p50=Interval(10.0, 10.0))
    alone = dataclasses.replace(document(exact, exact), candidates=document(exact, exact).candidates[:1])
    assert not held(alone, alone).worse
