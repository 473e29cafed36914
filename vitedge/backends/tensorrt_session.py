"""A TensorRT plan in, a session on the GPU out: one context, one stream, buffers bound once.

Gets the TensorRT module from tensorrt.py, the only file that imports it. Serves every release from 8.6 on: what it calls has
not changed since. Knows nothing of how a plan is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.backends import cuda
from vitedge.backends.tensorrt_log import make_profiler, sentence
from vitedge.errors import EngineError
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.specs import ModelCard, PixelFormat, Target


def deserialize(trt: Any, path: Path, log: Any, target: Target) -> Any:
    """The engine in the plan `path`; an EngineError with what TensorRT says where it is not one for this GPU."""
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = target.version_compatible  # such a plan brings a runtime along, and no other may
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EngineError(
            f"TensorRT {trt.__version__} cannot open {path}: {sentence(log.last_error())}", hint="build the engine again here"
        )
    return engine


class TensorRtSession:
    """A plan on a GPU: one execution context, a stream of its own, buffers that are bound once.

    The plan's weights are shared by all sessions that `fork` makes, so each thread can have its own.
    """

    def __init__(self, trt: Any, engine: Any, log: Any, card: ModelCard, target: Target) -> None:
        self._trt, self._engine, self._log, self._card, self._target = trt, engine, log, card, target
        self.streams = target.streams or 2  # a second context fills the gaps between the kernels of the first
        self._device = cuda.Device()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        shape, dtype = input_shape(card), input_dtype(card)
        given = tuple(engine.get_tensor_shape(inputs[0]))[1:], np.dtype(trt.nptype(engine.get_tensor_dtype(inputs[0])))
        if len(inputs) != 1 or given != (shape, dtype):
            raise EngineError(
                f"the plan takes {given[1]}{list(given[0])}, but its manifest says {dtype}{list(shape)}",
                hint="build the engine again",
            )
        self._name, self._count, self._most = inputs[0], 0, target.batch[2]
        with self._device:
            self._context = engine.create_execution_context()
            if self._context is None:
                raise EngineError("there is not enough GPU memory to run this engine", hint="close other programs on the GPU")
            self._stream = cuda.Stream()
            self._in = cuda.Buffer((self._most, *shape), dtype)
            self._out = [self._output(name) for name in outputs]
        for name, buffer in zip((self._name, *outputs), (self._in, *self._out), strict=True):
            self._context.set_tensor_address(name, buffer.address)
        self.input: NDArray[Any] = self._in.host

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        """Preprocess a picture into a row of `input`."""
        write_input(picture, self._card, self.input[row], pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        """The first output for the first `count` rows of `input`, float32[count, ...]; valid until the next run."""
        with self._device:
            if count != self._count:
                self._set_batch(count)
            self._in.upload(count, self._stream)
            self._execute()
            result: NDArray[np.float32] = self._out[0].download(count, self._stream)
            self._stream.synchronize()
        return result

    def profile(self, count: int, calls: int) -> dict[str, list[float]]:
        """Milliseconds of each layer of the plan, in each of `calls` runs of `count` rows.

        Timing each layer slows the session down, from here on: use one that is for nothing else.
        """
        profiler = make_profiler(self._trt)
        with self._device:
            self._set_batch(count)
            self._in.upload(count, self._stream)
            self._context.profiler = profiler
            for _ in range(calls):
                self._execute()
                self._stream.synchronize()
        times: dict[str, list[float]] = profiler.times
        return times

    def inspect(self) -> str:
        """What TensorRT tells about the plan's layers, as JSON of its own schema."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def fork(self) -> TensorRtSession:
        """Another session of the same plan, with a context, a stream and buffers of its own."""
        return TensorRtSession(self._trt, self._engine, self._log, self._card, self._target)

    def close(self) -> None:
        """Free the context and the buffers; a second call does nothing."""
        if self._context is not None:
            with self._device:
                self._context = self._engine = None
                for buffer in (self._in, *self._out):
                    buffer.close()
                self._stream.close()

    def _set_batch(self, count: int) -> None:
        if not self._context.set_input_shape(self._name, (count, *self.input.shape[1:])):
            raise EngineError(f"the plan does not take a batch of {count}", hint="build with a wider batch in the target")
        self._count = count

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise EngineError(
                f"TensorRT could not run the engine: {sentence(self._log.last_error())}", hint="build it again here"
            )

    def _output(self, name: str) -> cuda.Buffer:
        shape = tuple(self._engine.get_tensor_shape(name))
        if min(shape[1:], default=1) < 0:
            raise EngineError(f"the size of the output {name!r} is not known: {list(shape)}", hint="export the model again")
        return cuda.Buffer((self._most, *shape[1:]), np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))))
