"""Which candidates nothing beats, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.bench.documents import bits, candidate, document, labelled, timed
from vitedge.bench.choice import choose
from vitedge.bench.document import Document, Interval, Judged
from vitedge.bench.frontier import drop_of, locate, machine_names, measure_of, setting_text
from vitedge.errors import VitEdgeError

FP32 = candidate("fp32", 5.0, labelled(91.2))
INT8 = candidate("int8", 3.0, labelled(91.0, 0.2, 98.6))
FAST = candidate("fast", 1.0, labelled(85.0, 6.2, 88.0))
SLOW = candidate("slow", 4.0, labelled(88.0, 3.2, 90.0))
ALL = document(FP32, INT8, FAST, SLOW)


def names(doc: Document, batch: int | None = None) -> list[str]:
    return [point.candidate.name for point in locate([doc], batch) if point.frontier]


def unsure(doc: Document) -> list[str]:
    return [point.candidate.name for point in locate([doc]) if not point.certain]


def test_what_another_beats_is_not_on_the_frontier() -> None:
    assert names(ALL) == ["fast", "int8", "fp32"]
    assert [point.candidate.name for point in locate([ALL])] == ["fast", "int8", "slow", "fp32"]


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_what_its_definition_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [(int(rng.integers(1, 8)), int(rng.integers(80, 90))) for _ in range(12)]  # few, so that there are ties
    doc = document(*(candidate(f"c{i}", ms, labelled(top1)) for i, (ms, top1) in enumerate(values)))
    best = {
        f"c{i}"
        for i, (ms, top1) in enumerate(values)
        if not any((a <= ms and b > top1) or (a < ms and b >= top1) for a, b in values)
    }
    assert set(names(doc)) == best


def test_ties_share_the_frontier_and_one_candidate_has_it_alone() -> None:
    twin = replace(INT8, name="twin")
    assert set(names(document(FP32, INT8, twin))) == {"fp32", "int8", "twin"}
    assert names(document(FP32)) == ["fp32"] and not unsure(document(FP32))


def test_a_place_within_the_noise_is_not_certain() -> None:
    close = replace(INT8, name="close", timings=(timed(3.03),), judged=labelled(90.9))
    assert unsure(document(FP32, INT8, close)) == ["int8", "close", "fp32"]  # 0.2 points of 1,000 images are noise, too
    far = replace(INT8, name="far", timings=(timed(3.5),), judged=labelled(86.0))
    assert unsure(document(FP32, far)) == []


def test_images_of_both_tell_finer_than_intervals() -> None:
    fp32 = replace(FP32, judged=labelled(91.2, right=bits(range(88))))
    int8 = replace(INT8, judged=labelled(90.2, 1.0, right=bits(range(98))))  # wrong on the same 88, and on ten more
    assert unsure(document(fp32, int8)) == []
    shuffled = replace(INT8, judged=labelled(90.2, 1.0, right=bits(range(500, 598))))
    assert unsure(document(fp32, shuffled)) == ["fp32"]
    lost = [replace(INT8, judged=labelled(90.9, drop)) for drop in (0.3, 0.5)]  # known to 0.4 points, image by image
    assert [unsure(document(FP32, one)) for one in lost] == [["fp32"], []]


def test_speed_ups_tell_finer_than_the_medians_of_a_machine_that_drifts() -> None:
    fp32 = replace(FP32, timings=(timed(5.0, width=0.5),))
    int8 = replace(INT8, timings=(timed(3.0, width=0.5, speedup=1.67, speedup_interval=Interval(1.6, 1.7)),))
    same = replace(int8, timings=(timed(3.0, width=0.5, speedup=1.67, speedup_interval=Interval(0.9, 1.9)),))
    better = labelled(99.0)  # so that int8 beats fp32 in both, surely in accuracy
    assert unsure(document(fp32, replace(int8, judged=labelled(91.2)))) == []
    assert unsure(document(fp32, replace(same, judged=labelled(91.2)))) == ["int8", "fp32"]
    assert unsure(document(fp32, replace(same, judged=better))) == []


def test_without_labels_the_reference_is_perfect() -> None:
    fp32 = replace(FP32, judged=Judged(100))
    doc = document(
        fp32,
        replace(INT8, judged=Judged(100, agreement=98.0, sqnr_db=30.0)),
        replace(SLOW, judged=Judged(100, agreement=97.0, sqnr_db=40.0)),
    )
    assert measure_of([doc]) == "agreement" and names(doc) == ["int8", "fp32"]
    assert [drop_of(doc, one) for one in doc.candidates] == [0, 2, 3]
    dense = document(
        fp32, *(replace(one, judged=Judged(100, sqnr_db=db)) for one, db in ((INT8, 30.0), (SLOW, 40.0), (FAST, 50.0)))
    )
    assert measure_of([dense]) == "sqnr_db" and names(dense) == ["fast", "fp32"]
    assert locate([dense])[-1].accuracy == math.inf
    bare = document(replace(FP32, judged=None), replace(INT8, judged=None))
    assert measure_of([bare]) == "none" and names(bare) == ["int8"]


def test_what_failed_or_was_not_timed_at_the_batch_has_no_point() -> None:
    both = candidate("both", 6.0, labelled(91.0), batches=(1, 8))
    doc = document(both, INT8, replace(FAST, failed="out of memory"))
    assert names(doc) == ["int8"] and names(doc, 8) == ["both"] and names(doc, 3) == []


def test_each_machine_has_a_frontier_and_all_have_one() -> None:
    board = document(*(replace(one, timings=(timed(one.timings[0].p50_ms * 10),)) for one in (FP32, INT8)), machine="board")
    points = locate([ALL, board])
    assert all(point.frontier and not point.overall for point in points if point.document is board)
    assert [point.candidate.name for point in points if point.overall] == ["fast", "int8", "fp32"]
    assert choose([ALL, board], max_drop=1).why.startswith("int8 on a CPU is")


def test_machines_of_one_name_are_told_apart() -> None:
    same, later = document(FP32), document(FP32, date="2026-11-28 09:00 UTC")
    assert machine_names([same, document(FP32, machine="board")]) == ["a CPU", "board"]
    assert machine_names([same, later]) == ["a CPU, 2026-11-27 17:00 UTC", "a CPU, 2026-11-28 09:00 UTC"]
    assert len(set(machine_names([same, same, later]))) == 3
    assert machine_names([replace(same, environment={})] * 2) == ["machine, 1", "machine, 2"]


def test_threads_and_streams_are_points_of_their_own() -> None:
    doc = document(replace(FP32, timings=(timed(5.0, threads=2), timed(9.0, threads=1))))
    assert [(point.timed.threads, point.frontier) for point in locate([doc])] == [(2, True), (1, False)]
    assert [setting_text(point.timed, [doc]) for point in locate([doc])] == ["2 threads", "1 thread"]
    assert setting_text(FP32.timings[0], [ALL]) == ""
    assert choose([doc]).why.startswith("fp32 with 2 threads is")


def test_benchmarks_without_a_batch_in_common_are_not_compared() -> None:
    with pytest.raises(VitEdgeError, match="no batch size"):
        locate([document(FP32), document(candidate("fp32", 5.0, labelled(91.0), batches=(8,)))])
