"""A TensorRT plan in, a session on the GPU out: one stream, buffers bound once, a CUDA graph for each batch size.

    write(row, picture, pixels)   picture -> pinned memory -> GPU -> kernel -> row of the input, which stays on the GPU
    input[row] = ...              or on the host: uploaded by each run
    run(count)                    [upload] + plan + download of the answer, from the third run of a batch size on in one launch

Gets the TensorRT module from tensorrt.py, the only file that imports it. Serves every release from 8.6 on: what it calls has
not changed since. Knows nothing of how a plan is built.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.backends import cuda, cuda_graph
from vitedge.backends.cubin import compiler_version
from vitedge.backends.cuda_pictures import KernelError, Layout, Pictures
from vitedge.backends.tensorrt_log import make_profiler, sentence
from vitedge.errors import EngineError, VitEdgeError
from vitedge.pixels import frame_size
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.specs import ModelCard, PixelFormat, Target

CONTEXTS = 4  # batch sizes that are kept ready to run, each with memory for its activations
NO_ROOM = "there is not enough GPU memory to run this engine"


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


class Execution:
    """An execution context, set to one batch size, and the graphs that were captured of it at that size.

    TensorRT asks for a context a graph where shapes differ, and for a run without a graph before the capture: `ran`.
    """

    def __init__(self, context: Any) -> None:
        self.context, self.count, self.ran = context, 0, False
        self.graphs: dict[bool, cuda_graph.Graph] = {}  # whether the input is uploaded -> graph

    def drop_graphs(self) -> None:
        """Free the graphs, which must not be running."""
        with ExitStack() as stack:
            for graph in self.graphs.values():
                stack.callback(graph.close)
            self.graphs.clear()


class TensorRtSession:
    """A plan on a GPU: a stream of its own, and buffers that are bound once.

    The plan's weights are shared by all sessions that `fork` makes, so each thread can have its own.

    graphs: whether runs are replayed as CUDA graphs; may be set to False. graphs_note, write_note: why there are none, and why
    pictures are prepared on the CPU; "" where nothing is in the way.
    """

    def __init__(self, trt: Any, engine: Any, log: Any, card: ModelCard, target: Target) -> None:
        self._trt, self._engine, self._log, self._card, self._target = trt, engine, log, card, target
        self.streams = target.streams or 2  # a second context fills the gaps between the kernels of the first
        self._device, self._gpu = cuda.Device(), cuda.require_gpu()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in inputs]
        shape, dtype = input_shape(card), input_dtype(card)
        given = tuple(engine.get_tensor_shape(inputs[0]))[1:], np.dtype(trt.nptype(engine.get_tensor_dtype(inputs[0])))
        if len(inputs) != 1 or given != (shape, dtype):
            raise EngineError(
                f"the plan takes {given[1]}{list(given[0])}, but its manifest says {dtype}{list(shape)}",
                hint="build the engine again",
            )
        self._name, self._most = inputs[0], target.batch[2]
        self.graphs_note = cuda_graph.missing()
        self.graphs = not self.graphs_note
        self.write_note = "" if compiler_version() else "there is neither NVRTC nor nvcc to compile a kernel with"
        self._executions: list[Execution] = []  # the one that ran last is the last
        self._owned = ExitStack()  # goes on after what fails
        self._shown: NDArray[Any] = np.empty(0, dtype)
        with self._device:
            try:
                self._allocate((self._most, *shape), dtype)
            except BaseException:
                self._owned.close()
                raise
        self._on_host = True  # which of the two inputs, on the host or on the GPU, is the newer one
        self._shown = self._in.host[...]

    @property
    def input(self) -> NDArray[Any]:
        """[max batch, ...], on the host. To be asked for anew after a `write`, which brings what was written down from the GPU.

        The array is read-only while the rows are on the GPU, so that an older reference to it cannot be written in vain. That
        holds for the array itself, not for views that were taken of it: what they write after a `write` is lost.
        """
        self._check_open()
        if not self._on_host:
            with self._device:
                self._in.download(self._most, self._stream)
                self._stream.synchronize()
            self._on_host = True
            self._shown.flags.writeable = True
        return self._shown

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat) -> None:
        """Preprocess a picture into a row of the input on the GPU, which `run` then takes as it is.

        Where no kernel can be compiled (`write_note`), or a picture is too large for it, on the CPU.
        """
        self._check_open()
        frame_size(picture, pixels)
        if not 0 <= row < self._most:
            raise EngineError(f"there is no row {row}: the engine was built for batches of up to {self._most}")
        with self._device:
            layout = self._layout(picture, pixels)
            if layout is not None:
                self._to_gpu()
                self._pictures.write(picture, layout, self._in.row_address(row), self._stream)
        if layout is None:
            write_input(picture, self._card, self.input[row], pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        """The first output for the first `count` rows of the input, float32[count, ...]; valid until the next run."""
        with self._device:
            execution = self._execution(count)
            graph = execution.graphs.get(self._on_host) if self.graphs else None
            if graph is None and self.graphs and execution.ran:
                graph = self._capture(execution)
            if graph is None:
                self._put(execution)
            else:
                graph.launch()
            self._stream.synchronize()
            execution.ran = True
        result: NDArray[np.float32] = self._out[0].host[:count]
        return result

    def profile(self, count: int, calls: int) -> dict[str, list[float]]:
        """Milliseconds of each layer of the plan, in each of `calls` runs of `count` rows.

        Timing each layer slows the session down, from here on, and is done without graphs: use one that is for nothing else.
        """
        profiler = make_profiler(self._trt)
        self.graphs, self.graphs_note = False, "a session that has timed its layers has none"
        with self._device:
            execution = self._execution(count)
            if self._on_host:
                self._in.upload(count, self._stream)
            context = execution.context
            context.profiler = profiler
            for _ in range(calls):
                self._execute(execution)
                self._stream.synchronize()
        times: dict[str, list[float]] = profiler.times
        return times

    def inspect(self) -> str:
        """What TensorRT tells about the plan's layers, as JSON of its own schema."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._executions[-1].context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def fork(self) -> TensorRtSession:
        """Another session of the same plan, with contexts, a stream and buffers of its own."""
        self._check_open()
        return TensorRtSession(self._trt, self._engine, self._log, self._card, self._target)

    def close(self) -> None:
        """Free the contexts and the buffers, after a fault of the GPU, too, which is told; a second call does nothing."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        self._shown = np.empty(0, self._shown.dtype)  # whose memory the last who holds it frees
        with self._device, self._owned:  # which ends with what came last
            self._owned.callback(self._executions.clear)
            for execution in self._executions:
                self._owned.callback(execution.drop_graphs)
            self._owned.callback(self._stream.synchronize)

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Everything that runs need from the first on; `_owned` frees it, whole or not."""
        mapped = self._gpu.integrated  # the processor and the GPU read the same memory: a copy would only be a copy
        self._stream = self._own(cuda.Stream())
        self._in = self._own(cuda.Buffer(shape, dtype, mapped=mapped))
        self._out = [self._own(cuda.Buffer(*self._output(name), mapped=mapped)) for name in self._outputs]
        self._pictures: Pictures = self._own(Pictures(self._card, self._gpu))
        self._executions.append(self._new_execution())

    def _own(self, owned: Any) -> Any:
        self._owned.callback(owned.close)
        return owned

    def _check_open(self) -> None:
        if self._engine is None:
            raise EngineError("the session is closed")

    def _layout(self, picture: NDArray[np.uint8], pixels: PixelFormat) -> Layout | None:
        """How the kernel is launched for such pictures; None where they are prepared on the CPU.

        Where there is no GPU memory for it at the moment, an EngineError: the next picture tries again.
        """
        if self.write_note:
            return None
        try:
            return self._pictures.layout(picture, pixels, self._stream)
        except KernelError as error:  # what cannot be compiled for one picture, cannot for the next
            self.write_note = str(error)
        except EngineError:
            raise
        except VitEdgeError:  # a picture that is too large for the kernel, and not for the CPU
            pass
        return None

    def _to_gpu(self) -> None:
        """Let the input on the GPU be the newer one, with all rows that were written on the host."""
        if self._on_host:
            self._in.upload(self._most, self._stream)
            self._shown.flags.writeable = False
            self._on_host = False

    def _execution(self, count: int) -> Execution:
        """The context that is set to a batch of `count`: one that was, a new one, or the one that was not used for longest."""
        self._check_open()
        if self._executions[-1].count == count:
            return self._executions[-1]
        execution = next((each for each in self._executions if each.count == count), None) or self._another(count)
        self._executions.remove(execution)
        self._executions.append(execution)
        return execution

    def _another(self, count: int) -> Execution:
        """A context that is set to a batch size which none is set to yet."""
        execution = self._executions[0]
        if self.graphs and execution.count and len(self._executions) < CONTEXTS:
            try:
                execution = self._new_execution()
                self._executions.append(execution)
            except EngineError:  # no room for another: those that are there take turns
                execution = self._executions[0]
        self._set_batch(execution, count)
        return execution

    def _new_execution(self) -> Execution:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(NO_ROOM, hint="close other programs on the GPU")
        for name, buffer in zip((self._name, *self._outputs), (self._in, *self._out), strict=True):
            context.set_tensor_address(name, buffer.address)
        return Execution(context)

    def _set_batch(self, execution: Execution, count: int) -> None:
        execution.drop_graphs()
        execution.count, execution.ran = 0, False
        context = execution.context
        if not context.set_input_shape(self._name, (count, *self._shown.shape[1:])):
            raise EngineError(f"the plan does not take a batch of {count}", hint="build with a wider batch in the target")
        execution.count = count

    def _capture(self, execution: Execution) -> cuda_graph.Graph | None:
        """The graph of a run; None where it cannot be captured: from then on runs go without, and `graphs_note` says why."""
        try:
            graph = cuda_graph.capture(self._stream.handle, lambda: self._put(execution))
        except EngineError as error:
            self.graphs, self.graphs_note = False, str(error)
            return None
        execution.graphs[self._on_host] = graph
        return graph

    def _put(self, execution: Execution) -> None:
        """Put a run into the stream."""
        if self._on_host:
            self._in.upload(execution.count, self._stream)
        self._execute(execution)
        self._out[0].download(execution.count, self._stream)

    def _execute(self, execution: Execution) -> None:
        context = execution.context
        if not context.execute_async_v3(self._stream.handle):
            raise EngineError(
                f"TensorRT could not run the engine: {sentence(self._log.last_error())}", hint="build it again here"
            )

    def _output(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """The shape of an output at the largest batch, and its type."""
        shape = tuple(self._engine.get_tensor_shape(name))
        if min(shape[1:], default=1) < 0:
            raise EngineError(f"the size of the output {name!r} is not known: {list(shape)}", hint="export the model again")
        return (self._most, *shape[1:]), np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
