"""Which candidate to ship, and the sentence that says why."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.bench.documents import candidate, document, labelled
from vitedge.bench.choice import choose
from vitedge.bench.document import Candidate, Document, Judged
from vitedge.errors import VitEdgeError

FP32 = candidate("fp32", 5.0, labelled(91.2))
INT8 = candidate("int8", 3.0, labelled(91.0, 0.2, 98.6))
FAST = candidate("fast", 1.0, labelled(85.0, 6.2, 88.0))
SLOW = candidate("slow", 4.0, labelled(88.0, 3.2, 90.0))
ALL = document(FP32, INT8, FAST, SLOW)


def chosen(doc: Document, budget_ms: float | None = None, max_drop: float | None = None) -> str:
    return choose([doc], budget_ms=budget_ms, max_drop=max_drop).candidate.name


def test_a_budget_gets_the_most_accurate_within_it() -> None:
    assert [chosen(ALL, budget) for budget in (1.0, 2.9, 3.0, 4.9, 5.0)] == ["fast", "fast", "int8", "int8", "fp32"]


def test_a_largest_drop_gets_the_fastest_that_keeps_it() -> None:
    assert [chosen(ALL, None, drop) for drop in (0.0, 0.19, 0.2, 5.0, 6.2)] == ["fp32", "fp32", "int8", "int8", "fast"]


def test_both_limits_hold_at_once() -> None:
    assert chosen(ALL, 6.0, 1.0) == "fp32" and chosen(ALL, 4.0, 1.0) == "int8" and chosen(ALL, 2.0, 10.0) == "fast"


def test_without_limits_little_may_be_lost() -> None:
    assert chosen(ALL) == "int8"
    assert chosen(document(FP32, FAST, SLOW)) == "fp32"
    noisy = replace(FAST, judged=Judged(100, sqnr_db=12.0))
    clean = replace(INT8, judged=Judged(100, sqnr_db=25.0))
    assert chosen(document(replace(FP32, judged=Judged(100)), clean, noisy)) == "int8"
    assert chosen(document(*(replace(one, judged=None) for one in (FP32, FAST)))) == "fast"


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (
            (4.0, None),
            "int8 is the most accurate within 4 ms: 3.00 ms (2.94 to 3.06), top-1 91.00%, 0.20 points below fp32.",
        ),
        (
            (6.0, None),
            "fp32 is the most accurate within 6 ms: 5.00 ms (4.90 to 5.10), top-1 91.20%, the reference. "
            "int8 takes 3.00 ms, and these images do not tell its accuracy apart.",
        ),
        (
            (None, 1.0),
            "int8 is the fastest that loses at most 1 point of top-1: 3.00 ms (2.94 to 3.06), top-1 91.00%, "
            "0.20 points below fp32.",
        ),
        (
            (4.0, 1.0),
            "int8 is the most accurate within 4 ms and loses at most 1 point of top-1: 3.00 ms (2.94 to 3.06), "
            "top-1 91.00%, 0.20 points below fp32.",
        ),
    ],
)
def test_the_reason_is_a_sentence_with_figures(limits: tuple[float | None, float | None], why: str) -> None:
    assert choose([ALL], budget_ms=limits[0], max_drop=limits[1]).why == why


def test_the_reason_without_labels_names_what_is_known() -> None:
    judged = Judged(100, agreement=98.6)
    assert choose([document(replace(FP32, judged=Judged(100)), replace(INT8, judged=judged))]).why.endswith(
        "loses at most 2 points of agreement: 3.00 ms (2.94 to 3.06), agrees with fp32 on 98.60%."
    )
    assert choose([document(FP32)]).why == "fp32 is the only candidate: 5.00 ms (4.90 to 5.10), top-1 91.20%, the reference."


@pytest.mark.parametrize(
    ("candidates", "limits", "said"),
    [
        ((FP32, INT8), (2.0, None), r"within 2 ms; the nearest is int8: 3\.00 ms"),
        ((FP32, INT8, FAST), (2.0, 1.0), r"at most 1 point of top-1 within 2 ms; the nearest is fast: 1\.00 ms"),
        ((FP32, INT8), (0.0, None), "a budget is some milliseconds"),
        ((FP32, INT8), (math.nan, None), "a budget is some milliseconds"),
        ((FP32, INT8), (None, -1.0), "a drop is 0 to 100 points"),
        ((replace(FP32, judged=None), replace(INT8, judged=None)), (None, 1.0), "neither top-1 nor agreement is known"),
        ((replace(FP32, failed="it broke"),), (None, None), "no candidate was timed"),
    ],
)
def test_limits_that_nothing_keeps_are_a_sentence(
    candidates: tuple[Candidate, ...], limits: tuple[float | None, float | None], said: str
) -> None:
    with pytest.raises(VitEdgeError, match=said) as error:
        choose([document(*candidates)], budget_ms=limits[0], max_drop=limits[1])
    assert error.value.hint
