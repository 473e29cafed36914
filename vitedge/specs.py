"""The nouns of vitedge: frozen dataclasses that every stage takes and gives, to and from plain dicts.

They hold values and no behaviour beyond checking themselves, and know no other module but the errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import types
import typing
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vitedge.errors import VitEdgeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

Task = Literal["classify", "embed", "dense"]
Resize = Literal["crop", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
Method = Literal["max", "percentile", "mse", "entropy", "auto", "none"]
SmoothingMethod = Literal["auto", "fixed", "none"]
Rounding = Literal["gptq", "nearest"]
FloatType = Literal["fp32", "fp16", "bf16"]
ComputeType = Literal["int8", "fp16", "bf16", "fp32"]
PixelFormat = Literal["rgb", "bgr", "grey", "yuyv", "nv12"]
Hardware = Literal["this", "same-capability", "ampere-plus"]

COMPUTE_TYPES = typing.get_args(ComputeType)
WEIGHT_BITS = {"int4": 4, "int8": 8, "fp16": 16, "bf16": 16, "fp32": 32}  # that one number is stored in
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")  # ONNX operators that multiply matrices
MOVING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # those that move elements and change none
FLOAT = "fp32"  # the variant that no recipe has touched
MAX_BATCH = 4096  # that exported graphs are declared for
MERGE = ".merge"  # how the module in the name of an ONNX node ends that merges tokens
MAX_MERGED = 256  # tokens of a block: so far, BF16 counts exactly
MAX_STREAMS = 64
MAX_THREADS = 1024
MAX_WORKSPACE_MIB = 2**24  # no GPU has a thousandth of that, and bytes are counted in 64 bits
MAX_NAME = 100  # letters: a file system takes 255, and names get a variant, a hash and a suffix beside them
MAX_COUNT = 2**63  # of work
LEAST_PEAK, LARGEST_PEAK = 1e-6, 1e9  # TOPS or GB/s of whatever computes
LARGEST = 1e30  # of a range, scale or shift: float32 multiplies it without overflow, and no healthy model comes near
TOLERANCE = 1e-4  # how far an exported model may lie from torch, as a part of its output's range


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a model wants its images prepared, as it was trained.

    The image is resized with antialiasing, its shorter side ("crop") or both sides ("squash") to `size / crop_pct`
    pixels, and its center cut to `size`; pixels are then taken as (value / 255 - mean) / std.

    size: (height, width) in pixels. channels: 3 for RGB, 1 for grey. mean, std: one value a channel, on the 0..1 scale.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "crop"
    crop_pct: float = 1.0
    interpolation: Interpolation = "bicubic"
    channels: int = 3

    def __post_init__(self) -> None:
        _require_choices(self)
        for name, kind in (("size", int), ("mean", float), ("std", float)):  # of numpy or torch, too: JSON wants plain ones
            object.__setattr__(self, name, tuple(kind(value) for value in getattr(self, name)))
        _require(len(self.size) == 2 and min(self.size) > 0, f"size must be (height, width) in pixels, not {self.size}")
        _require(self.channels in (1, 3), f"channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        _require(len(self.mean) == len(self.std) == self.channels, f"mean and std need {self.channels} values each")
        _require(
            all(math.isfinite(v) for v in self.mean) and all(0 < v < math.inf for v in self.std),
            f"mean must be finite and std positive, not {self.mean} and {self.std}",
        )
        _require(0 < self.crop_pct <= 1, f"crop_pct must be in (0, 1], not {self.crop_pct}")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape (None = dynamic) and numpy dtype name of an engine's input or output."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model is and how it is fed; travels in the ONNX metadata and in every engine's manifest.

    patch: side of the square patch where the input is int8 patches, None where it is a uint8 image.
    inputs, outputs: filled in by export. merged: how many tokens each block merges; () where none does.
    """

    name: str
    task: Task
    preprocess: Preprocess
    patch: int | None = None
    labels: tuple[str, ...] = ()
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    merged: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_name(self.name)
        _require_choices(self)
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        lone = [label for label in self.labels if any("\ud800" <= letter <= "\udfff" for letter in label)]
        _require(not lone, f"a label must be text that UTF-8 can hold, which {lone[:1]} is not")


@dataclass(frozen=True, slots=True)
class Reduction:
    """What is changed of a model so that it computes less, besides the types that it computes in.

    size: (height, width) of its images in pixels, None for its own. merge_tokens: how many tokens each block merges; of several
    numbers, one for each block, beginning again after the last.
    """

    size: tuple[int, int] | None = None
    merge_tokens: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        counts = self.merge_tokens
        if isinstance(counts, tuple) and len(set(counts)) == 1:
            object.__setattr__(self, "merge_tokens", counts[0])
        elif isinstance(counts, tuple) and not counts:
            object.__setattr__(self, "merge_tokens", 0)
        stray = [each for each in (counts if isinstance(counts, tuple) else (counts,)) if not 0 <= each <= MAX_MERGED]
        _require(not stray, f"a block merges 0 to {MAX_MERGED} tokens, not {stray[:1]}")
        _require(self.size is None or min(self.size) > 0, f"size must be (height, width) in pixels, not {self.size}")

    def __bool__(self) -> bool:
        return bool(self.size or self.merge_tokens)

    @property
    def suffix(self) -> str:
        """What the names of variants get: ".192", ".192x256", ".merge8", ".merge0+0+24", ".merge0x3+60+0x8"."""
        size, counts = self.size, self.merge_tokens
        shown = f".{size[0]}" + (f"x{size[1]}" if size[0] != size[1] else "") if size else ""
        if not counts:
            return shown
        each = counts if isinstance(counts, tuple) else (counts,)
        runs = [(count, len(list(alike))) for count, alike in itertools.groupby(each)]
        told = "+".join(f"{count}x{length}" if length > 2 else "+".join([str(count)] * length) for count, length in runs)
        if len(told) > MAX_NAME // 2:  # a name has more parts than this one
            told = f"{sum(each)}.{zlib.crc32(told.encode()):08x}"
        return f"{shown}.merge{told}"


def reduction_of(variant: str) -> str:
    """What the name of a variant says of a `Reduction`: its suffix, "" where there is none."""
    return variant.removeprefix(FLOAT) if variant.startswith(f"{FLOAT}.") else ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantized. The defaults are the `int8` recipe; calibration/README.md explains each key.

    method: how the range of an activation is chosen; "none" quantizes nothing. percentile: of |x|, used by that method alone.
    smoothing: how the part of the spread between channels that moves from activations into weights is chosen: the `exponent`
    of 0..1 that is given ("fixed"), or one for every tensor by the error of its Linears' outputs ("auto").
    shift: also move the middle of each channel's range to 0.
    rounding: of weights; "gptq" makes up for the error of each in those not yet rounded. bias_correction: take the mean error of
    every Linear out of its bias. attention: quantize the two products of self-attention as well.
    int4: shell patterns of Linear names whose weights get 4 bits. skip: patterns of those left in floating point.
    min_sqnr_db: as many more stay in floating point, the costliest first, as the outputs need for this SQNR; 0 for no bound.
    float_type: what everything not quantized computes in; "auto" is what the device is fastest in: fp16 on a GPU, bf16 (FP32's
    range, 8 bits of precision) on a processor that has it natively, else fp32.
    images: how many calibration images are read (at most). min_images: fewer than these is an error.
    """

    name: str = "int8"
    method: Method = "max"
    percentile: float = 99.99
    per_channel: bool = True
    smoothing: SmoothingMethod = "auto"
    exponent: float = 0.7
    shift: bool = True
    rounding: Rounding = "gptq"
    bias_correction: bool = True
    attention: bool = False
    int4: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    min_sqnr_db: float = 0.0
    float_type: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    images: int = 128
    min_images: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require_name(self.name)
        _require(self.name != FLOAT, "a recipe cannot be called fp32, which is the name of the float model")
        _require_choices(self)
        _require(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        _require(0 < self.percentile <= 100, f"percentile must be in (0, 100], not {self.percentile}")
        _require(0 <= self.exponent <= 1, f"exponent must be in 0..1, not {self.exponent}")
        _require(0 <= self.min_sqnr_db < math.inf, f"min_sqnr_db must be a number of dB from 0 on, not {self.min_sqnr_db}")
        _require(0 < self.min_images <= self.images, f"min_images ({self.min_images}) must be in 1..images ({self.images})")


@dataclass(frozen=True, slots=True)
class Smoothing:
    """How the channels of an activation are made alike before it is quantized: (x - shift) / scale, one of each a channel."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(len(self.scale) == len(self.shift), f"{len(self.scale)} scales, but {len(self.shift)} shifts")
        _require(all(1 / LARGEST <= s <= LARGEST for s in self.scale), "a smoothing scale must be a positive number of float32")
        _require(all(abs(s) <= LARGEST for s in self.shift), "a smoothing shift must be a finite number of float32")


@dataclass(frozen=True, slots=True)
class ScaleTable:
    """What calibration found: tensor name -> amax, the largest magnitude that INT8 will represent (scale = amax / 127).

    smoothing: tensors of the float model that are smoothed first; the result is called NAME.smooth, and amax holds its range.
    """

    recipe: Recipe
    model_sha256: str
    images_sha256: str
    images: int
    amax: dict[str, float]
    smoothing: dict[str, Smoothing] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, amax in self.amax.items():
            _require(0 <= amax <= LARGEST, f"the range of {name!r} must be a finite number from 0 on, not {amax}")


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a device can do at most: dense TOPS (1e12 operations a second, a multiply-add is two) by type, and GB/s of memory.

    tops: of "int8", "fp16", "bf16", "fp32"; a type that is absent is unknown. cache_mib: of its largest cache, in which
    weights may stay from batch to batch; 0 where that is not to be counted on. source: where the figures come from.
    """

    tops: dict[str, float]
    bandwidth_gb_s: float
    source: str = ""
    cache_mib: float = 0.0

    def __post_init__(self) -> None:
        stray = ", ".join(map(str, self.tops.keys() - set(COMPUTE_TYPES)))
        _require(not stray, f"peaks.tops are of {', '.join(COMPUTE_TYPES)}, not of {stray}")
        figures = (*self.tops.values(), self.bandwidth_gb_s)
        fit = all(LEAST_PEAK <= figure <= LARGEST_PEAK for figure in figures)
        _require(fit, f"peaks must be positive numbers, in TOPS and GB/s, from {LEAST_PEAK:g} to {LARGEST_PEAK:g}, not {figures}")
        _require(0 <= self.cache_mib < math.inf, f"peaks.cache_mib must be a number from 0 on, not {self.cache_mib}")


@dataclass(frozen=True, slots=True)
class Work:
    """What a graph asks of a device at least: its matrix products, and the weights that they read.

    macs: multiply-adds for one image, by the type that they compute in. weights: how many numbers are stored, by the type
    that they are stored in, which says how many bytes are read once a batch.
    """

    macs: dict[str, int]
    weights: dict[str, int]

    def __post_init__(self) -> None:
        _require(self.macs.keys() <= set(COMPUTE_TYPES), f"macs are of {', '.join(COMPUTE_TYPES)}, not {self.macs}")
        _require(self.weights.keys() <= WEIGHT_BITS.keys(), f"weights are of {', '.join(WEIGHT_BITS)}, not {self.weights}")
        counts = (*self.macs.values(), *self.weights.values())
        _require(all(0 <= count < MAX_COUNT for count in counts), f"work is counted from 0 on, below 2**63, not {counts}")

    @property
    def weight_bytes(self) -> int:
        """All weights together, in bytes."""
        return math.ceil(sum(count * WEIGHT_BITS[kind] for kind, count in self.weights.items()) / 8)

    def floats_in(self, float_type: FloatType) -> Work:
        """The same work where all that is in a float type computes and is stored in `float_type`."""
        return Work(_retyped(self.macs, float_type), _retyped(self.weights, float_type))


@dataclass(frozen=True, slots=True)
class Target:
    """What to build for: a backend, its batch profile (min, opt, max) and how hard to try. No precision: the graph has that.

    backend: a key of `vitedge.backends.BACKENDS`, which `load_backend` checks. threads: of a CPU backend; None = all cores.
    streams: how many batches run at once, each on its share of the device: more images a second, each of them later; 0 = as many
    as the backend finds best. It can be chosen again when the engine is opened.
    The rest is for GPUs. capability: the compute capability that is built for, e.g. "8.7"; None = that of the GPU which is here.
    workspace_mib: scratch memory that the builder may plan with; None = all there is. optimization_level: 0 to 5, how long
    the builder looks for fast kernels. hardware: which other GPUs may run the engine. version_compatible: whether later
    releases of the backend may. refit: whether the weights can be replaced later. peaks: for the roofline; decides nothing.
    """

    name: str = "cpu"
    backend: str = "openvino"
    batch: tuple[int, int, int] = (1, 1, 16)
    threads: int | None = None
    streams: int = 1
    capability: str | None = None
    workspace_mib: int | None = None
    optimization_level: int = 3
    hardware: Hardware = "this"
    version_compatible: bool = False
    refit: bool = False
    peaks: Peaks | None = None

    def __post_init__(self) -> None:
        require_name(self.name)
        _require_choices(self)
        low, best, high = self.batch
        _require(1 <= low <= best <= high, f"batch must be (min, opt, max) with 1 <= min <= opt <= max, not {self.batch}")
        _require(high <= MAX_BATCH, f"batch must be at most {MAX_BATCH}, not {high}")
        _require(
            self.threads is None or 0 < self.threads <= MAX_THREADS, f"threads must be 1 to {MAX_THREADS}, not {self.threads}"
        )
        _require(0 <= self.streams <= MAX_STREAMS, f"streams must be 0 to {MAX_STREAMS}, not {self.streams}")
        numbered = self.capability is None or re.fullmatch(r"\d+\.\d", self.capability)
        _require(bool(numbered), f'capability must be MAJOR.MINOR in quotes, such as "8.7", not {self.capability!r}')
        _require(
            self.workspace_mib is None or 0 < self.workspace_mib <= MAX_WORKSPACE_MIB,
            f"workspace_mib must be 1 to {MAX_WORKSPACE_MIB}, not {self.workspace_mib}",
        )
        _require(0 <= self.optimization_level <= 5, f"optimization_level must be 0 to 5, not {self.optimization_level}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an engine directory holds and where it was made. sha256 in hex; built_at in ISO 8601, UTC.

    target: as it was resolved for the device at hand. float_type: what the layers that are not INT8 compute in, likewise.
    platform: operating system and processor, e.g. "Linux aarch64". driver: the CUDA version of the driver there, "" without one.
    work: what the graph asks for, in its own types; None where that was not counted.
    """

    card: ModelCard
    variant: str
    recipe: Recipe | None
    target: Target
    float_type: FloatType
    onnx_sha256: str
    plan_sha256: str
    backend: str
    backend_version: str
    device: str
    built_at: str
    platform: str = ""
    driver: str = ""
    work: Work | None = None

    def __post_init__(self) -> None:
        require_name(self.variant)


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture, its index in the source and its capture time (perf_counter_ns).

    image: uint8[H, W, 3] RGB; of another format, as vitedge.pixels lays it out. name: the file it was in, source: where it
    comes from, as the user called it.
    """

    image: NDArray[np.uint8]
    index: int
    captured_ns: int
    name: str = ""
    pixels: PixelFormat = "rgb"
    source: str = ""


STAGES = ("capture", "queue", "preprocess", "infer", "postprocess")  # of a Timing, in the order in which a frame meets them


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds spent on one frame, stage by stage.

    capture_ms: its age when it was handed over. queue_ms: it waited for its turn and for its batch, without a queue 0.
    """

    capture_ms: float
    preprocess_ms: float
    infer_ms: float
    postprocess_ms: float
    queue_ms: float = 0.0

    @property
    def stages_ms(self) -> tuple[float, ...]:
        """What each of STAGES took, in milliseconds."""
        return self.capture_ms, self.queue_ms, self.preprocess_ms, self.infer_ms, self.postprocess_ms

    @property
    def total_ms(self) -> float:
        """All stages together, in milliseconds."""
        return sum(self.stages_ms)


@dataclass(frozen=True, slots=True)
class Prediction:
    """An engine's answer for one frame.

    top: (label, probability), best first, of a classifier; empty for other tasks.
    array: the model's raw output for this frame, float32 without the batch axis.
    """

    top: tuple[tuple[str, float], ...]
    array: NDArray[np.float32]
    timing: Timing


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of the bench table. Times in milliseconds a batch; top1, top5, agreement in percent; None = not measured.

    agreement and sqnr_db compare with the first engine given, the reference. bound_ms: no engine of this graph is faster on
    this device (see bench/roofline.py). sustained_per_s: images a second from disk to answer, with all stages overlapped and
    as many streams as the backend finds best (see bench/throughput.py); of an engine, not of a batch.
    """

    model: str
    variant: str
    backend: str
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    size_mib: float
    images: int
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    bound_ms: float | None = None
    sustained_per_s: float | None = None


def to_dict(spec: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and scalars, ready for JSON."""
    return {field.name: _plain(getattr(spec, field.name)) for field in dataclasses.fields(spec)}


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """The dataclass `cls` from plain data; an unknown, missing or wrongly typed key is a VitEdgeError that names it."""
    if not isinstance(data, dict):
        raise VitEdgeError(f"{cls.__name__}: expected a table of keys, not {data!r}")
    hints = typing.get_type_hints(cls)
    for key in data.keys() - hints.keys():
        near = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
        raise VitEdgeError(f"{cls.__name__} has no key {key!r}", hint=hint)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise VitEdgeError(f"{cls.__name__} needs the key {field.name!r}")
    return cls(**{key: _typed(hints[key], value, f"{cls.__name__}.{key}") for key, value in data.items()})


def _retyped(counts: dict[str, int], float_type: str) -> dict[str, int]:
    """`counts` by type, all float types among them added up under `float_type`."""
    result: dict[str, int] = {}
    for kind, count in counts.items():
        kept = kind if kind.startswith("int") else float_type
        result[kept] = result.get(kept, 0) + count
    return result


def _require_choices(spec: Any) -> None:
    """Every field that is one of a few words must be one of them, also where the spec was not read from a file."""
    for key, hint in typing.get_type_hints(type(spec)).items():
        if typing.get_origin(hint) is Literal:
            _typed(hint, getattr(spec, key), f"{type(spec).__name__}.{key}")


def require_name(name: str) -> None:
    """Refuse what is no name of a model, variant, recipe or target: names become parts of paths."""
    _require(len(name) <= MAX_NAME, f"a name has at most {MAX_NAME} letters, and {name[:20]!r}... has {len(name)}")
    fits = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name)
    _require(bool(fits), f"a name is made of letters, digits and _ . + -, which {name!r} is not")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise VitEdgeError(message)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value`, as JSON or TOML gave it, as the type that `hint` asks for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value)
    if origin is Literal:
        _require(value in arguments, f"{where} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _typed(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), f"{where} must be a list, not {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_typed(arguments[0], v, where) for v in value)
        _require(len(value) == len(arguments), f"{where} needs {len(arguments)} values, not {value!r}")
        return tuple(_typed(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is dict:
        _require(isinstance(value, dict), f"{where} must be a table of keys, not {value!r}")
        return {k: _typed(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        _require(abs(value) < 2**1024, f"{where} is too large a number")
        return float(value)
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    quotes = f': put it in quotes, "{value}"' if hint is str and isinstance(value, (int, float)) else ""
    _require(fits, f"{where} must be {hint.__name__}, not {value!r}{quotes}")
    return value
