"""Memory of real processes: what they hold for certain must show."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.engines import CHECKPOINT, MODEL, Made
from vitedge.bench import memory
from vitedge.bench.contenders import Origin
from vitedge.bench.memory import peak_mib
from vitedge.errors import VitEdgeError

pytestmark = pytest.mark.skipif(not memory.STATUS.is_file(), reason="Linux alone tells")


def test_an_engine_takes_more_than_nothing_and_less_than_torch(made: Made) -> None:
    pytest.importorskip("torch")
    bare = peak_mib(None)
    engine = peak_mib(Origin(str(made.engines["onnxruntime", "fp32"]), "onnxruntime"), 4)
    torch = peak_mib(Origin(MODEL, "torch", str(CHECKPOINT)))
    assert bare and engine and torch
    assert 10 < bare < 200 and bare + 5 < engine < bare + 300 and engine < torch


def test_what_fails_there_is_said_here(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.engines["onnxruntime", "fp32"], tmp_path / "engine"))
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(VitEdgeError, match=r"memory failed: .*damaged"):
        peak_mib(Origin(str(folder), "onnxruntime"))


def test_where_the_system_does_not_tell_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert peak_mib(None) is None
