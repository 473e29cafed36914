"""A processor that slows down, made up."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.runtime.test_vitals import put
from vitedge.bench import throttle
from vitedge.bench.throttle import Watch


def slowing(rounds: int, last: int) -> Watch:
    """One that has seen rounds in which the loop took 100 ns, and in the end `last`."""
    took = itertools.chain(itertools.repeat(100, rounds - rounds // 3), itertools.repeat(last))
    ticks = itertools.chain.from_iterable((0, ns) for ns in took)
    watch = Watch(Path("/nowhere"), clock=ticks.__next__)
    for _ in range(rounds):
        watch.look()
    return watch


@pytest.fixture(autouse=True)
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "TRIES", 1)


@pytest.mark.parametrize(("rounds", "last", "said"), [(30, 150, True), (30, 105, False), (30, 80, False), (9, 150, False)])
def test_a_machine_that_ends_slower_than_it_began_is_noted(rounds: int, last: int, said: bool) -> None:
    found = slowing(rounds, last).findings()
    assert bool(found) == said
    assert not said or "1.50 times as long" in found[0]


def test_the_kernels_counters_are_believed(tmp_path: Path) -> None:
    counters = tmp_path / "cpu1/thermal_throttle"
    put(counters, core_throttle_count=3, package_throttle_count="broken")
    watch = Watch(tmp_path)
    assert watch.findings() == []
    put(counters, core_throttle_count=4)
    assert "too hot" in watch.findings()[0]
