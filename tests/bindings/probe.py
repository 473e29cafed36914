"""Which virtual functions each member of the bindings calls: run with RELAY=record, it prints JSON.

    python -m tests.bindings.probe  ->  {"functions": {class: {member: [functions, class of the result or "-"]}},
                                         "numbers": {enumeration: {member: number}}}

"member=" stands for the setting of a property, "~" for the end of an object.

The numbers of a release are thus measured; joined by member, they say where a call of one release goes in another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from tests.bindings.recorder import answer, answer_unknown, functions_of, trt

ODD = ("gpu_allocator", "temporary_allocator", "device_memory")  # only to be set, so that reading them calls nothing
found: dict[str, dict[str, tuple[list[int], str]]] = {}


def call(thing: Any, member: str, *arguments: object, **named: object) -> None:
    """Call a method."""
    _note(thing, member, lambda: getattr(thing, member)(*arguments, **named))


def put(thing: Any, member: str, value: object) -> None:
    """Set a property."""
    _note(thing, f"{member}=", lambda: setattr(thing, member, value))


def read(thing: Any) -> None:
    """Get every property, and set it to what it is."""
    for member, entry in vars(type(thing)).items():
        if isinstance(entry, property) and member not in ODD:
            values: list[object] = []
            _note(thing, member, lambda member=member, values=values: values.append(getattr(thing, member)))  # type: ignore[misc]
            if entry.fset and values and values[0] is not None:
                put(thing, member, values[0])


def given(thing: Any, member: str, result: str, *arguments: object) -> Any:
    """What a method gives that makes an object of the class `result`."""
    kind = type(thing).__name__
    call(thing, member, *arguments)
    functions, _ = found[kind][member]
    found[kind][member] = functions, result
    answer(kind, functions[0], result=result)
    return getattr(thing, member)(*arguments)


def _note(thing: Any, member: str, called: Callable[[], object]) -> None:
    kind = type(thing).__name__
    if functions := functions_of(kind, called):
        found.setdefault(kind, {})[member] = functions, "-"


def probe_build(log: Any) -> None:
    """What a build calls."""
    builder = trt.Builder(log)
    network = given(builder, "create_network", "INetworkDefinition", 1)
    config = given(builder, "create_builder_config", "IBuilderConfig")
    profile = given(builder, "create_optimization_profile", "IOptimizationProfile")
    plan = given(builder, "build_serialized_network", "IHostMemory", network, config)
    _note(plan, "memoryview", lambda: memoryview(plan))
    call(profile, "set_shape", "x", (1,), (2,), (3,))
    read(given(network, "get_input", "ITensor", 0))
    given(network, "get_output", "ITensor", 0)
    for thing in (builder, network, plan, profile):
        read(thing)
    probe_config(config, profile)
    probe_parser(builder, network, log)


def probe_config(config: Any, profile: Any) -> None:
    """All that is set before a build."""
    cache = given(config, "create_timing_cache", "ITimingCache", b"")
    given(cache, "serialize", "IHostMemory")
    call(cache, "combine", cache, ignore_mismatch=False)
    call(config, "set_timing_cache", cache, ignore_mismatch=False)
    given(config, "get_timing_cache", "ITimingCache")
    call(config, "add_optimization_profile", profile)
    call(config, "set_memory_pool_limit", trt.MemoryPoolType.WORKSPACE, 1)
    for member in ("set_flag", "get_flag", "clear_flag"):
        call(config, member, trt.BuilderFlag.TF32)
    read(config)
    put(config, "progress_monitor", Monitor())
    if hasattr(trt, "ComputeCapability"):
        call(config, "set_compute_capability", trt.ComputeCapability.SM86, 0)


def probe_parser(builder: Any, network: Any, log: Any) -> None:
    """The parser, and what it says is wrong."""
    parser = trt.OnnxParser(network, log)
    call(parser, "parse", b"onnx")
    read(parser)
    _note(parser, "~", lambda: trt.OnnxParser(builder.create_network(1), log))  # its network keeps a parser alive
    error = given(parser, "get_error", "ParserError", 0)
    for member in ("code", "desc", "file", "line", "func", "node", "node_name", "node_operator"):
        call(error, member)


def probe_session(log: Any) -> None:
    """What a session calls, and what replaces weights."""
    runtime = trt.Runtime(log)
    engine = given(runtime, "deserialize_cuda_engine", "ICudaEngine", b"plan")
    context = given(engine, "create_execution_context", "IExecutionContext")
    inspector = given(engine, "create_engine_inspector", "EngineInspector")
    call(engine, "get_tensor_name", 0)
    for member in ("get_tensor_mode", "get_tensor_dtype", "get_tensor_shape"):
        call(engine, member, "x")
    given(engine, "serialize", "IHostMemory")
    config = given(engine, "create_serialization_config", "ISerializationConfig")
    call(config, "set_flag", trt.SerializationFlag.EXCLUDE_WEIGHTS)
    given(engine, "serialize_with_config", "IHostMemory", config)
    call(context, "set_tensor_address", "x", 16)
    call(context, "set_input_shape", "x", (1, 2))
    call(context, "execute_async_v3", 16)
    put(context, "profiler", trt.Profiler())
    put(inspector, "execution_context", context)
    answer_unknown("")  # a text, where the bindings do not take a null pointer
    call(inspector, "get_engine_information", trt.LayerInformationFormat.JSON)
    answer_unknown(0)
    refitter = trt.Refitter(engine, log)
    call(refitter, "refit_cuda_engine")
    call(refitter, "get_missing_weights")
    parser = trt.OnnxParserRefitter(refitter, log)
    call(parser, "refit_from_file", "model.onnx")
    read(parser)
    given(parser, "get_error", "ParserError", 0)
    _note(parser, "~", lambda: trt.OnnxParserRefitter(trt.Refitter(engine, log), log))
    for thing in (runtime, engine):
        read(thing)


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """To be set, and then let alone."""

    def __init__(self) -> None:
        super().__init__()


if __name__ == "__main__":
    logger = trt.Logger()
    probe_build(logger)
    probe_session(logger)
    enumerations = {name: entry.__members__ for name, entry in vars(trt).items() if hasattr(entry, "__members__")}
    numbers = {name: {member: int(value) for member, value in members.items()} for name, members in enumerations.items()}
    print(json.dumps({"functions": found, "numbers": numbers}), flush=True)
    os._exit(0)  # to take the made-up objects apart would prove nothing
