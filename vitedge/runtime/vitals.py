"""A device's own sensors in, temperatures and powers out, where it has any that may be read.

    thermal zones, else hwmon (coretemp, k10temp)                 ->  °C
    hwmon power and INA3221 rails (Jetson), powercap (RAPL)       ->  W      ->  [Reading, ...]
    NVML, where the package nvidia-ml-py is installed             ->  both

Knows nothing of cameras. What is not there, not readable or out of order is left out and never guessed: RAPL, for example, is
readable by root alone on most systems.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

Kind = Literal["temperature", "power"]
SYS = Path("/sys")
COLDEST, HOTTEST = -60.0, 250.0  # °C: what a sensor that is not connected says lies outside
MOST_WATTS = 10_000.0
PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")  # hwmon chips that tell the temperature of a processor
WHOLE = ("VDD_IN", "POM_5V_IN", "psys")  # rails that feed all others; they come first


@dataclass(frozen=True, slots=True)
class Reading:
    """What a sensor says now, in °C or W. since_last: whether it is the mean since it was last read, of a counter."""

    sensor: str
    kind: Kind
    value: float
    since_last: bool = False


class Vitals:
    """The sensors that this machine had when it was made. Not for several threads at once.

    root: in place of /sys. gpus: whether to ask NVML too.
    """

    def __init__(self, root: Path = SYS, *, gpus: bool = True) -> None:
        sensors = [*(_zones(root) or _processors(root)), *_rails(root), *_packages(root)]
        self._nvml = _open_nvml() if gpus else None
        if self._nvml is not None:
            sensors += _gpus(self._nvml)
        self._sensors = _told_apart(sorted(sensors, key=lambda sensor: sensor.name not in WHOLE))

    def read(self) -> list[Reading]:
        """Of every sensor that answers, what it says; power of RAPL from the second time on, as a mean since the last."""
        readings = [
            Reading(sensor.name, sensor.kind, value, sensor.since_last)
            for sensor in self._sensors
            if (value := sensor.value()) is not None
        ]
        return [reading for reading in readings if _plausible(reading)]

    def close(self) -> None:
        """Let go of NVML; a second call does nothing."""
        nvml, self._nvml, self._sensors = self._nvml, None, []
        if nvml is not None:
            nvml.nvmlShutdown()


@dataclass(frozen=True, slots=True)
class _Sensor:
    name: str
    kind: Kind
    value: Callable[[], float | None]
    since_last: bool = False


def _told_apart(sensors: list[_Sensor]) -> list[_Sensor]:
    """The same with a number behind the name of each that is called and measures as one before it: "Core 0 (2)"."""
    seen: Counter[tuple[str, Kind]] = Counter()
    told = []
    for sensor in sensors:
        seen[sensor.name, sensor.kind] += 1
        count = seen[sensor.name, sensor.kind]
        told.append(sensor if count == 1 else replace(sensor, name=f"{sensor.name} ({count})"))
    return told


def _plausible(reading: Reading) -> bool:
    low, high = (COLDEST, HOTTEST) if reading.kind == "temperature" else (0.0, MOST_WATTS)
    return low < reading.value < high


def _zones(root: Path) -> list[_Sensor]:
    """The thermal zones. On a Jetson "cpu-thermal", "gpu-thermal"; a zone that is switched off cannot be read."""
    folders = sorted((root / "class" / "thermal").glob("thermal_zone*"), key=lambda path: (len(path.name), path.name))
    zones = [(_text(folder / "type"), folder / "temp") for folder in folders]
    return [_Sensor(_short(name), "temperature", _scaled(path, 1e-3)) for name, path in zones if name]


def _short(zone: str) -> str:
    """ "cpu-thermal" and "CPU-therm" are "cpu" and "CPU"."""
    for ending in ("-thermal", "_thermal", "-therm"):
        zone = zone.removesuffix(ending)
    return zone


def _processors(root: Path) -> list[_Sensor]:
    """What the sensors in the processor itself say."""
    found = []
    for chip in _chips(root):
        if _text(chip / "name") in PROCESSORS:
            for path in sorted(chip.glob("temp*_input")):
                label = _text(path.with_name(path.name.replace("_input", "_label"))) or _text(chip / "name")
                found.append(_Sensor(label, "temperature", _scaled(path, 1e-3)))
    return found


def _rails(root: Path) -> list[_Sensor]:
    """Supply rails: of most chips in watts, of an INA3221 as volts and amperes of up to three."""
    found = []
    for chip in _chips(root):
        name = _text(chip / "name")
        found += [_Sensor(name, "power", _scaled(path, 1e-6)) for path in sorted(chip.glob("power*_input"))]
        if name.startswith("ina3221"):
            found += _channels(chip)
    return found


def _channels(chip: Path) -> Iterator[_Sensor]:
    """The rails of an INA3221 that have a name; those that are not connected have none."""
    for channel in (1, 2, 3):
        rail = _text(chip / f"in{channel}_label")
        if rail:
            volts, amperes = _scaled(chip / f"in{channel}_input", 1e-3), _scaled(chip / f"curr{channel}_input", 1e-3)
            yield _Sensor(rail, "power", _product(volts, amperes))


def _chips(root: Path) -> list[Path]:
    """The hwmon folders, a chip each."""
    return sorted((root / "class" / "hwmon").glob("hwmon*"))


def _packages(root: Path) -> list[_Sensor]:
    """RAPL's counters of a processor package, not of its parts, which are counted in it."""
    folders = sorted((root / "class" / "powercap").glob("intel-rapl:*"))
    whole = [folder for folder in folders if folder.name.count(":") == 1]
    return [_Sensor(_text(folder / "name") or folder.name, "power", _EnergyCounter(folder).watts, True) for folder in whole]


class _EnergyCounter:
    """Microjoules that a package has used, which begin again at 0 now and then."""

    def __init__(self, folder: Path) -> None:
        self._joules = _scaled(folder / "energy_uj", 1e-6)
        self._range = _scaled(folder / "max_energy_range_uj", 1e-6)
        self._last = (time.perf_counter(), self._joules())

    def watts(self) -> float | None:
        """The mean power since it was last asked for."""
        (then, before), now, joules = self._last, time.perf_counter(), self._joules()
        self._last = (now, joules)
        if before is None or joules is None or now <= then:
            return None
        used = joules - before
        return (used if used >= 0 else used + (self._range() or 0.0)) / (now - then)


def _open_nvml() -> Any:
    """NVML, or None where its package or the driver is missing."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001  the driver may lack, be too old or fail in any way: then nothing is known
        return None
    return nvml


def _gpus(nvml: Any) -> list[_Sensor]:
    found = []
    for number in range(int(_tried(nvml.nvmlDeviceGetCount) or 0)):
        device = _tried(nvml.nvmlDeviceGetHandleByIndex, number)
        if device is not None:
            found.append(_Sensor(f"GPU {number}", "temperature", partial(_tried, nvml.nvmlDeviceGetTemperature, device, 0)))
            found.append(_Sensor(f"GPU {number}", "power", partial(_watts, nvml, device)))
    return found


def gpus_here() -> list[str]:
    """Each NVIDIA GPU of this machine with its driver, as NVML tells, e.g. "NVIDIA L4, driver 580.65.06"; none without NVML."""
    nvml = _open_nvml()
    if nvml is None:
        return []
    try:
        driver = _tried(nvml.nvmlSystemGetDriverVersion)
        devices = [_tried(nvml.nvmlDeviceGetHandleByIndex, number) for number in range(int(_tried(nvml.nvmlDeviceGetCount) or 0))]
        names = [_tried(nvml.nvmlDeviceGetName, device) for device in devices if device is not None]
        return [f"{_word(name)}, driver {_word(driver)}" for name in names if name]
    finally:
        nvml.nvmlShutdown()


def _word(told: Any) -> str:
    """What older releases of the package give as bytes."""
    return told.decode("utf-8", "replace") if isinstance(told, bytes) else str(told)


def _watts(nvml: Any, device: Any) -> float | None:
    used = _tried(nvml.nvmlDeviceGetPowerUsage, device)
    return None if used is None else used / 1e3


def _tried(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call of NVML gives, None where it is not supported or the GPU is lost."""
    try:
        return call(*arguments)
    except Exception:  # noqa: BLE001  NVMLError has no common ancestor with what a broken library raises
        return None


def _scaled(path: Path, unit: float) -> Callable[[], float | None]:
    """A function that reads the whole number in a file, times its unit."""

    def read() -> float | None:
        try:
            return int(path.read_bytes()) * unit
        except (OSError, ValueError):
            return None

    return read


def _product(one: Callable[[], float | None], other: Callable[[], float | None]) -> Callable[[], float | None]:
    def read() -> float | None:
        first, second = one(), other()
        return None if first is None or second is None else first * second

    return read


def _text(path: Path) -> str:
    """What is in a file, "" where there is none."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
