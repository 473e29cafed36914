"""Sensors are read as the kernel shows them, and what is not there or not readable is left out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitedge.runtime import vitals
from vitedge.runtime.vitals import Reading, Vitals


def put(root: Path, **files: object) -> None:
    """Files by their path, in which __ stands for / and which are written as the kernel does, with an end of line."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def read(root: Path) -> list[tuple[str, str, float]]:
    return [(found.sensor, found.kind, pytest.approx(found.value)) for found in Vitals(root, gpus=False).read()]


def test_a_jetson_tells_its_zones_and_rails_the_whole_first(tmp_path: Path) -> None:
    put(tmp_path / "class/thermal", thermal_zone0__type="cpu-thermal", thermal_zone0__temp=52100)
    put(tmp_path / "class/thermal", thermal_zone1__type="GPU-therm", thermal_zone1__temp=-256000)  # switched off
    put(tmp_path / "class/thermal", thermal_zone10__type="tj-thermal", thermal_zone10__temp=54000)
    chip = tmp_path / "class/hwmon/hwmon3"
    put(chip, name="ina3221", in1_label="VDD_CPU_GPU_CV", in1_input=4960, curr1_input=560, in2_label="VDD_IN", in2_input=5000)
    put(chip, curr2_input=1600, in3_input=0, curr3_input=0, in4_label="sum of shunt voltages", in4_input=3, in7_input=5)
    assert read(tmp_path) == [
        ("VDD_IN", "power", 8.0),
        ("cpu", "temperature", 52.1),
        ("tj", "temperature", 54.0),
        ("VDD_CPU_GPU_CV", "power", 2.7776),
    ]


def test_without_zones_the_processor_is_asked_and_other_chips_are_not(tmp_path: Path) -> None:
    put(tmp_path / "class/hwmon/hwmon0", name="nvme", temp1_input=38000)
    put(tmp_path / "class/hwmon/hwmon1", name="coretemp", temp1_label="Package id 0", temp1_input=61000, temp2_input=59000)
    put(tmp_path / "class/hwmon/hwmon2", name="coretemp", temp1_label="Package id 0", temp1_input=60000)
    put(tmp_path / "class/hwmon/hwmon3", name="amdgpu", power1_input=35_000_000)
    assert read(tmp_path) == [
        ("Package id 0", "temperature", 61.0),
        ("coretemp", "temperature", 59.0),
        ("Package id 0 (2)", "temperature", 60.0),  # names are labels, which must differ
        ("amdgpu", "power", 35.0),
    ]


def test_rapl_gives_the_mean_power_of_packages_also_when_its_counter_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(vitals, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    package = tmp_path / "class/powercap/intel-rapl:0"
    put(package, name="package-0", energy_uj=5_000_000, max_energy_range_uj=100_000_000)
    put(tmp_path / "class/powercap/intel-rapl:0:0", name="core", energy_uj=1, max_energy_range_uj=10)
    found = Vitals(tmp_path, gpus=False)
    assert found.read() == []  # no time has passed
    for later, energy, watts in ((102.0, 35_000_000, 15.0), (103.0, 5_000_000, 70.0)):
        now[0] = later
        put(package, energy_uj=energy)
        assert found.read() == [Reading("package-0", "power", pytest.approx(watts), since_last=True)]


@pytest.mark.skipif(os.name != "posix", reason="links as on Linux")
def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    put(tmp_path / "class/thermal", thermal_zone0__type="broken", thermal_zone0__temp="n/a", thermal_zone1__type="fine")
    put(tmp_path / "class/thermal", thermal_zone1__temp=40000, thermal_zone2__temp=1000)  # a zone without a name
    (tmp_path / "class/thermal/thermal_zone3/temp").mkdir(parents=True)
    put(tmp_path / "class/thermal", thermal_zone3__type="a folder", thermal_zone4__type="gone")
    put(tmp_path / "class/powercap/intel-rapl:0", name="package-0")
    found = Vitals(tmp_path, gpus=False)
    assert found.read() == [Reading("fine", "temperature", 40.0)]
    (tmp_path / "class/thermal/thermal_zone1/temp").unlink()
    assert found.read() == []


def test_a_machine_without_sensors_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    with_gpus = Vitals(tmp_path)  # whatever NVML says here, it is no error
    assert all(reading.sensor.startswith("GPU") for reading in with_gpus.read())
    with_gpus.close()
    with_gpus.close()


def test_gpus_are_asked_through_nvml_and_one_that_is_lost_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library, as it takes a GPU: what it answers is as NVML documents it."""

    def temperature(device: int, kind: int) -> int:
        if device == 1:
            raise RuntimeError("GPU is lost")
        return 64

    ended: list[bool] = []
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: ended.append(True),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTemperature=temperature,
        nvmlDeviceGetPowerUsage=lambda device: [71_500, 12_000][device],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    found = Vitals(tmp_path)
    assert found.read() == [Reading("GPU 0", "temperature", 64), Reading("GPU 0", "power", 71.5), Reading("GPU 1", "power", 12.0)]
    found.close()
    found.close()
    assert ended == [True] and found.read() == []


def test_this_machine_can_be_read() -> None:
    found = Vitals()
    for _ in range(2):
        assert all(reading.kind in ("temperature", "power") for reading in found.read())
    found.close()
