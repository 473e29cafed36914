"""Joules from made-up sensors whose true consumption is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.test_vitals import put
from vitedge.bench.energy import Meter
from vitedge.runtime import vitals

RANGE = 262_143_328_850  # microjoules, after which the counter of a real package begins again


class Machine:
    """A made-up /sys, and the time there."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.now = root, 100.0
        monkeypatch.setattr(vitals.time, "perf_counter", lambda: self.now)

    def package(self, number: int, name: str, energy_uj: int) -> None:
        put(self.root / f"class/powercap/intel-rapl:{number}", name=name, energy_uj=energy_uj, max_energy_range_uj=RANGE)

    def rail(self, name: str, milliamperes: int, channel: int = 1) -> None:
        files = {f"in{channel}_label": name, f"in{channel}_input": 5000, f"curr{channel}_input": milliamperes}
        put(self.root / "class/hwmon/hwmon0", name="ina3221", **files)

    def meter(self) -> Meter:
        """One whose counters have moved since it was made, as those of a machine that runs do."""
        opened = Meter(self.root, gpus=False, clock=lambda: self.now)
        self.now += 1
        opened.used_j()
        return opened


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_packages_add_up_also_when_a_counter_begins_again(machine: Machine) -> None:
    machine.package(0, "package-0", 1_000_000)
    machine.package(1, "package-1", RANGE - 2_000_000)
    meter = machine.meter()
    machine.now += 2
    machine.package(0, "package-0", 31_000_000)
    machine.package(1, "package-1", 3_000_000)
    assert meter.used_j() == pytest.approx(30 + 5)
    assert meter.sensors == ("package-0", "package-1")
    machine.now += 0.5
    machine.package(0, "package-0", 41_000_000)
    machine.package(1, "package-1", 4_000_000)
    assert meter.used_j() == pytest.approx(10 + 1)


def test_what_feeds_all_others_is_counted_alone(machine: Machine) -> None:
    machine.package(0, "package-0", 1_000_000)
    machine.package(1, "psys", 1_000_000)
    meter = machine.meter()
    machine.now += 1
    machine.package(0, "package-0", 11_000_000)
    machine.package(1, "psys", 26_000_000)
    assert meter.used_j() == pytest.approx(25)


def test_of_a_rail_power_is_the_mean_of_beginning_and_end(machine: Machine) -> None:
    machine.rail("VDD_CPU", 400, 1)
    machine.rail("VDD_IN", 1000, 2)
    meter = machine.meter()
    machine.now += 3
    machine.rail("VDD_IN", 2000, 2)
    assert meter.used_j() == pytest.approx(3 * (5 + 10) / 2)
    machine.now += 2
    assert meter.used_j() == pytest.approx(2 * 10)
    assert meter.sensors == ("VDD_IN",)


def test_what_cannot_be_read_throughout_is_not_known(machine: Machine) -> None:
    assert machine.meter().used_j() is None and machine.meter().sensors == ()
    machine.package(0, "package-0", 1_000_000)
    meter = machine.meter()
    machine.now += 1
    put(machine.root / "class/powercap/intel-rapl:0", energy_uj="not for you")
    assert meter.used_j() is None
    meter.close()
    meter.close()
