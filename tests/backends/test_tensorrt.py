"""What TensorRT is asked for and what it says, with TensorRT-RTX's real parser and builder, which need no GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from tests.engines import ROOT, Made, run_python, start_python
from vitedge.backends import cuda, tensorrt, this_platform
from vitedge.backends.build import build_engine, prepare_build, read_manifest, refit_engine, run_build
from vitedge.backends.tensorrt import TENSORRT, TENSORRT_RTX
from vitedge.backends.tensorrt_log import hint_for, sentence
from vitedge.compiler import graph
from vitedge.compiler.precision import convert
from vitedge.compiler.quantize import leave_float
from vitedge.errors import AbsentDeviceError, EngineError, MissingPackageError
from vitedge.images import list_images
from vitedge.runtime.engine import open_engine
from vitedge.specs import FloatType, Manifest, Recipe, Target

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install '.[rtx]'", exc_type=ImportError)
TARGET = Target("rtx-3090", "tensorrt-rtx", capability="8.6")
OLD_API = json.loads((ROOT / "tests/data/trt_api/8.6.1.json").read_text("utf-8"))["api"]
ORIN = cuda.Gpu("Orin", "8.7", "12.6", 7620)


@pytest.fixture(scope="module")
def half(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT8 graph with floats in FP16."""
    path = tmp_path_factory.mktemp("graphs") / "half.onnx"
    wanting = path.with_name("wanting.onnx")
    _write(made.graphs["int8"], wanting, recipe=Recipe(float_type="fp16"))
    convert(wanting, "fp16", path, list_images(made.images))
    return path


def _write(
    source: Path, path: Path, change: Callable[[ModelProto], object] = lambda model: None, recipe: Recipe | None = None
) -> Path:
    """A copy of a graph after `change`, or under another recipe."""
    model = graph.load(source)
    change(model)
    if recipe:
        graph.set_metadata(model, card=graph.model_card(model), variant=recipe.name, recipe=recipe)
    path.write_bytes(model.SerializeToString())
    return path


def refused(onnx_path: Path, folder: Path, target: Target = TARGET) -> EngineError:
    """The error of a build that must fail and must leave no engine behind."""
    with pytest.raises(EngineError) as caught:
        build_engine(onnx_path, target, folder)
    assert "\n" not in str(caught.value) and caught.value.hint
    assert not list(folder.rglob("manifest.json")) and not list(folder.rglob("*.partial*"))
    return caught.value


# What is built


def test_an_engine_for_a_gpu_that_is_not_here_says_what_it_is(half: Path, tmp_path: Path) -> None:
    manifest = read_manifest(build_engine(half, TARGET, tmp_path))
    assert (manifest.backend, manifest.float_type, manifest.target.capability) == ("tensorrt-rtx", "fp16", "8.6")
    assert manifest.platform == this_platform() and "8.6" in manifest.device
    log = next(tmp_path.glob("*/*/build.log")).read_text()
    assert "cannot run it" in log.splitlines()[0] and "Engine generation completed" in log


@pytest.mark.parametrize("capability", ["7.5", "8.9", "12.0"])
def test_each_capability_is_an_engine_of_its_own(half: Path, tmp_path: Path, capability: str) -> None:
    target = dataclasses.replace(TARGET, capability=capability)
    folders = {build_engine(half, each, tmp_path) for each in (TARGET, target)}
    assert len(folders) == 2
    assert len({(folder / "model.engine").read_bytes() for folder in folders}) == 2


@pytest.mark.parametrize("changes", [{"optimization_level": 0}, {"workspace_mib": 64}, {"batch": (1, 1, 1)}])
def test_what_a_target_asks_for_is_accepted_by_the_real_builder(made: Made, tmp_path: Path, changes: dict[str, object]) -> None:
    assert build_engine(made.graphs["int8"], dataclasses.replace(TARGET, **changes), tmp_path).is_dir()  # type: ignore[arg-type]


def test_figures_for_the_roofline_do_not_make_another_engine(made: Made, tmp_path: Path) -> None:
    from vitedge.specs import Peaks

    with_peaks = dataclasses.replace(TARGET, peaks=Peaks({"int8": 1.0}, 1.0))
    assert len({prepare_build(made.graphs["int8"], target, tmp_path).folder for target in (TARGET, with_peaks)}) == 1


def test_progress_names_phases_and_never_goes_back(made: Made, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    run_build(prepare_build(made.graphs["int8"], TARGET, tmp_path), lambda phase, fraction: told.append((phase, fraction)))
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and fractions[0] > 0 and 0.8 < fractions[-1] <= 1
    assert len({phase for phase, _ in told}) > 3


def test_an_exception_while_progress_is_told_stops_the_build_and_arrives(made: Made, tmp_path: Path) -> None:
    def stop(phase: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build(prepare_build(made.graphs["int8"], TARGET, tmp_path), stop)
    assert list(tmp_path.rglob("*.*")) == []


def test_ctrl_c_while_tensorrt_logs_stops_the_build(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a logger raises, TensorRT drops: so an interrupt that arrives just there was lost."""
    whole = tensorrt.make_log

    def make_log(trt: Any) -> Any:
        log = whole(trt)
        write = type(log).log

        def interrupted(self: Any, severity: Any, message: str) -> None:
            write(self, severity, message)
            if "engine build" in message:
                os.kill(os.getpid(), signal.SIGINT)

        type(log).log = interrupted
        return log

    monkeypatch.setattr(tensorrt, "make_log", make_log)
    told: list[float] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
    try:
        with pytest.raises(KeyboardInterrupt):
            run_build(prepare_build(made.graphs["int8"], TARGET, tmp_path), lambda phase, fraction: told.append(fraction))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert told[-1:] < [0.9] and list(tmp_path.rglob("*.*")) == []


# What 8.6 is told, whose networks are not strongly typed: with its names, but not with its library


class Old:
    """TensorRT 8.6: each of its names stands for itself."""

    __version__ = "8.6.1"

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(**{member: member for member in OLD_API[name]})


def old_types(float_type: FloatType, *layers: tuple[str, list[str], str]) -> tuple[set[str], dict[str, MagicMock]]:
    """The flags that a network is built with, and its layers by what they make. layers: (type, inputs, "name: type")."""
    tensors: dict[str, SimpleNamespace] = {}
    made: dict[str, MagicMock] = {}
    for kind, inputs, output in layers:
        name, _, dtype = output.partition(": ")
        tensors[name] = SimpleNamespace(name=name, dtype=dtype)
        entries = [tensors.get(entry, SimpleNamespace(name=entry)) for entry in inputs]
        made[name] = layer = MagicMock(type=kind, num_inputs=len(entries), num_outputs=1, precision=None)
        layer.get_input.side_effect, layer.get_output.side_effect = entries.__getitem__, [tensors[name]].__getitem__
    network, config = MagicMock(num_layers=len(made)), MagicMock()
    network.get_layer.side_effect = list(made.values()).__getitem__
    tensorrt.Release(Old()).set_types(config, network, float_type)
    return {call.args[0] for call in config.set_flag.call_args_list}, made


QUANTIZED = (
    ("DEQUANTIZE", ["patches"], "a: HALF"), ("MATRIX_MULTIPLY", ["a", "b"], "c: HALF"), ("CAST", ["c"], "d: FLOAT"),
    ("NORMALIZATION", ["d", "gamma"], "e: FLOAT"), ("QUANTIZE", ["e"], "f: INT8"), ("DEQUANTIZE", ["f"], "g: FLOAT"),
    ("MATRIX_MULTIPLY", ["g", "h"], "i: FLOAT"), ("CAST", ["i"], "j: HALF"),
)  # fmt: skip


def test_8_6_is_allowed_no_type_that_the_graph_does_not_have() -> None:
    assert old_types("fp32", ("MATRIX_MULTIPLY", ["a"], "b: FLOAT"))[0] == set()
    assert old_types("fp32", ("DEQUANTIZE", ["a"], "b: FLOAT"))[0] == {"INT8"}
    assert old_types("fp16", ("MATRIX_MULTIPLY", ["a"], "b: HALF"))[0] == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert old_types("fp16", *QUANTIZED)[0] == {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 does not compute in bf16") as caught:
        old_types("bf16", ("MATRIX_MULTIPLY", ["a"], "b: HALF"))
    assert "fp16" in str(caught.value.hint)


def test_8_6_is_held_to_fp32_where_an_fp16_graph_keeps_it() -> None:
    _, layers = old_types("fp16", *QUANTIZED)
    held = {name for name, layer in layers.items() if layer.set_output_type.called}
    assert held == {"e", "i"}
    assert {name for name, layer in layers.items() if layer.precision == "FLOAT"} == {"e"}, "the last product is in INT8"
    layers["i"].set_output_type.assert_called_once_with(0, "FLOAT")
    assert not any(layer.set_output_type.called for layer in old_types("fp32", *QUANTIZED)[1].values())


# What is refused


def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(made: Made, tmp_path: Path) -> None:
    def spoil(model: ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Softmax")
        node.op_type, node.domain = "NoSuchOperation", "com.example"
        model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))

    error = refused(_write(made.graphs["int8"], tmp_path / "odd.onnx", spoil), tmp_path / "engines")
    name = next(node.name for node in graph.load(made.graphs["int8"]).graph.node if node.op_type == "Softmax")
    assert name in str(error) and "NoSuchOperation" in str(error)
    (log,) = (tmp_path / "engines").rglob("*.failed.log")
    assert log.name in str(error.hint) and "NoSuchOperation" in log.read_text()


def test_a_timing_cache_that_cannot_be_read_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    config, log = MagicMock(), MagicMock()
    (tmp_path / "x.cache").write_bytes(b"timings")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    tensorrt._load_cache(config, tmp_path / "x.cache", log)
    config.create_timing_cache.assert_called_once_with(b"")
    config.get_timing_cache.return_value.serialize.return_value = b"new timings"
    tensorrt._save_cache(config, tmp_path / "x.cache", log)
    monkeypatch.undo()
    assert (tmp_path / "x.cache").read_bytes() == b"new timings"
    assert "cannot be read: Permission denied" in log.note.call_args.args[0]


def test_a_failed_log_goes_when_the_build_succeeds(made: Made, tmp_path: Path) -> None:
    build = prepare_build(made.graphs["int8"], TARGET, tmp_path)
    build.folder.parent.mkdir()
    log = build.folder.with_name(f"{build.folder.name}.failed.log")
    log.write_text("of an earlier attempt")
    run_build(build)
    assert not log.exists()


def test_a_zero_point_that_is_not_zero_is_refused_with_the_reason(made: Made, tmp_path: Path) -> None:
    def shift(model: ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        for each in model.graph.node:
            if each.op_type in ("QuantizeLinear", "DequantizeLinear") and each.input[2] == node.input[2]:
                each.input[2] = "shifted"
        graph.put_constant(model, "shifted", np.int8(3))

    error = refused(_write(made.graphs["int8"], tmp_path / "shifted.onnx", shift), tmp_path / "engines")
    assert "zero" in str(error).lower() and "symmetric" in str(error.hint)


def test_a_graph_of_one_batch_size_is_refused_where_the_target_wants_others(made: Made, tmp_path: Path) -> None:
    def fix(model: ModelProto) -> None:
        for entry in (*model.graph.input, *model.graph.output):
            entry.type.tensor_type.shape.dim[0].ClearField("dim_param")
            entry.type.tensor_type.shape.dim[0].dim_value = 4

    path = _write(made.graphs["fp32"], tmp_path / "four.onnx", fix)
    error = refused(path, tmp_path / "engines")
    assert "[1, 1, 16]" in str(error) and "[4, " in str(error)


def test_int8_is_not_made_of_a_float_graph(made: Made, tmp_path: Path) -> None:
    leave_float(made.graphs["fp32"], Recipe(float_type="fp32"), tmp_path / "claims.onnx")
    for target in (TARGET, Target()):
        error = refused(tmp_path / "claims.onnx", tmp_path / "engines", target)
        assert "calls itself int8, but is a float graph" in str(error) and "quantize" in str(error.hint)


def test_a_graph_in_fp32_is_not_passed_off_as_fp16(made: Made, half: Path, tmp_path: Path) -> None:
    wanting = _write(made.graphs["int8"], tmp_path / "wanting.onnx", recipe=Recipe())
    error = refused(wanting, tmp_path / "engines")
    assert "are fp32, but the recipe wants fp16" in str(error) and "--images" in str(error.hint)
    error = refused(half, tmp_path / "engines", Target())
    assert "is in fp16, for GPUs" in str(error)


def test_mixed_float_types_are_refused_by_the_node_that_mixes_them(half: Path, tmp_path: Path) -> None:
    def widen(model: ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        graph.put_constant(model, node.input[1], np.float32(0.1))

    error = refused(_write(half, tmp_path / "mixed.onnx", widen), tmp_path / "engines")
    assert "MatMul" in str(error) and "float types" in str(error.hint)


@pytest.mark.parametrize(
    ("target", "what", "hint"),
    [
        (dataclasses.replace(TARGET, capability="8.7"), "does not build for compute capability 8.7", "8.6, 8.9"),
        (dataclasses.replace(TARGET, capability="7.5"), "asks for fp32, which tensorrt-rtx on compute capability 7.5", "fp16"),
        (dataclasses.replace(TARGET, hardware="ampere-plus"), 'does not know hardware = "ampere-plus"', 'hardware = "this"'),
        (dataclasses.replace(TARGET, version_compatible=True), "for later releases", "version_compatible = false"),
        (dataclasses.replace(TARGET, refit=True), "replaceable only on a GPU", "refit = false"),
        (dataclasses.replace(TARGET, capability=None), "no NVIDIA GPU here to build for", "orin-nano"),
        (Target("orin-nano", "tensorrt", capability="8.7"), "built on a GPU of compute capability 8.7, but here is no", "pack"),
    ],
)
def test_a_target_that_cannot_be_built_for_here_says_what_can_be_done(
    made: Made, tmp_path: Path, target: Target, what: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "find_gpu", lambda: None)
    error = refused(made.graphs["int8"], tmp_path, target)
    assert what in str(error) and hint in str(error.hint)


def test_a_gpu_that_only_lacks_pycuda_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_gpu", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name == "libcuda.so.1" or pytest.fail(name))
    with pytest.raises(AbsentDeviceError, match="but without the package 'pycuda' the GPU here is not found") as caught:
        TENSORRT.resolve(Target("orin-nano", "tensorrt", capability="8.7"))
    assert "pip install pycuda; if not: `vitedge pack" in str(caught.value.hint)
    for backend, target in ((TENSORRT, Target("local", "tensorrt")), (TENSORRT_RTX, dataclasses.replace(TARGET, refit=True))):
        with pytest.raises(MissingPackageError, match="'pycuda' is not installed"):
            backend.resolve(target)


def test_tensorrt_for_another_gpu_names_both(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_gpu", lambda: ORIN)
    error = refused(made.graphs["int8"], tmp_path, Target("h100", "tensorrt", capability="9.0"))
    assert "9.0, but here is Orin (8.7)" in str(error)


def test_without_the_package_the_extra_is_named() -> None:
    code = "import sys\nsys.modules['tensorrt_rtx'] = sys.modules['tensorrt_rtx_bindings'] = None\n"
    code += "from vitedge.backends import load_backend\nfrom vitedge.errors import MissingPackageError\n"
    code += "try: load_backend('tensorrt-rtx').version()\nexcept MissingPackageError as error: print(error, error.hint)"
    assert "'.[rtx]'" in run_python(code).stdout
    if not _has_tensorrt():
        with pytest.raises(MissingPackageError) as caught:
            TENSORRT.version()
        assert "'.[gpu]'" in str(caught.value.hint)


def _has_tensorrt() -> bool:
    return importlib.util.find_spec("tensorrt") is not None


# What an engine must fit


def manifest_of(made: Made, tmp_path: Path, **changes: object) -> Manifest:
    """The manifest of an engine built for an Orin, after `changes`."""
    manifest = read_manifest(build_engine(made.graphs["int8"], TARGET, tmp_path))
    orin = dataclasses.replace(TARGET, capability=ORIN.capability)
    return dataclasses.replace(manifest, **{"target": orin, "driver": ORIN.driver, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"platform": "Linux riscv64"}, "was built on Linux riscv64, and this is"),
        ({"backend_version": "1.6.0.1"}, "was built with tensorrt-rtx 1.6.0.1, but 1.7"),
        ({"backend_version": "1.8.0.1"}, "was built with tensorrt-rtx 1.8.0.1, but 1.7"),
        ({"target": TARGET}, "is for compute capability 8.6, but Orin has 8.7"),
        ({"driver": "13.0"}, "driver for CUDA 13.0, but the one here is for 12.6"),
    ],
)
def test_a_plan_of_another_platform_release_gpu_or_driver_is_refused(
    made: Made, tmp_path: Path, changes: dict[str, object], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "require_gpu", lambda: ORIN)
    monkeypatch.setattr(cuda, "find_gpu", lambda: ORIN)
    manifest = manifest_of(made, tmp_path)
    TENSORRT_RTX.check(manifest)
    with pytest.raises(EngineError) as caught:
        TENSORRT_RTX.check(dataclasses.replace(manifest, **changes))  # type: ignore[arg-type]
    assert what in str(caught.value) and ("build the engine again" in str(caught.value.hint))


def test_compatible_plans_are_let_through(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "require_gpu", lambda: ORIN)
    monkeypatch.setattr(cuda, "find_gpu", lambda: ORIN)
    monkeypatch.setattr(tensorrt.TensorRT, "version", lambda self: "10.3.0")
    everywhere = dataclasses.replace(TARGET, backend="tensorrt", capability="8.0", hardware="ampere-plus")
    manifest = manifest_of(made, tmp_path, target=everywhere, backend_version="10.3.0")
    TENSORRT.check(manifest)
    with pytest.raises(EngineError, match=r"has 8\.7"):
        TENSORRT_RTX.check(manifest)  # whose plans are of one capability
    later = dataclasses.replace(TARGET, capability="8.7", version_compatible=True)
    TENSORRT_RTX.check(manifest_of(made, tmp_path, target=later, backend_version="10.2.0"))
    with pytest.raises(EngineError, match="built with"):
        TENSORRT_RTX.check(manifest_of(made, tmp_path, target=later, backend_version="10.4.0"))


def test_a_plan_is_of_one_model_of_gpus_unless_the_target_asked_for_more(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "require_gpu", lambda: ORIN)
    monkeypatch.setattr(cuda, "find_gpu", lambda: ORIN)
    monkeypatch.setattr(tensorrt.TensorRT, "version", lambda self: "10.13.3")
    target = Target("here", "tensorrt", capability="8.7")
    other = manifest_of(made, tmp_path, target=target, backend_version="10.13.3", device="Big Orin (compute capability 8.7)")
    with pytest.raises(EngineError, match=r"built on Big Orin \(compute capability 8.7\), for GPUs of that model") as caught:
        TENSORRT.check(other)
    assert "build the engine again here" in str(caught.value.hint)
    TENSORRT.check(dataclasses.replace(other, device=TENSORRT.device(target)))
    TENSORRT.check(dataclasses.replace(other, target=dataclasses.replace(target, hardware="same-capability")))
    TENSORRT_RTX.check(other)  # every GPU of the capability runs it


@pytest.mark.skipif(cuda.find_gpu() is not None, reason="there is a GPU here")
def test_without_a_gpu_opening_is_one_sentence(made: Made, tmp_path: Path) -> None:
    folder = build_engine(made.graphs["int8"], TARGET, tmp_path)
    with pytest.raises(EngineError, match=r"needs an NVIDIA GPU of compute capability 8\.6, and none is here") as caught:
        open_engine(folder)
    assert "--target cpu" in str(caught.value.hint) and "\n" not in str(caught.value)


def test_without_a_gpu_that_is_said_before_any_package(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = dataclasses.replace(manifest_of(made, tmp_path), backend="tensorrt")
    monkeypatch.setattr(cuda, "find_gpu", lambda: None)
    monkeypatch.setattr(tensorrt.TensorRT, "version", lambda self: pytest.fail("no package would help"))
    with pytest.raises(EngineError, match=r"of compute capability 8\.7, and none is here"):
        TENSORRT.check(manifest)


def test_weights_are_replaced_only_where_backend_and_target_allow_it(made: Made, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="openvino cannot replace the weights"):
        refit_engine(made.engines["openvino", "int8"], made.graphs["int8"], tmp_path)
    folder = build_engine(made.graphs["int8"], TARGET, tmp_path)
    with pytest.raises(EngineError, match="target did not ask for that") as caught:
        refit_engine(folder, made.graphs["int8"], tmp_path)
    assert "refit = true" in str(caught.value.hint)


# What TensorRT says


@pytest.mark.parametrize(
    ("message", "words", "hint"),
    [
        ("[optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation for node "
         "{ForeignNode[/blocks.0/attn/MatMul]}.)", "blocks.0/attn/MatMul", "newer TensorRT"),
        ("[checkMacros.cpp::catchCudaError::181] Error Code 1: Cuda Runtime (out of memory)", "out of memory", "workspace_mib"),
        ("INetworkDefinition::addMatrixMultiply: Error Code 3: they must have same input types", "same input types", "--images"),
        ('In node 7 (parseGraph): UNSUPPORTED_NODE: creator && "Plugin not found, are the plugin name, version correct?"',
         "that operator is unknown to it", "newer TensorRT"),
        ("IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Myelin ([myelin_builder.cpp::optimize: "
         "enumerate_tactics] no kernel fits) In optimize at /src/optimizer/builder.cpp:120)",
         "Internal Error (Myelin (no kernel fits))", "report it"),
        ("IBuilder::buildSerializedNetwork: API Usage Error (Unable to load library: libnvinfer_lean.so.1: "
         "No such file or directory In Impl at /_src/runtime/common/lean.cpp:40)", "No such file or directory)", "report it"),
        ("", "does not say why", "report it"),
    ],
)  # fmt: skip
def test_errors_become_a_sentence_with_a_hint(message: str, words: str, hint: str) -> None:
    assert words in sentence(message) and ".cpp" not in sentence(message) and "Error Code" not in sentence(message)
    assert hint in hint_for(message)


def test_a_build_that_is_killed_leaves_no_engine(made: Made, tmp_path: Path) -> None:
    """While TensorRT is at it, not only after: the test above it in test_build.py kills between writing and renaming."""
    code = "import sys\nfrom pathlib import Path\nfrom vitedge.backends.build import prepare_build, run_build\n"
    code += "from vitedge.specs import Target\n"
    code += "build = prepare_build(Path(sys.argv[1]), Target('t', 'tensorrt-rtx', capability='8.6'), Path(sys.argv[2]))\n"
    code += "run_build(build, lambda phase, fraction: print('at it', flush=True) or __import__('time').sleep(0.2))"
    killed = start_python(code, made.graphs["int8"], tmp_path)
    assert killed.stdout is not None and killed.stdout.readline() == "at it\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(tmp_path.rglob("manifest.json")) == []
    assert build_engine(made.graphs["int8"], TARGET, tmp_path).is_dir()
