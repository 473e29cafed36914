"""OpenVINO computes what the graph and the target say: INT8 in INT8 kernels, floats in the float type, on so many threads."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path

import pytest

from tests.engines import Made, input_rows, run_python, sqnr_db
from vitedge.backends import openvino as backend
from vitedge.backends.build import build_engine
from vitedge.runtime.engine import open_engine
from vitedge.specs import FloatType, Target

openvino = pytest.importorskip("openvino")
pytest.importorskip("torch")

LINEARS = 18  # of the Fashion-MNIST model: the patch GEMM, four in each of four blocks, the head


def precisions(graph: Path, float_type: FloatType) -> Counter[tuple[str, str]]:
    """(layer type, precision it runs in) -> how many layers."""
    compiled = backend._compile(openvino.Core().read_model(graph), Target(), float_type, 1)
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    return Counter((info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in infos)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="INT8 kernels of other processors have other names")
@pytest.mark.parametrize("float_type", backend.float_types(Target()))
def test_every_linear_of_an_int8_graph_runs_in_an_int8_kernel_and_the_rest_in_the_float_type(
    made: Made, float_type: FloatType
) -> None:
    found = precisions(made.graphs["int8"], float_type)
    assert found["FullyConnected", "i8"] == LINEARS
    assert {precision for layer, precision in found if layer in ("FullyConnected", "MatMul")} == {"i8"}
    assert {precision for layer, precision in found if layer == "MVN"} == {backend.PRECISION[float_type]}


def test_fp32_means_fp32_even_where_the_processor_prefers_bf16(made: Made) -> None:
    found = precisions(made.graphs["fp32"], "fp32")
    assert found["FullyConnected", "f32"] == LINEARS
    assert not any(precision in ("bf16", "f16") for _, precision in found)


def test_threads_of_the_target_are_the_threads_used(made: Made, tmp_path: Path) -> None:
    model = openvino.Core().read_model(made.graphs["int8"])
    assert backend._compile(model, Target(threads=1), "fp32", 1).get_property("INFERENCE_NUM_THREADS") == 1
    with (
        open_engine(build_engine(made.graphs["int8"], Target(threads=1), tmp_path)) as one,
        open_engine(made.engines["openvino", "int8"]) as all_cores,
    ):
        rows = input_rows(one, made.images, 2)
        assert sqnr_db(all_cores(rows), one(rows)) > 40


def test_the_plan_opens_without_vitedge(made: Made) -> None:
    """benchmark_app and other tools of the vendor read the same files."""
    compiled = openvino.Core().compile_model(made.engines["openvino", "fp32"] / "model.xml", "CPU")
    with open_engine(made.engines["openvino", "fp32"]) as engine:
        rows = input_rows(engine, made.images, 2)
        assert compiled(rows)[0].shape == engine(rows).shape == (2, 10)
        assert sqnr_db(engine(rows), compiled(rows)[0]) > 30


def test_a_signal_arrives_whatever_order_engines_are_closed_in(made: Made) -> None:
    """On a processor with AMX, a plugin that was gone took the stack for signals with it."""
    code = f"""if True:
        import gc, os, signal
        from vitedge.runtime.engine import open_engine
        first, second = (open_engine({str(made.engines["openvino", "int8"])!r}) for _ in range(2))
        for engine in (first, second):
            engine.run(1)
            engine.close()
        del first, second, engine
        gc.collect()
        signal.signal(signal.SIGINT, lambda *_: print("arrived"))
        os.kill(os.getpid(), signal.SIGINT)
    """
    assert run_python(code).stdout == "arrived\n"
