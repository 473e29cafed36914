"""The ONNX Runtime backend is the reference: every rounding where the graph says, so numpy can follow it to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.engines import Made, input_rows
from vitedge.backends import onnxruntime as backend
from vitedge.runtime.engine import open_engine
from vitedge.specs import Target

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("torch")


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_it_answers_as_a_session_without_any_optimization(made: Made, variant: str) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(made.graphs[variant], options, providers=["CPUExecutionProvider"])
    with open_engine(made.engines["onnxruntime", variant]) as engine:
        rows = input_rows(engine, made.images, 8)
        (expected,) = plain.run(None, {"patches": rows})
        np.testing.assert_allclose(engine(rows), expected, atol=1e-5 * np.ptp(expected))


def test_no_q_dq_pair_is_fused_into_an_integer_kernel(made: Made, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    session = backend._session(made.graphs["int8"], Target(backend="onnxruntime"))
    options.graph_optimization_level = session.get_session_options().graph_optimization_level
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(made.graphs["int8"], options, providers=["CPUExecutionProvider"])
    before, after = (
        [node.op_type for node in onnx.load(path).graph.node] for path in (made.graphs["int8"], tmp_path / "optimized.onnx")
    )
    assert after.count("MatMul") + after.count("Gemm") == before.count("MatMul") + before.count("Gemm")
    assert not any("Integer" in kind or kind.startswith(("QLinear", "QGemm", "DynamicQ")) for kind in after)


def test_the_first_layer_is_exact(made: Made) -> None:
    """Patches come as integers, so the patch GEMM of the INT8 graph has the error of its weights alone."""
    with open_engine(made.engines["onnxruntime", "int8"]) as engine:
        rows = input_rows(engine, made.images, 1)
    graph = onnx.load(made.graphs["int8"]).graph
    first = next(node for node in graph.node if node.op_type == "MatMul")
    makers = {name: node for node in graph.node for name in node.output}
    assert makers[first.input[0]].op_type == "DequantizeLinear"
    assert makers[first.input[0]].input[0] == graph.input[0].name == "patches"  # nothing rounds in between
    scale = next(onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == makers[first.input[0]].input[1])
    np.testing.assert_array_equal(rows * scale, rows.astype(np.float64) / 128)
