"""Models of real size become TensorRT-RTX engines for every generation of GPUs, in every type, without a GPU.

Ten minutes on a quiet machine: `make test-rtx`. What each build cost is in results/rtx_builds.json.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install '.[rtx]'", exc_type=ImportError)

from benchmarks.rtx_builds import CAPABILITIES, MODELS, TYPES, model_rows

PROGRAM_MIB = {"swin-t": 16.0}  # the source of its kernels, which TensorRT-RTX compiles where the plan is opened; 10 for others

pytestmark = pytest.mark.rtx


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_in_every_type_for_every_gpu(name: str) -> None:
    rows = list(model_rows(name, CAPABILITIES))
    assert [row["error"] for row in rows if "error" in row] == []
    assert [(row["type"], row["capability"]) for row in rows] == [(kind, each) for kind in TYPES for each in CAPABILITIES]
    for row in rows:
        assert (
            row["weights_mib"] < row["size_mib"] < row["weights_mib"] + PROGRAM_MIB.get(name, 10.0)
        )  # no weight is stored as a wider type
        assert row["before_mib"] < row["peak_mib"]
    sizes = {row["type"]: row["size_mib"] for row in rows}
    assert sizes["fp16"] < 0.75 * sizes["fp32"]
    if name == "focus-vits14":
        assert sizes["int8"] <= 0.4 * sizes["fp32"]
