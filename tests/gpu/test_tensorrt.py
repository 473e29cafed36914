"""Engines on a GPU: built, opened, and held against ONNX Runtime. Skipped where there is none; `make test-gpu` runs them."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import Made, input_rows, sqnr_db
from vitedge.backends import load_backend
from vitedge.backends.build import build_engine, refit_engine
from vitedge.backends.cuda import find_gpu
from vitedge.compiler import graph
from vitedge.compiler.precision import convert
from vitedge.errors import EngineError
from vitedge.images import list_images
from vitedge.runtime.engine import Engine, open_engine
from vitedge.specs import Recipe, Target

pytestmark = pytest.mark.skipif(find_gpu() is None, reason="there is no NVIDIA GPU here, or no PyCUDA")
MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
BACKENDS = [name for name, modules in MODULES.items() if any(map(importlib.util.find_spec, modules))]
LEAST_DB = {"fp32": 80.0, "fp16": 45.0, "int8": 25.0}  # against ONNX Runtime on the same graph: INT8 ties may round otherwise
ANSWERS = ["fp32", "fp16", "int8"]


@pytest.fixture(scope="module")
def graphs(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in FP32, in FP16, and in INT8 with floats in FP16."""
    folder = tmp_path_factory.mktemp("graphs")
    found = {"fp32": made.graphs["fp32"]}
    for name, source, method in (("fp16", "fp32", "none"), ("int8", "int8", "max")):
        model, recipe = graph.load(made.graphs[source]), Recipe(name=name, method=method, float_type="fp16")  # type: ignore[arg-type]
        graph.set_metadata(model, card=graph.model_card(model), variant=name, recipe=recipe)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        found[name] = folder / f"{name}.fp16.onnx"
        convert(folder / f"{name}.onnx", "fp16", found[name], list_images(made.images))
    return found


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    try:
        load_backend(request.param).resolve(Target("local", request.param))
    except EngineError as error:  # TensorRT-RTX does not build for every GPU
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(scope="module")
def int8(graphs: dict[str, Path], backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = build_engine(graphs["int8"], Target("local", backend), tmp_path_factory.mktemp("engines"))
    with open_engine(folder) as engine:
        yield engine


def reference(made: Made, path: Path, rows: NDArray[Any]) -> NDArray[np.float32]:
    """What ONNX Runtime makes of a graph, its float types included."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    answer: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: rows})[0]
    return answer


@pytest.mark.parametrize("variant", ANSWERS)
def test_an_engine_answers_as_onnx_runtime_does(
    made: Made, graphs: dict[str, Path], backend: str, variant: str, tmp_path: Path
) -> None:
    with open_engine(build_engine(graphs[variant], Target("local", backend), tmp_path)) as engine:
        rows = input_rows(engine, made.images, 16)
        wanted = reference(made, graphs[variant], rows)
        for count in (1, 3, 16, 2):
            assert sqnr_db(wanted[:count], engine(rows[:count])) > LEAST_DB[variant]


def test_a_batch_beyond_the_profile_is_refused(int8: Engine) -> None:
    with pytest.raises(EngineError, match="a batch of 17 does not fit"):
        int8.run(17)


def test_sessions_of_one_plan_run_in_threads_of_their_own(made: Made, int8: Engine) -> None:
    rows = input_rows(int8, made.images, 8)
    wanted = int8(rows)
    session: Any = int8._session
    answers: dict[int, NDArray[np.float32]] = {}

    def work(number: int) -> None:
        own = session.fork()
        own.input[:8] = rows
        for _ in range(50):
            answers[number] = own.run(8).copy()
        own.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 3 and all(np.array_equal(answer, wanted) for answer in answers.values())


def test_the_plan_tells_its_layers_and_their_times(int8: Engine) -> None:
    session: Any = int8._session
    assert json.loads(session.inspect())["Layers"]
    times = session.profile(1, 5)
    assert times and all(len(each) == 5 and min(each) >= 0 for each in times.values())


def test_closing_twice_is_safe_and_a_closed_engine_says_so(graphs: dict[str, Path], backend: str, tmp_path: Path) -> None:
    engine = open_engine(build_engine(graphs["fp16"], Target("local", backend), tmp_path))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.run(1)


def test_weights_are_replaced_without_a_build(made: Made, graphs: dict[str, Path], backend: str, tmp_path: Path) -> None:
    folder = build_engine(graphs["fp32"], Target("local", backend, refit=True), tmp_path)
    model = graph.load(graphs["fp32"])
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    graph.put_constant(model, bias.name, graph.constants(model)[bias.name] + np.float32(1))
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    with open_engine(folder) as old, open_engine(refit_engine(folder, tmp_path / "other.onnx", tmp_path)) as new:
        rows = input_rows(old, made.images, 2)
        np.testing.assert_allclose(new(rows), old(rows) + 1, atol=1e-3)


def test_what_is_installed_here_passes_the_doctor(backend: str) -> None:
    from vitedge.doctor import examine

    finding = next(finding for finding in examine() if finding.backend == backend)
    assert finding.passed is True, finding
    assert load_backend(backend).driver()
