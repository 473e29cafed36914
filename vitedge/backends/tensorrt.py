"""TensorRT 10.3 to 11.x and TensorRT-RTX: an ONNX file of explicit types in, a plan for one GPU architecture out.

    model.onnx -> parser -> strongly typed network -> builder -> model.engine -> TensorRtSession

Precision is the graph's alone: Q/DQ nodes and float types. No builder flag adds or takes any; TF32, which would round FP32
products to 10 bits, is switched off. One code path serves every release; where they differ is in `Release`, and nowhere else.
8.6, which has no strongly typed networks, is held to the graph's types as far as it can be.
TensorRT builds for the GPU in front of it; TensorRT-RTX also for one that is not here. Knows nothing of images or labels.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vitedge.backends import Progress, cuda, this_platform
from vitedge.backends.inspector import measure
from vitedge.backends.layers import Profile
from vitedge.backends.tensorrt_log import failure, hint_for, interruptible, make_log, make_monitor, sentence
from vitedge.backends.tensorrt_session import TensorRtSession, deserialize
from vitedge.errors import AbsentDeviceError, BuildError, EngineError, MissingPackageError, VitEdgeError, import_package
from vitedge.specs import FloatType, Manifest, ModelCard, Peaks, Target
from vitedge.workspace import cache_folder, write_file

MIB = 2**20
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # that TensorRT-RTX builds for where there is no such GPU


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """What differs between the releases: everything else in this file holds for all of them."""

    trt: Any

    def creation_flags(self) -> int:
        """Of a strongly typed network; 8.6 has none, and 11 has no other."""
        flags = self.trt.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED if hasattr(flags, "STRONGLY_TYPED") else flags.EXPLICIT_BATCH)

    def set_types(self, config: Any, network: Any, float_type: FloatType) -> None:
        """Let 8.6, whose networks are not strongly typed, compute in the types of the graph and in none below.

        A flag allows each type that the graph has, and layers that an FP16 graph keeps in FP32 are held to it. Others may
        compute in FP32 where that is faster.
        """
        if hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            return
        if float_type == "bf16":
            hint = 'a later release does; set float_type = "fp16" in the recipe'
            raise EngineError(f"TensorRT {self.trt.__version__} does not compute in bf16", hint=hint)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        kinds = self.trt.LayerType
        flags = self.trt.BuilderFlag
        if any(layer.type in (kinds.QUANTIZE, kinds.DEQUANTIZE) for layer in layers):
            config.set_flag(flags.INT8)
        if float_type == "fp16":
            config.set_flag(flags.FP16)
            config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
            self._hold(layers)

    def _hold(self, layers: Sequence[Any]) -> None:
        """Hold layers that give FP32 to it, and what they compute in, unless they read what is dequantized: those are INT8."""
        kinds = self.trt.LayerType
        wide = self.trt.DataType.FLOAT
        dequantized = {layer.get_output(0).name for layer in layers if layer.type == kinds.DEQUANTIZE}
        for layer in layers:
            outputs = range(layer.num_outputs)
            typed = layer.type in (kinds.CONSTANT, kinds.CAST, kinds.QUANTIZE, kinds.DEQUANTIZE)  # by what it is
            if typed or any(layer.get_output(index).dtype != wide for index in outputs):
                continue
            entries = [layer.get_input(index) for index in range(layer.num_inputs)]
            if not dequantized.intersection(entry.name for entry in entries if entry is not None):
                layer.precision = wide
            for index in outputs:
                layer.set_output_type(index, wide)

    def set_hardware(self, config: Any, target: Target) -> None:
        """Let other GPUs run the plan. The level for those of one capability came with 10.9; TensorRT-RTX goes by capability."""
        levels = self.trt.HardwareCompatibilityLevel
        if self.is_rtx:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self.capabilities[str(target.capability)], 0)
        elif target.hardware == "ampere-plus":
            config.hardware_compatibility_level = levels.AMPERE_PLUS
        elif target.hardware == "same-capability":
            if not hasattr(levels, "SAME_COMPUTE_CAPABILITY"):
                raise EngineError(
                    f'TensorRT {self.trt.__version__} does not know hardware = "same-capability"', hint="it came with 10.9"
                )
            config.hardware_compatibility_level = levels.SAME_COMPUTE_CAPABILITY

    def set_monitor(self, config: Any, progress: Progress) -> Any:
        """The monitor that tells `progress`, which must live as long as the build; None in 8.6."""
        if not hasattr(self.trt, "IProgressMonitor"):
            return None
        config.progress_monitor = monitor = make_monitor(self.trt, progress)
        return monitor

    def keeps_refit(self) -> bool:
        """Whether a plan that is written again still lets its weights be replaced: not in 10.3 to 10.13."""
        if not hasattr(self.trt, "SerializationFlag"):
            return False
        return hasattr(self.trt.SerializationFlag, "INCLUDE_REFIT")

    def serialized(self, plan: Any) -> Any:
        """The bytes of a plan, with all that replacing its weights takes where the release has that; not in 8.6."""
        if not hasattr(self.trt.SerializationFlag, "INCLUDE_REFIT"):
            return plan.serialize()
        serialization = plan.create_serialization_config()
        serialization.set_flag(self.trt.SerializationFlag.INCLUDE_REFIT)
        return plan.serialize_with_config(serialization)

    def where(self, error: Any) -> str:
        """The node that a ParserError is about: its name and operator, or in 8.6 its number."""
        if hasattr(error, "node_name"):
            return f"the node {error.node_name()!r} ({error.node_operator()})"
        return f"node {error.node()}"

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which builds for GPUs that need not be here."""
        return hasattr(self.trt, "ComputeCapability")

    @property
    def capabilities(self) -> dict[str, Any]:
        """What TensorRT-RTX can build for: "8.6" -> ComputeCapability.SM86."""
        members = self.trt.ComputeCapability.__members__
        return {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if re.fullmatch(r"SM\d+", name)}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRT:
    """A backend (see `vitedge.backends`): TensorRT itself, or TensorRT-RTX, which has the same API under another name.

    modules: the names its Python module may have. anywhere: whether it builds for GPUs that are not here.
    """

    PACKAGE: str
    EXTRA: str
    modules: tuple[str, ...]
    anywhere: bool
    PLAN: tuple[str, ...] = ("model.engine",)
    TYPED: bool = True

    def version(self) -> str:
        """The installed release, e.g. "10.16.1.11"."""
        return str(self._trt().__version__)

    def resolve(self, target: Target) -> Target:
        """The target with the capability of the GPU here, if it names none; EngineError where it cannot be built for."""
        gpu = cuda.find_gpu()
        capability = target.capability or (gpu.capability if gpu else None)
        blind = gpu is None and _is_pycuda_missing()
        if blind and (capability is None or (self.anywhere and target.refit)):
            raise MissingPackageError("pycuda", cuda.EXTRA)
        if capability is None:
            raise EngineError(
                "there is no NVIDIA GPU here to build for", hint="name a target for a certain GPU, such as orin-nano"
            )
        resolved = dataclasses.replace(target, capability=capability)
        if self.anywhere:
            if target.hardware != "this":
                what = f'TensorRT-RTX builds for one compute capability, and does not know hardware = "{target.hardware}"'
                raise EngineError(what, hint='set hardware = "this": every GPU of that capability runs the engine')
            if target.version_compatible:
                what = "TensorRT-RTX builds no engines for later releases, and does not know version_compatible = true"
                raise EngineError(what, hint="set version_compatible = false, and build again with each release")
            known = Release(self._trt()).capabilities
            if capability not in known:
                raise EngineError(
                    f"TensorRT-RTX does not build for compute capability {capability}", hint=f"it does for {', '.join(known)}"
                )
            if target.refit and gpu is None:
                raise EngineError(
                    "TensorRT-RTX makes weights replaceable only on a GPU, and there is none here",
                    hint="build with refit = false",
                )
        elif gpu is None or gpu.capability != capability:
            here = f"here is {gpu.name} ({gpu.capability})" if gpu else "here is no NVIDIA GPU"
            here = "without the package 'pycuda' the GPU here is not found" if blind else here
            first = "if that is this machine, pip install pycuda; if not: " if blind else ""
            raise AbsentDeviceError(
                f"a TensorRT engine for {target.name} is built on a GPU of compute capability {capability}, but {here}",
                hint=first + _hint_elsewhere(target.name, capability),
            )
        return resolved

    def device(self, target: Target) -> str:
        """The GPU here, if the target is about it, else the capability."""
        gpu = cuda.find_gpu()
        if gpu and target.capability in (None, gpu.capability):
            return f"{gpu.name} (compute capability {gpu.capability})"
        return f"compute capability {target.capability}"

    def driver(self) -> str:
        """The CUDA version of the driver here, e.g. "13.0"; "" without a GPU."""
        gpu = cuda.find_gpu()
        return gpu.driver if gpu else ""

    def runs_here(self, target: Target) -> bool:
        """Whether the GPU here runs a plan for the resolved `target`."""
        gpu = cuda.find_gpu()
        return gpu is not None and self._fits(gpu.capability, target)

    def float_types(self, target: Target) -> tuple[FloatType, ...]:
        """FP16 first; BF16 from compute capability 8.0 on, and below that TensorRT-RTX has no FP32 products either."""
        gpu = cuda.find_gpu()
        capability = target.capability or (gpu.capability if gpu else None)
        if capability is None or _numbers(capability) >= (8, 0):
            return "fp16", "bf16", "fp32"
        return ("fp16",) if self.anywhere else ("fp16", "fp32")

    def peaks(self, target: Target) -> Peaks | None:
        """What the target says of its device; a GPU does not tell."""
        return target.peaks

    def build(self, onnx: Path, target: Target, float_type: FloatType, folder: Path, progress: Progress) -> str:
        """Write the plan of `onnx` for the resolved `target` into `folder`; TensorRT's log, from INFO on."""
        trt = self._trt()
        log = make_log(trt)
        builder = trt.Builder(log)
        network = builder.create_network(Release(trt).creation_flags())
        _parse(trt, network, onnx, log)
        config = builder.create_builder_config()
        _configure(trt, config, target)
        Release(trt).set_types(config, network, float_type)
        config.add_optimization_profile(_profile(builder, network, target, onnx))
        monitor = Release(trt).set_monitor(config, progress)
        cache = None if Release(trt).is_rtx else self._cache_path(target)  # TensorRT-RTX times kernels where they run
        if cache:
            _load_cache(config, cache, log)
        with interruptible(monitor):
            plan = builder.build_serialized_network(network, config)
        if monitor is not None:
            monitor.settle()
        if plan is None:
            raise failure(f"{self.PACKAGE} cannot build {onnx}", log)
        (folder / self.PLAN[0]).write_bytes(plan)
        if cache:
            _save_cache(config, cache, log)
        return str(log.text())

    def refit(self, engine: Path, target: Target, onnx: Path, folder: Path) -> str:
        """Write the plan in the directory `engine`, with the weights of `onnx`, into `folder`; TensorRT's log."""
        trt = self._trt()
        if not hasattr(trt, "OnnxParserRefitter"):
            raise EngineError(f"TensorRT {trt.__version__} does not take weights from an ONNX file", hint="it came with 10.0")
        log = make_log(trt)
        with cuda.Device():
            plan = deserialize(trt, engine / self.PLAN[0], log, target)
            refitter = trt.Refitter(plan, log)
            reader = trt.OnnxParserRefitter(refitter, log)
            if not reader.refit_from_file(str(onnx)):
                said = reader.get_error(0).desc() if reader.num_errors else log.last_error()
                raise BuildError(f"{onnx} does not fit {engine}: {sentence(said)}", hint=hint_for(said), log=log.text())
            if not refitter.refit_cuda_engine():
                missing = ", ".join(refitter.get_missing_weights())
                raise failure(f"{onnx} does not have the weights of {engine}{': it lacks ' if missing else ''}{missing}", log)
            (folder / self.PLAN[0]).write_bytes(Release(trt).serialized(plan))
        return str(log.text())

    def refits_again(self) -> bool:
        """Whether the weights of a plan that `refit` wrote can be replaced once more."""
        return Release(self._trt()).keeps_refit()

    def check(self, manifest: Manifest) -> None:
        """Raise an EngineError, before TensorRT would, where a plan does not fit this machine."""
        if manifest.platform and manifest.platform != this_platform():
            raise _misfit(f"it was built on {manifest.platform}, and this is {this_platform()}")
        if cuda.find_gpu() is None and not _is_pycuda_missing():  # no package would help
            what = f"it needs an NVIDIA GPU of compute capability {manifest.target.capability}, and none is here"
            raise EngineError(what, hint="run it on the machine that it is for, or build for this one: --target cpu")
        built, installed = _numbers(manifest.backend_version), _numbers(self.version())
        later = manifest.target.version_compatible and built[0] == installed[0] and built <= installed
        if built != installed and not later:
            raise _misfit(f"it was built with {manifest.backend} {manifest.backend_version}, but {self.version()} is installed")
        gpu = cuda.require_gpu()
        if not self._fits(gpu.capability, manifest.target):
            raise _misfit(f"it is for {self.device(manifest.target)}, but {gpu.name} has {gpu.capability}")
        if not self.anywhere and manifest.target.hardware == "this" and manifest.device != self.device(manifest.target):
            raise _misfit(f"it was built on {manifest.device}, for GPUs of that model, and here is {gpu.name}")
        if manifest.driver and _numbers(gpu.driver)[0] < _numbers(manifest.driver)[0]:
            raise EngineError(
                f"it was built with a driver for CUDA {manifest.driver}, but the one here is for {gpu.driver}",
                hint="update the NVIDIA driver (on a Jetson, JetPack), or build the engine again here",
            )

    def open(self, folder: Path, card: ModelCard, target: Target, float_type: FloatType) -> TensorRtSession:
        """Deserialize the plan in `folder` on the GPU here."""
        trt = self._trt()
        log = make_log(trt)
        with cuda.Device():
            engine = deserialize(trt, folder / self.PLAN[0], log, target)
        return TensorRtSession(trt, engine, log, card, target)

    def layers(
        self, folder: Path, card: ModelCard, target: Target, float_type: FloatType, rows: NDArray[Any], seconds: float
    ) -> Profile:
        """Time every layer on `rows`, the input of one call."""
        session = self.open(folder, card, target, float_type)
        try:
            return measure(session, rows, seconds)
        finally:
            session.close()

    def _fits(self, capability: str, target: Target) -> bool:
        """Whether a GPU of `capability` runs a plan for the resolved `target`."""
        compatible = target.hardware == "ampere-plus" and not self.anywhere and _numbers(capability) >= (8, 0)
        return capability == target.capability or compatible

    def _trt(self) -> Any:
        """The Python module; a MissingPackageError where there is none."""
        for name in self.modules[:-1]:
            with suppress(MissingPackageError):
                return import_package(name, self.EXTRA, self.PACKAGE)
        return import_package(self.modules[-1], self.EXTRA, self.PACKAGE)

    def _cache_path(self, target: Target) -> Path:
        """Where timings are kept, which hold for one release on one device."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.PACKAGE} {self.version()} {self.device(target)}").strip("-")
        return cache_folder() / "timing" / f"{name}.cache"


TENSORRT = TensorRT("tensorrt", "gpu", ("tensorrt",), anywhere=False)
TENSORRT_RTX = TensorRT("tensorrt-rtx-cu13-bindings", "rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings"), anywhere=True)


def _parse(trt: Any, network: Any, onnx: Path, log: Any) -> None:
    """Read `onnx` into `network`; a BuildError names the first node that TensorRT does not take."""
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx.read_bytes()):
        error = parser.get_error(0)
        what = f"TensorRT {trt.__version__} does not take {Release(trt).where(error)} of {onnx}: {sentence(error.desc())}"
        raise BuildError(what, hint=hint_for(error.desc()), log=log.text())


def _configure(trt: Any, config: Any, target: Target) -> None:
    """Everything that a Target asks for but its batches."""
    config.builder_optimization_level = target.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for `vitedge explain`; costs no time
    config.clear_flag(trt.BuilderFlag.TF32)
    if target.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.workspace_mib * MIB)
    if target.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if target.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    Release(trt).set_hardware(config, target)


def _profile(builder: Any, network: Any, target: Target, onnx: Path) -> Any:
    """The smallest, best and largest batch of the target, for every input."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        batch, *rest = entry.shape
        if min(rest, default=1) < 0 or batch not in (-1, *set(target.batch)) or (batch > 0 and len(set(target.batch)) > 1):
            raise EngineError(
                f"{onnx} takes {entry.name} of shape {list(entry.shape)}, which does not hold batches of {list(target.batch)}",
                hint="export the model again, which leaves the batch open; or set batch in the target",
            )
        profile.set_shape(entry.name, *((count, *rest) for count in target.batch))
    return profile


def _load_cache(config: Any, path: Path, log: Any) -> None:
    """Let the builder begin with the timings of earlier builds; a file that is damaged or cannot be read counts as none."""
    cache = config.create_timing_cache(_read_cache(path, log))
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        log.note(f"the timing cache {path} is damaged or of another device, and will be replaced")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _save_cache(config: Any, path: Path, log: Any) -> None:
    """Keep the timings, together with those that other builds have written in the meantime."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    stored = _read_cache(path, log)
    others = config.create_timing_cache(stored) if stored else None
    if others is not None:
        cache.combine(others, ignore_mismatch=False)
    try:
        write_file(path, bytes(cache.serialize()))
    except VitEdgeError as error:  # the engine is none the worse
        log.note(f"the timing cache is not kept: {error}")


def _read_cache(path: Path, log: Any) -> bytes:
    """The timings in a file; nothing where there is none, or where it cannot be read."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        log.note(f"the timing cache {path} cannot be read: {error.strerror}")
        return b""


def _misfit(what: str) -> EngineError:
    return EngineError(what, hint="a TensorRT plan fits one release on one kind of GPU; build the engine again here")


def _is_pycuda_missing() -> bool:
    """Whether there is NVIDIA's driver, but not the package that asks it what GPU there is."""
    if importlib.util.find_spec("pycuda") is None:
        with suppress(OSError):
            ctypes.CDLL("libcuda.so.1")
            return True
    return False


def _hint_elsewhere(name: str, capability: str) -> str:
    """What can be done here for a GPU that is not here."""
    packed = f"`vitedge pack ONNX --target {name}` makes a bundle, which `sh build.sh` builds on that machine"
    if capability not in RTX_CAPABILITIES:
        return packed
    return f"{packed}; or build for TensorRT-RTX, here: vitedge build ONNX --target {name} --backend tensorrt-rtx"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
