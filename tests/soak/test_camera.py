"""A camera at full rate for a long time: `make soak-camera`, or `make soak-camera MINUTES=5`.

The test pattern at 60 frames a second, looked at by the ViT-S of examples/focus where `make demo` has built it, else by the
small model of the tests. Every frame is counted, answers are as fresh as they say, memory and clock stay where they were.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import ROOT, Made

pytestmark = pytest.mark.soak
MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
FPS = 60


@pytest.fixture(scope="module")
def engine(made: Made) -> Path:
    """The engine, of real size where there is one."""
    built = sorted((ROOT / "engines" / "focus-vits14").glob("int8-*/manifest.json"))
    return built[-1].parent if built else made.engines["openvino", "int8"]


def measured(engine: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.soak.camera", engine, "--fps", FPS, *arguments]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    print({name: figure for name, figure in figures.items() if name != "resident_mib"})
    return figures


def test_at_full_rate_nothing_grows_drifts_or_is_lost(engine: Path) -> None:
    found = measured(engine, "--seconds", 60 * MINUTES)
    assert found["captured"] == found["processed"] + found["dropped"] and found["processed"] == found["answers"]
    assert found["gaps"] == found["dropped"] and found["ascending"]
    assert found["dropped"] - found["dropped_by_source"] in (0, 1), "one more, where the end came between a frame and its answer"
    assert abs(found["drift"]) < 0.001 and found["held_up"] > -0.001, (
        "what a busy machine holds up comes later, and never earlier"
    )
    assert found["latency_apart"][0] <= 1 and found["latency_apart"][1] <= 1, found["latency_apart"]
    resident = found["resident_mib"]
    print(f"MiB after warm-up {resident[0]}, least {min(resident)}, most {max(resident)}, at the end {resident[-1]}")
    assert max(resident) <= 1.02 * resident[0], resident


def test_an_engine_of_25_frames_a_second_gets_the_newest_of_60(engine: Path) -> None:
    found = measured(engine, "--frames", 2000, "--seconds", 600, "--least-ms", 40)
    assert found["answers"] == 2000 and found["ascending"]
    assert found["behind_most"] <= 2, found["behind"]
    assert found["captured"] == found["processed"] + found["dropped"] and found["gaps"] == found["dropped"]
    assert found["latency_apart"][0] <= 1 and found["latency_apart"][1] <= 1, found["latency_apart"]
