"""OpenVINO on a CPU: the backend that works everywhere.

The plan is OpenVINO's own IR, model.xml and model.bin, which `benchmark_app` opens and which any CPU compiles for itself
when the engine is opened. OpenVINO reads the Q/DQ graph into INT8 kernels; what stays in floating point runs in the
float type that is asked for here, never in one that OpenVINO chooses.
"""

from __future__ import annotations

import errno
import functools
import importlib
import math
import re
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.backends import Progress, refuse_newer
from vitedge.backends.layers import ACTIVATIONS, QDQ, Kind, Layer, Profile, operator
from vitedge.errors import EngineError, import_package
from vitedge.preprocess import fill_input, input_dtype, input_shape
from vitedge.specs import FloatType, Manifest, ModelCard, Peaks, PixelFormat, Target

PACKAGE, EXTRA = "openvino", "cpu"
PLAN = ("model.xml", "model.bin")
TYPED = False
PRECISION: dict[FloatType, str] = {"fp32": "f32", "bf16": "bf16"}
TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}  # their names for them, and ours
INTEGERS = ("i8", "u8", "i4", "u4")  # that weights are stored in where the graph quantizes them
CONVOLUTIONS = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData")
KINDS: dict[str, Kind] = {  # of layers that are what their type says, whatever they were made from
    "MatMul": "product",
    "Softmax": "softmax",
    "MVN": "norm",
    "Convert": "reformat",
    "Reorder": "reformat",
    "Reshape": "reformat",
    "Transpose": "reformat",
}
NO_KERNEL = ("undef", "unknown")  # what kernels are called of layers that were fused away, or move nothing
WARMUP = 3  # calls that allocate and fill caches, not counted
CALLS = 10  # that are counted, at least
# Rows and widths of the matrix products that peaks are measured on: with AMX, 256 x 384 reaches a fifth of what the largest
# does in INT8, a processor of smaller caches may do best in between, and beyond them products get slower again.
SIZES = ((256, 384), (256, 768), (1024, 1024))
CHAIN = 8  # of them in a row: one alone would bring its 8 or 16 bits in and its floats out, and be slower than in a model
CPUS = Path("/sys/devices/system/cpu")  # where Linux tells what caches they have
CACHE = ("type", "level", "shared_cpu_list", "size")  # of a cache, a file each
PRODUCTS_S, READS = 1.0, 4  # how long products take turns, and how often memory is read
_LOADING = threading.Lock()
READ_BYTES, READ_STEP = 2**28, 2**25  # in all, which few caches hold, and at a time


def version() -> str:
    """The release of the installed OpenVINO, e.g. "2026.4.1"."""
    return str(_openvino().__version__).split("-")[0]


def resolve(target: Target) -> Target:
    """The target itself: a CPU engine is compiled again wherever it is opened."""
    return target


def device(target: Target) -> str:
    """The processor's name."""
    return str(_core().get_property("CPU", "FULL_DEVICE_NAME"))


def driver() -> str:
    """None is needed."""
    return ""


def runs_here(target: Target) -> bool:
    """Every CPU will do."""
    return True


def float_types(target: Target) -> tuple[FloatType, ...]:
    """bf16 first where the processor has instructions for it."""
    native = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("bf16", "fp32") if "BF16" in native else ("fp32",)


def peaks(target: Target) -> Peaks | None:
    """The target's own, or what this processor reaches in large products and in reading memory: two seconds, once a process."""
    return target.peaks or _measured(target.threads, float_types(target))


def build(onnx: Path, target: Target, float_type: FloatType, folder: Path, progress: Progress) -> str:
    """Convert `onnx` to IR in `folder`; target and float type matter only when it is opened."""
    openvino = _openvino()
    try:
        model = _core().read_model(onnx)
    except (RuntimeError, UnicodeDecodeError) as error:  # which quotes the bytes of a damaged file
        raise EngineError(f"OpenVINO cannot build {onnx}: {_reason(error)}", hint="export the model again") from error
    try:
        openvino.save_model(model, folder / PLAN[0], compress_to_fp16=False)
    except RuntimeError as error:  # of a C++ stream, which does not say why; next to always the disk is full
        raise OSError(errno.ENOSPC, "OpenVINO cannot save its plan, is the disk full?") from error
    return ""


def check(manifest: Manifest) -> None:
    """Raise an EngineError where the plan is of a later release than the one installed."""
    refuse_newer(manifest, PACKAGE, version())


def open(folder: Path, card: ModelCard, target: Target, float_type: FloatType) -> OpenVinoSession:  # noqa: A001
    """Read the plan in `folder` and compile it for this processor."""
    try:
        return OpenVinoSession(Compiled(_core().read_model(folder / PLAN[0]), target, float_type), card, target)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot open {folder}: {_reason(error)}", hint="build the engine again") from error


def layers(folder: Path, card: ModelCard, target: Target, float_type: FloatType, rows: NDArray[Any], seconds: float) -> Profile:
    """Time every layer on `rows`, the input of one call, compiled as a session compiles it for that batch.

    Half of `seconds` goes to calls that are profiled, and a quarter before and behind them to others. OpenVINO counts in whole
    microseconds, so that of each layer half of one is lost on average, and calls a layer that takes less "not run".
    """
    openvino = _openvino()
    model = _core().read_model(folder / PLAN[0])
    rows = np.ascontiguousarray(rows)  # of which the requests keep no copy
    batch = len(rows) if len(rows) == target.batch[1] else None
    compiled = [_compile(model, target, float_type, batch, profiled) for profiled in (False, True)]
    plain, watched = (one.create_infer_request() for one in compiled)
    for request in (plain, watched):
        request.set_input_tensor(openvino.Tensor(rows, shared_memory=True))
        _calls(request, 0, WARMUP)
    before = _total_ms(watched, WARMUP)
    plain_ms = _calls(plain, seconds / 4, CALLS // 2)
    watched_ms = _calls(watched, seconds / 2, CALLS)
    plain_ms += _calls(plain, seconds / 4, CALLS // 2)
    times = np.maximum(_total_ms(watched, WARMUP + len(watched_ms)) - before, 0) / len(watched_ms)
    reports = watched.get_profiling_info()
    ran = {
        report.node_name: (report, float(ms))
        for report, ms in zip(reports, times, strict=True)
        if report.status == report.Status.EXECUTED or not report.exec_type.startswith(NO_KERNEL)
    }
    return Profile(
        layers=tuple(_Graph(model, compiled[1].get_runtime_model()).layers(ran)),
        profiled_ms=float(np.mean(watched_ms)),
        plain_ms=float(np.mean(plain_ms)),
        calls=len(watched_ms),
    )


def _calls(request: Any, seconds: float, least: int) -> list[float]:
    """The milliseconds of each call of so many seconds, and of so many calls at least."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < end:
        start = time.perf_counter_ns()
        request.infer()
        taken.append((time.perf_counter_ns() - start) / 1e6)
    return taken


def _total_ms(request: Any, calls: int) -> NDArray[np.float64]:
    """What each layer took in all calls of a request so far, float64[layers] in ms: OpenVINO reports the mean since the first."""
    return np.array([report.real_time.total_seconds() for report in request.get_profiling_info()]) * 1000 * calls


class _Graph:
    """Finds what each layer that runs was made from in the plan.

    OpenVINO names the last operations that went into a layer; the others that did are those before them which no layer names.
    """

    def __init__(self, plan: Any, runtime: Any) -> None:
        self._ops = {op.get_friendly_name(): op for op in plan.get_ordered_ops()}
        self._constant: dict[str, bool] = {}
        for name, op in self._ops.items():
            before = [_name(port) for port in op.input_values()]
            self._constant[name] = op.get_type_name() == "Constant" or (bool(before) and all(self._constant[b] for b in before))
        infos = {op.get_friendly_name(): {k: v.astype(str) for k, v in op.get_rt_info().items()} for op in runtime.get_ops()}
        self._infos = infos
        self._named = {name for info in infos.values() for name in info["originalLayersNames"].split(",")}

    def layers(self, ran: Mapping[str, tuple[Any, float]]) -> Iterable[Layer]:
        """The layers that ran, given what was reported of each and its time in milliseconds."""
        for name, (report, ms) in ran.items():
            info = self._infos.get(name, {})
            type_name = info.get("layerType", report.node_type)
            ops = self._made_from([name, *info.get("originalLayersNames", "").split(",")])
            weighted = [op for op in ops if self._is_weighted(op)]
            origins = tuple(dict.fromkeys(filter(None, map(self._onnx_name, ops))))
            kernel = report.exec_type.rpartition("_")[2]  # of a Linear with weights alone in INT8, runtimePrecision says i8
            precision = kernel if kernel in TYPES else info.get("runtimePrecision", "unknown")
            yield Layer(
                name=name,
                type=type_name,
                kind=_kind(type_name, [op.get_type_name() for op in ops], origins),
                precision=TYPES.get(precision, precision),
                ms=ms,
                origins=origins,
                linears=tuple(map(self._onnx_name, weighted)),
                quantized=bool(weighted) and all(self._weight_type(op) in INTEGERS for op in weighted),
            )

    def _made_from(self, names: Iterable[str]) -> list[Any]:
        """The operations of these names, and those before them that no layer names, in the order of the flow."""
        found = {name: self._ops[name] for name in names if name in self._ops}
        waiting = list(found.values())
        while waiting:
            for port in waiting.pop().input_values():
                name = _name(port)
                if name not in found and name not in self._named:
                    found[name] = self._ops[name]
                    waiting.append(found[name])
        return [op for name, op in self._ops.items() if name in found and op.get_type_name() != "Constant"]

    def _is_weighted(self, op: Any) -> bool:
        product = op.get_type_name() == "MatMul" or op.get_type_name() in CONVOLUTIONS
        return product and self._constant[_name(op.input_value(1))]

    def _weight_type(self, op: Any) -> str:
        """The type that the weight of a Linear or convolution is stored in."""
        source = op.input_value(1).get_node()
        while source.get_type_name() != "Constant":
            source = source.input_value(0).get_node()
        return str(source.get_output_element_type(0).get_type_name())

    def _onnx_name(self, op: Any) -> str:
        """The ONNX node that an operation belongs to: of several made from one node, only the last has its name."""
        while re.fullmatch(rf"{op.get_type_name()}_\d+", op.get_friendly_name()):
            readers = [port.get_node() for output in op.outputs() for port in output.get_target_inputs()]
            if not readers:
                return ""
            op = readers[0]
        return "" if op.get_type_name() == "Result" else str(op.get_friendly_name().removesuffix("/WithoutBiases"))


def _name(port: Any) -> str:
    return str(port.get_node().get_friendly_name())


def _kind(layer: str, operations: list[str], origins: tuple[str, ...]) -> Kind:
    """What a layer of this type does, made from operations of these types and from these ONNX nodes."""
    if layer == "FullyConnected":
        return "linear"
    if layer in ("Convolution", "Deconvolution"):
        return "convolution"
    if layer == "ScaledDotProductAttention" or {"MatMul", "Softmax"} <= set(operations):
        return "attention"
    operators = {operator(node) for node in origins} - set(QDQ)
    if (layer == "FakeQuantize" and not origins) or (origins and not operators):
        return "quantize"
    if operators == {"LayerNormalization"}:
        return "norm"
    if layer in KINDS:
        return KINDS[layer]
    return "activation" if operators and operators <= set(ACTIVATIONS) else "other"


class Compiled:
    """A plan compiled for this processor, for all sessions of it.

    Static shapes are faster, so the target's three batches get a compilation each, and all others share a dynamic one.
    The best is compiled at once, the others when they are first asked for. streams: how many requests run at a time.
    """

    def __init__(self, model: Any, target: Target, float_type: FloatType) -> None:
        self._model, self._target, self._float_type = model, target, float_type
        self._compiled: dict[int | None, Any] = {}
        self._turn = threading.Lock()  # sessions in several threads may ask for the same one at once
        self.streams = int(self._for_batch(target.batch[1]).get_property("NUM_STREAMS"))

    def request(self, count: int) -> Any:
        """A new inference request for a batch of `count`."""
        return self._for_batch(count if count in self._target.batch else None).create_infer_request()

    def _for_batch(self, batch: int | None) -> Any:
        with self._turn:
            if batch not in self._compiled:
                self._compiled[batch] = _compile(self._model, self._target, self._float_type, batch)
            return self._compiled[batch]


class OpenVinoSession:
    """An input buffer, and a request for each batch size that reads its first rows where they lie."""

    def __init__(self, compiled: Compiled, card: ModelCard, target: Target) -> None:
        self.input: NDArray[Any] = np.zeros((target.batch[2], *input_shape(card)), input_dtype(card))
        self._compiled: Compiled | None = compiled
        self._card, self._target = card, target
        self.streams = compiled.streams
        self._requests: dict[int, Any] = {}
        self._request(target.batch[1])

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        """Preprocess a picture into a row of `input`."""
        fill_input(picture, self._card, self.input[row], pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        """The first output for the first `count` rows, float32[count, ...]; valid until the next run."""
        request = self._requests.get(count) or self._request(count)
        request.infer()
        result: NDArray[np.float32] = request.get_output_tensor(0).data
        return result

    def fork(self) -> OpenVinoSession:
        """Another session of the same compiled plan, with an input buffer of its own."""
        if self._compiled is None:
            raise EngineError("the session is closed")
        return OpenVinoSession(self._compiled, self._card, self._target)

    def close(self) -> None:
        """Drop the requests, and with the last session the compiled models."""
        self._requests.clear()
        self._compiled = None

    def _request(self, count: int) -> Any:
        if self._compiled is None:
            raise EngineError("the session is closed")
        request = self._compiled.request(count)
        request.set_input_tensor(_openvino().Tensor(self.input[:count], shared_memory=True))
        self._requests[count] = request
        return request


@functools.cache
def _measured(threads: int | None, natives: tuple[FloatType, ...]) -> Peaks:
    """The best that one core reached in products of any size, times the cores, and the best of several reads.

    Products are short and take turns, so that on a busy machine, too, some of them run undisturbed. Cores that are all busy
    may clock lower than one alone: a peak may be too high, which is no harm to a bound.
    """
    plans: dict[str, tuple[int, FloatType]] = {"int8": (CHAIN, "fp32")}
    plans |= {native: (1 if native == "fp32" else CHAIN, native) for native in natives}
    requests = {
        (kind, size): _products(*plan, size, int8=kind == "int8", threads=1).create_infer_request()
        for kind, plan in plans.items()
        for size in SIZES
    }
    best, end = dict.fromkeys(plans, 0.0), time.perf_counter() + PRODUCTS_S
    while time.perf_counter() < end:
        for (kind, (rows, width)), request in requests.items():
            begun = time.perf_counter()
            request.infer()
            tops = 2e-12 * rows * width**2 * plans[kind][0] / (time.perf_counter() - begun)
            best[kind] = max(best[kind], tops)
    cores = threads or int(_products(1, "fp32", SIZES[0], int8=False, threads=None).get_property("INFERENCE_NUM_THREADS"))
    all_cores = {kind: tops * cores for kind, tops in best.items()}
    return Peaks(all_cores, _bandwidth_gb_s(cores), "measured on this machine", _cache_mib())


def _products(count: int, float_type: FloatType, size: tuple[int, int], *, int8: bool, threads: int | None) -> Any:
    """A compiled chain of matrix products [rows, width] x [width, width], in INT8 in the form that a Q/DQ graph gives them."""
    ops = importlib.import_module("openvino.opset13")
    low, high, step = (ops.constant(np.float32(value)) for value in (-1.28, 1.27, 0.01))
    entry = last = ops.parameter(size, np.float32)
    weight = ops.constant(np.ones((size[1], size[1]), np.int8 if int8 else np.float32))
    weight = ops.multiply(ops.convert(weight, "f32"), step) if int8 else weight
    for _ in range(count):
        last = ops.fake_quantize(last, low, high, low, high, 256) if int8 else last
        last = ops.matmul(last, weight, False, False)
    model = _openvino().Model([ops.reduce_max(last, ops.constant(np.array([0, 1])))], [entry])
    return _core().compile_model(model, "CPU", _config(float_type, threads))


def _bandwidth_gb_s(threads: int) -> float:
    """1e9 bytes a second that all threads together read from memory, in the best of many short reads."""
    memory = np.ones((READ_BYTES // READ_STEP, threads, READ_STEP // 4 // threads), np.float32)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for step in (step for _ in range(READS) for step in memory):  # until its turn comes again, no cache has it any more
            begun = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), step))
            best = min(best, time.perf_counter() - begun)
    return float(memory[0].nbytes / best / 1e9)


def _cache_mib() -> float:
    """What all caches for data hold together, as some keep what others have not; 0 where the system does not tell."""
    sizes: dict[tuple[str, ...], int] = {}
    for folder in CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            kind, level, cpus, size = ((folder / name).read_text().strip() for name in CACHE)
        except OSError:  # a virtual machine may tell a part
            continue
        if kind != "Instruction" and re.fullmatch(r"\d+K", size):
            sizes[level, cpus] = int(size[:-1])  # once for each, whichever of its CPUs tells of it
    return sum(sizes.values()) / 1024


def _compile(model: Any, target: Target, float_type: FloatType, batch: int | None, profiled: bool = False) -> Any:
    """Compile for a fixed batch, or for all batches of the target where `batch` is None; `profiled` to time each layer."""
    openvino = _openvino()
    model = model.clone()
    shape = model.inputs[0].partial_shape
    shape[0] = openvino.Dimension(target.batch[0], target.batch[2]) if batch is None else batch
    model.reshape(shape)
    config = {**_config(float_type, target.threads, target.streams), "PERF_COUNT": "YES" if profiled else "NO"}
    return _core().compile_model(model, "CPU", config)


def _config(float_type: FloatType, threads: int | None, streams: int = 1) -> dict[str, str]:
    """What OpenVINO is asked for; of several streams, each computes on its share of the cores."""
    config = {"PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT", "INFERENCE_PRECISION_HINT": PRECISION[float_type]}
    return (
        config
        | ({"NUM_STREAMS": str(streams)} if streams > 1 else {})
        | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})
    )


def _reason(error: Exception) -> str:
    """The line of OpenVINO's message that says something: the others are source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check ", "["))]
    return (telling or lines or [type(error).__name__])[-1]


def _core() -> Any:
    """The one Core of this process, whichever thread asks first.

    With AMX, its CPU plugin gives the thread that loads it a stack for signals, and takes that away when the plugin goes; with
    two of them, gone in another order than they came, the next signal, Ctrl-C say, would be a segmentation fault.
    """
    with _LOADING:
        return _cached_core()


@functools.cache
def _cached_core() -> Any:
    return _openvino().Core()


def _openvino() -> Any:
    return import_package(PACKAGE, EXTRA)
