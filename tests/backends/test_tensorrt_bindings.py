"""tensorrt.py against NVIDIA's own Python bindings of TensorRT 10.3 to 11.4, building real plans, on a machine without a GPU.

The bindings say whether every call, argument and answer has the types that a release takes. TensorRT-RTX's parser and builder
do the work behind them (see tests/bindings/relay.cpp), so the plans are TensorRT-RTX's, and say nothing of kernels or speed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bindings.loader import RELEASES, Bindings, Unavailable, fetch
from tests.engines import ROOT, Made
from vitedge.compiler import graph
from vitedge.compiler.precision import to_half
from vitedge.specs import Target, to_dict

HANDLE = 4096  # of the stream in tests/bindings/session.py
DOCTOR = ROOT / "vitedge" / "doctor.onnx"  # which builds in no time
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


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a build, see tests/bindings/build.py. calls: (Class.member, its first argument), in order."""

    version: str
    plan: int | None
    error: str | None
    hint: str | None
    log: str
    progress: list[tuple[str, float]]
    calls: list[tuple[str, int]]

    def values(self, member: str) -> list[int]:
        """What a member was called with, each time."""
        return [value for called, value in self.calls if called == member]


class Builds:
    """Builds with the bindings of a release, in a process of their own."""

    def __init__(self, bindings: Bindings, folder: Path) -> None:
        self.bindings, self.folder = bindings, folder

    def __call__(self, release: str, *graphs: Path, target: Target = TARGET, **environment: str) -> list[Outcome]:
        """One outcome a graph."""
        folder = self.folder / str(len(list(self.folder.iterdir())))
        arguments = (folder, json.dumps(to_dict(target)), *graphs)
        environment = {"XDG_CACHE_HOME": str(folder)} | environment
        done = self.bindings.run(release, "-m", "tests.bindings.build", *arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        names = self.bindings.names(release)
        outcomes = []
        for outcome in json.loads(done.stdout.splitlines()[-1]):
            outcome["calls"] = [(names[kind, function], value) for kind, function, value, _ in outcome["calls"]]
            outcomes.append(Outcome(**outcome))
        return outcomes

    def number(self, release: str, member: str) -> int:
        """The number of a member of an enumeration: "BuilderFlag.REFIT"."""
        enumeration, _, name = member.partition(".")
        return self.bindings.probed(release).numbers[enumeration][name]


@pytest.fixture(scope="module")
def builds(bindings: Bindings, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(bindings, tmp_path_factory.mktemp("builds"))


def test_a_graph_is_parsed_and_built(release: str, graphs: dict[str, Path], builds: Builds) -> None:
    typed = 1 << builds.number(release, "NetworkDefinitionCreationFlag.STRONGLY_TYPED")
    for outcome in builds(release, *graphs.values()):
        assert (outcome.version, outcome.error) == (release, None), outcome.log
        assert outcome.plan and outcome.plan > 100_000
        assert "Engine generation completed" in outcome.log
        assert outcome.values("Builder.create_network") == [typed]
        phases, fractions = zip(*outcome.progress, strict=True)
        assert len(set(phases)) > 5 and list(fractions) == sorted(fractions)
        assert 0 <= fractions[0] < 0.2 and 0.8 < fractions[-1] <= 1


def test_what_a_target_asks_for_reaches_the_builder(release: str, graphs: dict[str, Path], builds: Builds) -> None:
    wide = dataclasses.replace(
        TARGET, workspace_mib=64, optimization_level=1, hardware="ampere-plus", version_compatible=True, refit=True
    )
    (outcome,) = builds(release, graphs["fp32"], target=wide, STOP="1")
    flags = [builds.number(release, f"BuilderFlag.{name}") for name in ("VERSION_COMPATIBLE", "REFIT")]
    assert outcome.values("IBuilderConfig.set_flag") == flags
    assert outcome.values("IBuilderConfig.clear_flag") == [builds.number(release, "BuilderFlag.TF32")]
    assert outcome.values("IBuilderConfig.builder_optimization_level=") == [1]
    assert outcome.values("IBuilderConfig.set_memory_pool_limit") == [builds.number(release, "MemoryPoolType.WORKSPACE")]
    level = builds.number(release, "HardwareCompatibilityLevel.AMPERE_PLUS")
    assert outcome.values("IBuilderConfig.hardware_compatibility_level=") == [level]


def test_engines_for_all_gpus_of_one_capability_came_with_10_9(release: str, graphs: dict[str, Path], builds: Builds) -> None:
    (outcome,) = builds(release, graphs["fp32"], target=dataclasses.replace(TARGET, hardware="same-capability"), STOP="1")
    if release == "10.3.0":
        assert (outcome.error, outcome.hint) == (
            'TensorRT 10.3.0 does not know hardware = "same-capability"', "it came with 10.9"
        )  # fmt: skip
    else:
        level = builds.number(release, "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY")
        assert outcome.values("IBuilderConfig.hardware_compatibility_level=") == [level]


def test_what_tensorrt_does_not_take_is_told_in_a_sentence(
    release: str, graphs: dict[str, Path], builds: Builds, tmp_path: Path
) -> None:
    broken = (tmp_path / "operator.onnx", tmp_path / "zero_point.onnx", tmp_path / "noise.onnx")
    model = graph.load(graphs["fp32"])
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.op_type = "Gruel"
    broken[0].write_bytes(model.SerializeToString())
    model = graph.load(graphs["fp32"])
    quantizer = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    graph.put_constant(model, quantizer.input[2], np.int8(3))
    broken[1].write_bytes(model.SerializeToString())
    broken[2].write_bytes(b"not ONNX")
    operator, zero_point, noise = builds(release, *broken)
    assert operator.error and gelu.name in operator.error and "(Gruel)" in operator.error
    assert operator.hint == "a newer TensorRT may know that operator; or export the model without it"
    assert zero_point.error and "zero" in zero_point.error.lower()
    assert zero_point.hint == "TensorRT is symmetric: zero-points must be 0, as `vitedge quantize` writes them"
    assert noise.error and str(broken[2]) in noise.error
    for outcome in (operator, zero_point, noise):
        assert "logger" not in outcome.log  # which TensorRT would say if an earlier build were still there, with its log
        assert outcome.plan is None and outcome.error and "\n" not in outcome.error and ".cpp" not in outcome.error
        assert " ERROR " in outcome.log


def test_timings_are_kept_and_a_damaged_cache_is_replaced(release: str, builds: Builds, tmp_path: Path) -> None:
    where = {"XDG_CACHE_HOME": str(tmp_path)}
    (first,) = builds(release, DOCTOR, **where)
    (cache,) = tmp_path.rglob("*.cache")
    whole = cache.read_bytes()
    (again,) = builds(release, DOCTOR, **where)
    assert first.values("ITimingCache.serialize") and again.values("ITimingCache.combine")
    assert release in cache.name and "damaged" not in first.log + again.log
    cache.write_bytes(b"damaged")
    (mended,) = builds(release, DOCTOR, **where)
    assert mended.plan
    assert len(cache.read_bytes()) == len(whole)


def test_the_bindings_and_the_relay_refuse_what_is_wrong(release: str, bindings: Bindings) -> None:
    """So a build that goes through has called nothing with the wrong types, and nothing that went to another function."""
    make = "import tensorrt as trt\nbuilder = trt.Builder(trt.Logger())\nconfig = builder.create_builder_config()\n"
    mistyped = bindings.run(release, "-c", f"{make}config.set_flag(int(trt.BuilderFlag.REFIT))")
    assert mistyped.returncode == 1 and "TypeError: set_flag(): incompatible function arguments" in mistyped.stderr
    astray = bindings.run(release, "-c", f"{make}config.flags")
    assert astray.returncode != 0 and "relay: nobody said where function" in astray.stderr


def test_an_interrupted_build_stops(release: str, graphs: dict[str, Path], builds: Builds) -> None:
    (outcome,) = builds(release, graphs["fp32"], STOP="1")
    assert (outcome.error, outcome.plan) == ("KeyboardInterrupt", None)
    assert len(outcome.progress) < 20


def test_without_a_driver_opening_a_plan_is_an_error_of_one_sentence(
    release: str, graphs: dict[str, Path], builds: Builds
) -> None:
    code = """if True:
        import sys, tensorrt
        from pathlib import Path
        from vitedge.backends.tensorrt_log import make_log
        from vitedge.backends.tensorrt_session import deserialize
        from vitedge.errors import EngineError
        from vitedge.specs import Target
        try:
            deserialize(tensorrt, Path(sys.argv[1]), make_log(tensorrt), Target())
        except EngineError as error:
            print(error, error.hint, sep=" -> ")
    """
    done = builds.bindings.run(release, "-c", code, graphs["fp32"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"TensorRT {release} cannot open {graphs['fp32']}: ")
    assert done.stdout.count("\n") == 1 and done.stdout.endswith(" -> build the engine again here\n")


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """What a scene of tests/bindings/session.py called, each with two arguments, and what came of it."""

    calls: list[tuple[str, int, int]]
    said: Any

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    def arguments(self, member: str) -> list[list[int]]:
        """The arguments of a member, each time that it was called."""
        return [arguments for name, *arguments in self.calls if name == member]


@pytest.fixture(scope="module")
def scenes(bindings: Bindings, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Scene]]:
    """The scenes of tests/bindings/session.py as a release plays them."""

    def played(release: str) -> dict[str, Scene]:
        folder = tmp_path_factory.mktemp("plan")
        (folder / "model.engine").write_bytes(b"plan")
        arguments = (bindings.probed_file(release), folder, DOCTOR)
        done = bindings.run(release, "-m", "tests.bindings.session", *arguments, record=True, XDG_CACHE_HOME=str(folder))
        assert done.returncode == 0, done.stdout + done.stderr
        return {name: Scene(**scene) for name, scene in json.loads(done.stdout.splitlines()[-1]).items()}

    return cache(played)


def test_a_session_binds_its_buffers_once_and_then_only_runs(release: str, scenes: Callable[[str], dict[str, Scene]]) -> None:
    opened, run, profiled = (scenes(release)[name] for name in ("open", "run", "profile"))
    assert opened.names[0] == "Runtime.engine_host_code_allowed=" and opened.calls[0][1] == 0
    assert [address for _, address in opened.arguments("IExecutionContext.set_tensor_address")] == opened.said
    shape, execute = "IExecutionContext.set_input_shape", "IExecutionContext.execute_async_v3"
    assert run.names == [shape, execute, execute, shape, execute]
    assert run.said == [[3, 10], [3, 10], [1, 10]]
    assert {handle for handle, _ in run.arguments(execute)} == {HANDLE}
    assert profiled.names == [shape, "IExecutionContext.profiler=", execute, execute]


def test_a_graph_is_captured_after_a_run_and_has_a_context_of_its_own(
    release: str, scenes: Callable[[str], dict[str, Scene]]
) -> None:
    replayed, written = scenes(release)["replayed"], scenes(release)["written"]
    shape, execute = "IExecutionContext.set_input_shape", "IExecutionContext.execute_async_v3"
    make, bind = "ICudaEngine.create_execution_context", "IExecutionContext.set_tensor_address"
    assert replayed.names == [shape, execute, execute, make, bind, bind, shape, execute, execute]
    assert replayed.said == [[3, 10]] * 4 + [[1, 10]] * 3 + [[3, 10]]
    assert written.names == [] and written.said == [-128, (783 % 256) - 128]


def test_a_fork_has_a_context_of_its_own_and_the_same_weights(release: str, scenes: Callable[[str], dict[str, Scene]]) -> None:
    fork, inspected = scenes(release)["fork"], scenes(release)["inspect"]
    assert "ICudaEngine.create_execution_context" in fork.names and "Runtime.deserialize_cuda_engine" not in fork.names
    assert inspected.said == '{"Layers": []}' and inspected.names[1] == "EngineInspector.execution_context="


def test_what_a_session_cannot_do_is_told(release: str, scenes: Callable[[str], dict[str, Scene]]) -> None:
    said = {name: scene.said for name, scene in scenes(release).items()}
    assert said["not run"] == "TensorRT could not run the engine: it does not say why"
    assert said["not of that batch"] == "the plan does not take a batch of 4"
    assert said["no memory"] == "there is not enough GPU memory to run this engine"
    assert said["another input"] == "the plan takes int8[16, 48], but its manifest says int8[16, 49]"
    assert said["no plan"].startswith(f"TensorRT {release} cannot open ")


def test_weights_are_replaced_and_the_plan_is_written_again(
    release: str, bindings: Bindings, scenes: Callable[[str], dict[str, Scene]]
) -> None:
    """Such that they can be replaced once more, from 10.16 on; before, `serialize_with_config` has no flag for that."""
    refit, lacking, other = (scenes(release)[name] for name in ("refit", "not refitted", "another graph"))
    again = release not in ("10.3.0", "10.13.3.9")
    written = ["ISerializationConfig.set_flag", "ICudaEngine.serialize_with_config"] if again else ["ICudaEngine.serialize"]
    wanted = ["OnnxParserRefitter.refit_from_file", "Refitter.refit_cuda_engine", *written]
    assert [name for name in refit.names if name in wanted] == wanted and refit.said == "refitted"
    assert scenes(release)["refits again"].said == str(again)
    if again:
        flag = bindings.probed(release).numbers["SerializationFlag"]["INCLUDE_REFIT"]
        assert [value for value, _ in refit.arguments(written[0])] == [flag]
    assert "Refitter.get_missing_weights" in lacking.names and "does not have the weights of" in lacking.said
    assert "does not fit" in other.said and other.said.endswith("weights of another shape")


def test_a_builder_that_refuses_a_timing_cache_begins_with_none(release: str, scenes: Callable[[str], dict[str, Scene]]) -> None:
    damaged, other, failed = (scenes(release)[name] for name in ("damaged timings", "other timings", "not built"))
    make, use = "IBuilderConfig.create_timing_cache", "IBuilderConfig.set_timing_cache"
    assert [name for name in damaged.names if name in (make, use)] == [make, make, use]
    assert [name for name in other.names if name in (make, use)] == [make, use, make, use]
    for scene in (damaged, other):
        assert "is damaged or of another device, and will be replaced" in scene.said
    assert failed.said.startswith("tensorrt cannot build ")
