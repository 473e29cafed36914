"""tensorrt.py against NVIDIA's own Python bindings of TensorRT 10.3 to 11.4, building real plans, on a machine without a GPU.

The bindings say whether every call, argument and answer has the types that a release takes. TensorRT-RTX's parser and builder
do the work behind them (see tests/bindings/relay.cpp), so the plans are TensorRT-RTX's, and say nothing of kernels or speed.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.bindings.loader import RELEASES, Bindings, Unavailable, fetch
from tests.engines import Made
from vitedge.compiler import graph
from vitedge.compiler.precision import to_half
from vitedge.specs import Target, to_dict

TARGET = Target(name="board", backend="tensorrt", capability="8.6", batch=(1, 2, 4), workspace_mib=512)
pytestmark = pytest.mark.parametrize("release", RELEASES)


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """The bindings of every release, downloaded once."""
    try:
        fetch()
        return Bindings(tmp_path_factory.mktemp("bindings"))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def graphs(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The INT8 graph with FP32 and with FP16 around it."""
    model = graph.load(made.graphs["int8"])
    to_half(model)
    half = tmp_path_factory.mktemp("graphs") / "int8.fp16.onnx"
    graph.save(model, half)
    return {"fp32": made.graphs["int8"], "fp16": half}


class Builds:
    """Builds with the bindings of a release, each in a process of its own with a timing cache of its own."""

    def __init__(self, bindings: Bindings, folder: Path) -> None:
        self.bindings, self.folder = bindings, folder

    def __call__(self, release: str, *graphs: Path, target: Target = TARGET, **environment: str) -> list[dict[str, Any]]:
        """The outcome of each build, see tests/bindings/build.py."""
        folder = self.folder / f"{len(list(self.folder.iterdir()))}"
        arguments = (folder, json.dumps(to_dict(target)), *graphs)
        cached = {"XDG_CACHE_HOME": str(self.folder)} | environment
        done = self.bindings.run(release, "-m", "tests.bindings.build", *arguments, **cached)
        assert done.returncode == 0, done.stdout + done.stderr
        outcomes: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return outcomes
