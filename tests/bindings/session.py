"""Opening, running and refitting a plan, with bindings whose every answer is told: prints what was called as JSON.

    python -m tests.bindings.session FUNCTIONS FOLDER ONNX  ->  {scene: {"calls": [[Class.member, argument, argument], ...],
                                                                         "said": what came of it}}

FUNCTIONS is the file of what the bindings call, see probe.py. There is no driver, so the classes below stand for PyCUDA's
context, streams and memory with arrays of this process, and for a CUDA graph; tests/driver tries those. All else is the code
of vitedge and of the bindings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.bindings import recorder
from tests.bindings.recorder import RELAY, trt
from vitedge.backends import cuda, cuda_graph
from vitedge.backends.tensorrt import TENSORRT
from vitedge.errors import VitEdgeError
from vitedge.specs import ModelCard, Preprocess, Target

HANDLE = 4096  # of the stream
CARD = ModelCard(name="digits", task="classify", preprocess=Preprocess((28, 28), (0.5,), (0.5,), channels=1), patch=7)
TARGET = Target(name="board", backend="tensorrt", batch=(1, 2, 4))
FUNCTIONS = json.loads(Path(sys.argv[1]).read_text("utf-8"))["functions"]
FOLDER, ONNX = Path(sys.argv[2]), Path(sys.argv[3])
scenes: dict[str, dict[str, Any]] = {}


class Device:
    """In place of a CUDA context."""

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Stream:
    """In place of a CUDA stream."""

    handle = HANDLE

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class Event(Stream):
    """In place of a CUDA event."""


class Graph(Stream):
    """In place of a CUDA graph: what is captured does not run, and a launch calls nothing of TensorRT."""

    def launch(self) -> None:
        pass


def capture(stream: int, work: Callable[[], object]) -> Graph:
    """Put work into a stream that keeps it."""
    work()
    return Graph()


class Buffer:
    """In place of memory on a GPU and its twin on the host."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, mapped: bool = False) -> None:
        self.host: NDArray[Any] = np.zeros(shape, dtype)
        self.address = self.host.ctypes.data

    def upload(self, count: int, stream: Stream) -> None:
        pass

    def download(self, count: int, stream: Stream) -> NDArray[Any]:
        return self.host[:count]

    def close(self) -> None:
        pass


def tell(member: str, *values: Any, result: str = "", besides: bool = False) -> None:
    """What a member answers from now on, or besides: numbers, texts or dimensions in turn, or an object of the class `result`."""
    kind, _, name = member.partition(".")
    (function, *_), _ = FUNCTIONS[kind][name]
    if not besides:
        RELAY.relay_forget(kind.encode(), function)
    for value in values or (0,):
        recorder.answer(kind, function, value, result)


def scene(name: str, play: Callable[[], object]) -> Any:
    """Play a scene, and keep what was called in it and what it gave or raised."""
    names = {
        (kind, call): f"{kind}.{member}" for kind in FUNCTIONS for member, (all_, _) in FUNCTIONS[kind].items() for call in all_
    }
    before, given = RELAY.relay_calls(), None
    try:
        given = play()
        said = given if isinstance(given, (str, list)) else None
    except VitEdgeError as error:
        said = str(error)
    calls = [(names[kind, function], *arguments) for kind, function, *arguments in recorder.calls(before)]
    scenes[name] = {"calls": calls, "said": said}
    return given


def tell_of_engine() -> None:
    """An engine that takes int8[-1, 16, 49] and gives float32[-1, 10]."""
    tell("Runtime.deserialize_cuda_engine", result="ICudaEngine")
    tell("ICudaEngine.num_io_tensors", 2)
    tell("ICudaEngine.get_tensor_name", "patches", "logits")
    tell("ICudaEngine.get_tensor_mode", int(trt.TensorIOMode.INPUT), int(trt.TensorIOMode.OUTPUT))
    tell("ICudaEngine.get_tensor_shape", (-1, 16, 49), (-1, 10))
    tell("ICudaEngine.get_tensor_dtype", int(trt.DataType.INT8), int(trt.DataType.FLOAT))
    tell("ICudaEngine.create_execution_context", result="IExecutionContext")
    tell("ICudaEngine.create_engine_inspector", result="EngineInspector")
    tell("EngineInspector.get_engine_information", '{"Layers": []}')
    for member in ("set_tensor_address", "set_input_shape", "execute_async_v3"):
        tell(f"IExecutionContext.{member}", 1)


def tell_of_plan(content: str, *members: str) -> None:
    """Memory with `content`, which `members` return."""
    for member in members:
        tell(member, result="IHostMemory")
    tell("IHostMemory.nbytes", len(content))
    tell("IHostMemory.dtype", int(trt.DataType.INT8))
    (data,) = {*FUNCTIONS["IHostMemory"]["memoryview"][0]} - {
        FUNCTIONS["IHostMemory"][name][0][0] for name in ("nbytes", "dtype")
    }
    recorder.answer("IHostMemory", data, content)


def written(session: Any) -> list[int]:
    """What is in a row once a picture was written into it, where no kernel can be compiled: the corners of the picture."""
    session.write_note = "no kernel"
    session.write(1, np.arange(784, dtype=np.uint8).reshape(28, 28), "grey")
    return [int(session.input[1, patch, pixel]) for patch, pixel in ((0, 0), (15, 48))]


def play_session() -> None:
    """Open, run, profile, inspect, fork, and what can go wrong."""
    session = scene("open", lambda: TENSORRT.open(FOLDER, CARD, TARGET, "fp32"))
    scenes["open"]["said"] = [session._in.address, session._out[0].address]
    session.graphs = False  # whether cuda-bindings is installed here or not
    scene("run", lambda: [list(session.run(count).shape) for count in (3, 3, 1)])
    replayed = scene("another fork", session.fork)
    replayed.graphs, replayed.graphs_note = True, ""
    scene("replayed", lambda: [list(replayed.run(count).shape) for count in (3, 3, 3, 3, 1, 1, 1, 3)])
    replayed.close()
    scene("written", lambda: written(session))
    scene("profile", lambda: session.profile(2, 2) and None)
    scene("inspect", session.inspect)
    fork = scene("fork", session.fork)
    tell("IExecutionContext.execute_async_v3", 0)
    scene("not run", lambda: fork.run(1))
    tell("IExecutionContext.set_input_shape", 0)
    scene("not of that batch", lambda: fork.run(4))
    for ended in (fork, fork, session):
        ended.close()
    tell_of_engine()
    tell("ICudaEngine.create_execution_context", 0)
    scene("no memory", lambda: TENSORRT.open(FOLDER, CARD, TARGET, "fp32"))
    tell_of_engine()
    tell("ICudaEngine.get_tensor_shape", (-1, 16, 48), (-1, 10))
    scene("another input", lambda: TENSORRT.open(FOLDER, CARD, TARGET, "fp32"))
    tell("Runtime.deserialize_cuda_engine", 0)
    scene("no plan", lambda: TENSORRT.open(FOLDER, CARD, TARGET, "fp32"))


def play_refit() -> None:
    """Replace weights; and where some are missing."""
    tell("Runtime.deserialize_cuda_engine", result="ICudaEngine")
    tell("OnnxParserRefitter.refit_from_file", 1)
    tell("Refitter.refit_cuda_engine", 1)
    tell("ICudaEngine.create_serialization_config", result="ISerializationConfig")
    tell_of_plan("refitted", "ICudaEngine.serialize", "ICudaEngine.serialize_with_config")
    into = FOLDER / "refitted"
    into.mkdir()
    scene("refit", lambda: TENSORRT.refit(FOLDER, TARGET, ONNX, into) and None)
    scenes["refit"]["said"] = (into / TENSORRT.PLAN[0]).read_text("utf-8")
    scene("refits again", lambda: str(TENSORRT.refits_again()))
    tell("Refitter.refit_cuda_engine", 0)
    scene("not refitted", lambda: TENSORRT.refit(FOLDER, TARGET, ONNX, into))
    tell("OnnxParserRefitter.refit_from_file", 0)
    tell("OnnxParserRefitter.num_errors", 1)
    tell("OnnxParserRefitter.get_error", result="ParserError")
    tell("ParserError.desc", "In node 3 (refit): UNSUPPORTED: weights of another shape")
    scene("another graph", lambda: TENSORRT.refit(FOLDER, TARGET, ONNX, into))


def play_build() -> None:
    """A build whose timing cache is not one, and then is of another device."""
    tell("Builder.create_network", result="INetworkDefinition")
    tell("Builder.create_builder_config", result="IBuilderConfig")
    tell("Builder.create_optimization_profile", result="IOptimizationProfile")
    tell("OnnxParser.parse", 1)
    tell("INetworkDefinition.num_inputs", 1)
    tell("INetworkDefinition.get_input", result="ITensor")
    tell("ITensor.name", "patches")
    tell("ITensor.shape", (-1, 16, 49))
    tell("IOptimizationProfile.set_shape", 1)
    tell("IBuilderConfig.create_timing_cache", 0)
    tell("IBuilderConfig.create_timing_cache", result="ITimingCache", besides=True)
    tell_of_plan("plan", "Builder.build_serialized_network")
    scene("damaged timings", lambda: TENSORRT.build(ONNX, TARGET, "fp32", FOLDER, lambda phase, fraction: None))
    tell("IBuilderConfig.create_timing_cache", result="ITimingCache")
    tell("IBuilderConfig.set_timing_cache", 0, 1)
    tell("IBuilderConfig.get_timing_cache", result="ITimingCache")
    tell_of_plan("timings", "ITimingCache.serialize")
    scene("other timings", lambda: TENSORRT.build(ONNX, TARGET, "fp32", FOLDER, lambda phase, fraction: None))
    tell("Builder.build_serialized_network", 0)
    scene("not built", lambda: TENSORRT.build(ONNX, TARGET, "fp32", FOLDER, lambda phase, fraction: None))


if __name__ == "__main__":
    for stand_in in (Device, Stream, Event, Buffer):
        setattr(cuda, stand_in.__name__, stand_in)
    cuda.require_gpu = lambda: cuda.Gpu("No GPU", "8.7", "13.0", 4096)
    cuda_graph.capture = capture
    tell_of_engine()
    play_session()
    play_refit()
    play_build()
    print(json.dumps(scenes))
