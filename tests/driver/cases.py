"""Cases that run with the real PyCUDA and cuda-bindings on driver.cpp, in a process that build.py starts."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import gpu_runtime
from tests.driver import fake
from tests.gpu import stand_in
from vitedge.backends import cubin, cuda, cuda_graph, patchify
from vitedge.backends.tensorrt_session import TensorRtSession
from vitedge.errors import EngineError, VitEdgeError
from vitedge.preprocess import input_shape, write_input
from vitedge.runtime.engine import Engine
from vitedge.specs import Manifest, ModelCard, Peaks, PixelFormat, Preprocess, Target, Work

CARD = ModelCard(name="digits", task="classify", preprocess=Preprocess((28, 28), (0.5,) * 3, (0.5,) * 3), patch=7)
TARGET = Target(name="board", backend="tensorrt", batch=(1, 2, 8))
BYTES = np.dtype(np.uint8)
HAS_NVRTC = bool(cubin.nvrtc_version())
SETUP = (
    "cuMemAlloc_v2",
    "cuMemHostAlloc",
    "cuStreamCreate",
    "cuEventCreate",
    "cuModuleLoadDataEx",
    "cuGraphInstantiateWithFlags",
)
random = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left over, and nothing was freed in a way that PyCUDA complains about."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
        gc.collect()
    fake.forget()
    fake.DRIVER.fake_memory(1 << 32)
    fake.DRIVER.fake_attribute(fake.INTEGRATED, 0)
    cuda.find_gpu.cache_clear()
    assert set(fake.live().values()) == {0}, fake.live()


class Launches:
    """In place of the kernel: does with the arguments of a launch what the kernel does, by the CPU's reference."""

    def __init__(self) -> None:
        self.pixels: PixelFormat = "rgb"
        self.sizes: list[list[int]] = []
        fake.on_launch(self.run)

    def run(self, sizes: list[int], arguments: tuple[int, ...]) -> None:
        picture, out, *tables = arguments[:6]
        height, pitch, *_ = arguments[6:]
        wide = {"rgb": (pitch // 3, 3), "bgr": (pitch // 3, 3), "yuyv": (pitch // 2, 2)}.get(self.pixels, (pitch,))
        lines = height * 3 // 2 if self.pixels == "nv12" else height
        given = fake.at(picture, (lines, *wide), np.uint8)
        wanted = patchify.launch(height, wide[0], pitch, self.pixels, CARD)
        assert (tuple(sizes[:2]), tuple(sizes[3:6]), sizes[6]) == (wanted.grid, wanted.block, wanted.shared_bytes)
        assert tuple(arguments[6:]) == tuple(wanted.scalars)
        for address, table in zip(tables, wanted.tables, strict=True):
            assert np.array_equal(fake.at(address, table.shape, np.int32), table)
        write_input(given, CARD, fake.at(out, input_shape(CARD), np.int8), self.pixels)
        self.sizes.append(sizes)


@pytest.fixture
def launches() -> Launches:
    return Launches()


@pytest.fixture
def engine() -> fake.Engine:
    return fake.Engine(input_shape(CARD), TARGET.batch[2])


@pytest.fixture
def session(engine: fake.Engine) -> Iterator[TensorRtSession]:
    opened = TensorRtSession(fake.TRT, engine, fake.LOG, CARD, TARGET)
    yield opened
    opened.close()


def picture(height: int = 40, width: int = 30, pixels: PixelFormat = "rgb") -> NDArray[np.uint8]:
    shape = {"grey": (height, width), "nv12": (height * 3 // 2, width), "yuyv": (height, width, 2)}.get(
        pixels, (height, width, 3)
    )
    return random.integers(0, 256, shape, np.uint8)


def rows(count: int) -> NDArray[np.int8]:
    return random.integers(-128, 128, (count, *input_shape(CARD)), np.int8)


def row_of(image: NDArray[np.uint8], pixels: PixelFormat = "rgb") -> NDArray[np.int8]:
    row = np.empty(input_shape(CARD), np.int8)
    write_input(image, CARD, row, pixels)
    return row


def answers(given: NDArray[np.int8]) -> NDArray[np.float32]:
    flat = given.reshape(len(given), -1)
    return np.stack([flat.astype(np.float32).sum(axis=1), flat[:, 0].astype(np.float32)], axis=1)


# What there is


def test_the_facts_of_the_gpu() -> None:
    assert cuda.require_gpu() == cuda.Gpu("No GPU", "8.7", "13.0", 4096, False, 8)
    with cuda.Device() as device:
        assert device.free_mib() == 4096


def test_a_buffer_goes_there_and_back_in_any_thread() -> None:
    given = rows(4)
    with cuda.Device():
        stream, buffer = cuda.Stream(), cuda.Buffer((4, *given.shape[1:]), given.dtype)
        assert not buffer.host.any()
        buffer.host[...] = given
        buffer.upload(4, stream)
        stream.synchronize()
        buffer.host[...] = 0
        assert np.array_equal(fake.at(buffer.row_address(2), given.shape[1:], np.int8), given[2])
        back = buffer.download(3, stream)
        stream.synchronize()
        assert np.array_equal(back, given[:3])
    closing = threading.Thread(target=close_all, args=(buffer, stream))
    closing.start()
    closing.join()
    assert fake.live()["device"] == fake.live()["streams"] == 0
    with pytest.raises(EngineError, match="the buffer is closed"):
        buffer.upload(1, stream)
    with pytest.raises(EngineError, match="the stream is closed"):
        stream.synchronize()
    with pytest.raises(EngineError, match="the buffer is closed"):
        _ = buffer.address


def close_all(*things: Any) -> None:
    """Close each thing twice, within the context."""
    with cuda.Device():
        for thing in (*things, *things):
            thing.close()


def test_an_array_outlives_its_buffer_and_frees_the_memory_in_whatever_thread() -> None:
    with cuda.Device():
        buffer = cuda.Buffer((2, 3), BYTES)
        held = [buffer.host[1]]
    close_all(buffer)
    held[0][...] = 7
    assert fake.live()["pinned"] == 1 and held[0].sum() == 21
    letting_go = threading.Thread(target=held.clear)
    del buffer
    letting_go.start()
    letting_go.join()
    assert fake.live()["pinned"] == 0 and fake.calls().count("cuMemFreeHost") == 1


def test_mapped_memory_is_one_and_nothing_is_copied() -> None:
    with cuda.Device():
        stream, buffer = cuda.Stream(), cuda.Buffer((4, 2), BYTES, mapped=True)
        buffer.host[...] = 3
        buffer.upload(4, stream)
        assert fake.at(buffer.row_address(1), (2,), np.uint8).tolist() == [3, 3]
        assert buffer.download(2, stream).shape == (2, 2)
    close_all(buffer, stream)
    assert not [name for name in fake.calls() if "Memcpy" in name or "MemAlloc" in name]


def test_events_measure_and_wait() -> None:
    with cuda.Device():
        stream, first, second = cuda.Stream(), cuda.Event(timed=True), cuda.Event(timed=True)
        plain = cuda.Event()
        plain.synchronize()  # was never recorded
        first.record(stream)
        second.record(stream)
        second.synchronize()
        assert second.ms_since(first) == 0.25
    close_all(first, second, plain, stream)
    with pytest.raises(EngineError, match="the event is closed"):
        first.record(stream)


def test_streams_do_not_wait_for_the_default_stream() -> None:
    with cuda.Device():
        stream = cuda.Stream()
        assert fake.DRIVER.fake_flags(ctypes.c_void_p(stream.handle)) == 1  # CU_STREAM_NON_BLOCKING
    close_all(stream)


# What fails


@pytest.mark.parametrize(
    ("function", "use"),
    [
        ("cuStreamCreate", cuda.Stream),
        ("cuEventCreate", cuda.Event),
        ("cuMemcpyHtoDAsync_v2", lambda: with_buffer(lambda buffer, stream: buffer.upload(1, stream))),
        ("cuMemcpyDtoHAsync_v2", lambda: with_buffer(lambda buffer, stream: buffer.download(1, stream))),
        ("cuStreamSynchronize", lambda: with_buffer(lambda buffer, stream: stream.synchronize())),
        ("cuEventRecord", lambda: with_buffer(lambda buffer, stream: cuda.Event().record(stream))),
        ("cuMemGetInfo_v2", lambda: cuda.Device().free_mib()),
    ],
)
def test_what_the_driver_refuses_is_an_engine_error(function: str, use: Any) -> None:
    with pytest.raises(EngineError, match=r"CUDA failed: .*illegal memory access") as caught, cuda.Device():
        fake.fail(function, fake.ILLEGAL_ADDRESS)
        use()
    assert caught.value.hint and function.removesuffix("_v2") in str(caught.value)


def with_buffer(use: Any) -> None:
    """Use a buffer and a stream, which are freed whatever happens."""
    stream, buffer = cuda.Stream(), cuda.Buffer((1, 4), BYTES)
    try:
        use(buffer, stream)
    finally:
        fake.forget()
        buffer.close()
        stream.close()


@pytest.mark.parametrize("function", ["cuMemAlloc_v2", "cuMemHostAlloc"])
def test_out_of_memory_is_told_and_leaves_nothing_behind(function: str) -> None:
    with cuda.Device():
        fake.fail(function, fake.OUT_OF_MEMORY)
        with pytest.raises(EngineError, match=r"no GPU memory left for a buffer of uint8\[2, 3\]") as caught:
            cuda.Buffer((2, 3), BYTES)
        assert caught.value.hint == cuda.NO_MEMORY_HINT
        fake.forget()
        cuda.Buffer((2, 3), BYTES).close()


def test_an_error_of_another_kind_passes_through_the_context() -> None:
    with pytest.raises(KeyError), cuda.Device():
        raise KeyError("x")


def test_memory_is_freed_while_the_context_is_looked_up() -> None:
    with cuda.Device():
        buffer = cuda.Buffer((1, 4), BYTES)
        held = [buffer.host]
    close_all(buffer)
    del buffer

    def collected() -> None:
        with cuda._ONE_CONTEXT:
            held.clear()  # as a garbage collection may

    letting_go = threading.Thread(target=collected, daemon=True)
    letting_go.start()
    letting_go.join(20)
    assert not letting_go.is_alive() and fake.live()["pinned"] == 0


# Graphs


def test_a_graph_runs_when_it_is_launched_and_not_before() -> None:
    with cuda.Device():
        stream, buffer = cuda.Stream(), cuda.Buffer((1, 4), BYTES)
        graph = cuda_graph.capture(stream.handle, lambda: buffer.upload(1, stream))
        buffer.host[...] = 9
        stream.synchronize()
        assert fake.at(buffer.address, (4,), np.uint8).tolist() != [9] * 4
        for value in (9, 5):
            buffer.host[...] = value
            graph.launch()
            stream.synchronize()
            assert fake.at(buffer.address, (4,), np.uint8).tolist() == [value] * 4
    close_all(graph, buffer, stream)
    with pytest.raises(EngineError, match="the graph is closed"):
        graph.launch()
    assert fake.calls().count("cuGraphDestroy") == fake.calls().count("cuGraphExecDestroy") == 1


@pytest.mark.parametrize(
    "function", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphLaunch"]
)
def test_every_status_of_a_graph_is_looked_at(function: str) -> None:
    def use(buffer: cuda.Buffer, stream: cuda.Stream) -> None:
        fake.fail(function, fake.LAUNCH_FAILED)
        graph = cuda_graph.capture(stream.handle, lambda: buffer.upload(1, stream))
        try:
            graph.launch()
        finally:
            graph.close()

    with cuda.Device(), pytest.raises(EngineError, match=r"unspecified launch failure \(719\)"):
        with_buffer(use)


def test_a_capture_that_fails_leaves_the_stream_usable() -> None:
    def use(buffer: cuda.Buffer, stream: cuda.Stream) -> None:
        with pytest.raises(EngineError, match="cannot be captured as a CUDA graph: cuMemHostAlloc failed"):
            cuda_graph.capture(stream.handle, lambda: cuda.Buffer((1, 1), BYTES))
        buffer.upload(1, stream)
        stream.synchronize()

    with cuda.Device():
        with_buffer(use)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, KeyError])
def test_what_is_none_of_cuda_leaves_a_capture_as_it_is_and_the_stream_usable(raised: type[BaseException]) -> None:
    def use(buffer: cuda.Buffer, stream: cuda.Stream) -> None:
        def work() -> None:
            buffer.upload(1, stream)
            raise raised

        with pytest.raises(raised):
            cuda_graph.capture(stream.handle, work)
        buffer.upload(1, stream)
        stream.synchronize()
        assert fake.live()["graphs"] == 0

    with cuda.Device():
        with_buffer(use)


# Kernels


def test_nvrtc_compiles_the_kernel_once_and_a_damaged_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_NVRTC:
        pytest.skip("there is no NVRTC for this release")
    options = ("-DPIXELS=NV12", "-DCHANNELS=3", "-DPATCH=16")
    code = cubin.compiled(patchify.source(), options, "8.7")
    (path,) = tmp_path.rglob("*.cubin")
    assert path.parent == tmp_path / "vitedge" / "kernels" and code[:4] == b"\x7fELF" and type(code) is bytes
    assert path.read_bytes()[: -cubin.DIGEST] == code
    with monkeypatch.context() as patched:
        patched.setattr(cubin, "compile_by_nvrtc", None)
        assert cubin.compiled(patchify.source(), options, "8.7") == code
    for damaged in (b"", code[:100], code + bytes(cubin.DIGEST)):
        path.write_bytes(damaged)
        assert cubin.compiled(patchify.source(), options, "8.7") == code
        assert path.read_bytes()[: -cubin.DIGEST] == code
    for other in (("-DPIXELS=RGB", *options[1:]), (*options[:2], "-DPATCH=14")):
        cubin.compiled(patchify.source(), other, "8.7")
    cubin.compiled(patchify.source(), options, "9.0")
    assert len(list(tmp_path.rglob("*.cubin"))) == 4


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    if not HAS_NVRTC:
        pytest.skip("there is no NVRTC for this release")
    made: list[bytes] = []
    source = 'extern "C" __global__ void one(int* x) { *x = 1; }'
    threads = [threading.Thread(target=lambda: made.append(cubin.compiled(source, (), "8.7"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and len(set(made)) == 1 and len(list(tmp_path.rglob("*.cubin"))) == 1


@pytest.mark.parametrize(("source", "capability", "said"), [("int x = ;", "8.7", "error"), ("", "3.0", "")])
def test_what_does_not_compile_is_told_in_a_sentence(source: str, capability: str, said: str) -> None:
    if not HAS_NVRTC:
        pytest.skip("there is no NVRTC for this release")
    with pytest.raises(EngineError, match=f"NVRTC does not compile the kernel for {capability}: .*{said}") as caught:
        cubin.compiled(source, (), capability)
    assert "\n" not in str(caught.value)
    assert bytes([32])[0] == 32  # objects of one byte are shared: an empty log must not be written into one


def test_nvcc_takes_the_place_of_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cuda.nvcc_version():
        pytest.skip("there is no nvcc")
    monkeypatch.setattr(cubin, "nvrtc_version", lambda: "")
    cubin.compiler_version.cache_clear()
    try:
        assert cubin.compiler_version() == f"nvcc {cuda.nvcc_version()}"
        options = ("--std=c++17", "-DPIXELS=RGB", "-DCHANNELS=3", "-DPATCH=16")
        assert cubin.compiled(patchify.source(), options, "8.7")[:4] == b"\x7fELF"
        with pytest.raises(EngineError, match="nvcc does not compile the kernel"):
            cubin.compiled("int x = ;", (), "8.7")
    finally:
        cubin.compiler_version.cache_clear()


def test_a_driver_that_does_not_load_the_code_says_so() -> None:
    with cuda.Device():
        with pytest.raises(EngineError, match=r"the driver does not load the kernel 'patchify': .*image is invalid"):
            cuda.Kernel(b"not ELF, whatever it is", "patchify", "P")
        with pytest.raises(EngineError, match="not found"):
            cuda.Kernel(b"\x7fELF", "no_such_kernel", "P")


# Sessions


def test_runs_are_replayed_from_the_third_on_with_one_launch(session: TensorRtSession, engine: fake.Engine) -> None:
    given = rows(8)
    for count in (3, 3, 3, 5, 5, 5, 3):
        session.input[...] = given = rows(8)
        fake.forget()
        assert np.array_equal(session.run(count), answers(given[:count])), count
    assert session.graphs and not session.graphs_note
    assert [name for name in fake.calls() if name.startswith("cu") and "Ctx" not in name] == [
        "cuGraphLaunch",
        "cuStreamSynchronize",
    ]
    assert len(engine.made) == 2  # one a batch size


def test_the_order_of_a_capture(session: TensorRtSession) -> None:
    fake.forget()
    session.run(2)
    warm = fake.calls()
    session.run(2)
    both = fake.calls()
    assert "cuStreamBeginCapture_v2" not in warm and warm.count("enqueue") == 1
    second = both[len(warm) :]
    begin, end = second.index("cuStreamBeginCapture_v2"), second.index("cuStreamEndCapture")
    captured = [name for name in second[begin + 1 : end] if name != "cuStreamIsCapturing"]  # which the stand-in asks
    assert captured == ["cuMemcpyHtoDAsync_v2", "enqueue captured", "cuMemcpyDtoHAsync_v2"]
    assert second[end + 1 : end + 4] == ["cuGraphInstantiateWithFlags", "cuGraphDestroy", "cuGraphLaunch"]


def test_only_as_many_batch_sizes_as_there_are_contexts_keep_graphs(session: TensorRtSession, engine: fake.Engine) -> None:
    for count in (1, 2, 3, 4, 5, 6, 6, 6, 1, 1, 1, 6):
        session.input[...] = given = rows(8)
        assert np.array_equal(session.run(count), answers(given[:count]))
    assert len(engine.made) == 4 and fake.live()["graphs"] == 2


def test_no_memory_for_another_context_is_no_reason_to_stop(session: TensorRtSession, engine: fake.Engine) -> None:
    engine.contexts = 1
    for count in (1, 1, 1, 2, 2, 2, 1):
        session.input[...] = given = rows(8)
        assert np.array_equal(session.run(count), answers(given[:count]))
    assert session.graphs


def test_graphs_can_be_switched_off(session: TensorRtSession, engine: fake.Engine) -> None:
    session.graphs = False
    for count in (2, 2, 2, 3, 3):
        session.input[...] = given = rows(8)
        assert np.array_equal(session.run(count), answers(given[:count]))
    assert not [name for name in fake.calls() if "Graph" in name or "Capture" in name] and len(engine.made) == 1


def test_a_plan_that_cannot_be_captured_runs_without(engine: fake.Engine) -> None:
    engine.refuses_capture = True
    session = TensorRtSession(fake.TRT, engine, fake.LOG, CARD, TARGET)
    for _ in range(4):
        session.input[...] = given = rows(8)
        assert np.array_equal(session.run(2), answers(given[:2]))
    assert not session.graphs and "cannot be captured as a CUDA graph: TensorRT could not run" in session.graphs_note
    assert fake.calls().count("cuStreamBeginCapture_v2") == 1
    session.close()


@pytest.mark.parametrize("pixels", ["rgb", "bgr", "grey", "yuyv", "nv12"])
def test_a_picture_is_written_on_the_gpu_and_not_uploaded_again(
    session: TensorRtSession, launches: Launches, pixels: PixelFormat
) -> None:
    launches.pixels = pixels
    for turn in range(5):
        given = [picture(40 + 2 * (turn % 2), 30, pixels) for _ in range(3)]
        wanted = answers(np.stack([row_of(image, pixels) for image in given]))
        for row, image in enumerate(given):
            session.write(row, image, pixels)
            image[...] = 0  # which the session no longer needs
        fake.forget()
        assert np.array_equal(session.run(3), wanted)
    assert not session.write_note, session.write_note
    assert fake.calls().count("cuGraphLaunch") == 1 and "cuMemcpyHtoDAsync_v2" not in fake.calls()


def test_what_was_written_is_what_runs(session: TensorRtSession, launches: Launches) -> None:
    for _ in range(6):
        given = [picture() for _ in range(8)]
        for row, image in enumerate(given):
            session.write(row, image, "rgb")
        wanted = np.stack([row_of(image) for image in given])
        assert np.array_equal(session.run(8), answers(wanted))
    assert np.array_equal(session.run(8), answers(wanted))  # again, with nothing new
    assert np.array_equal(session.input, wanted)
    assert np.array_equal(session.run(8), answers(wanted))  # now from the host


def test_rows_of_both_kinds_may_be_mixed(session: TensorRtSession, launches: Launches) -> None:
    image, given = picture(), rows(8)
    session.input[...] = given
    session.write(2, image, "rgb")
    given[2] = row_of(image)
    assert np.array_equal(session.run(8), answers(given))
    session.input[5] = given[5] = rows(1)[0]
    assert np.array_equal(session.run(8), answers(given))


def test_an_older_reference_to_the_input_cannot_be_written_in_vain(session: TensorRtSession, launches: Launches) -> None:
    older = session.input
    session.write(0, picture(), "rgb")
    with pytest.raises(ValueError, match="read-only"):
        older[0] = 1
    session.input[0] = 1
    older[1] = 2


def test_the_hot_path_allocates_nothing(session: TensorRtSession, launches: Launches) -> None:
    image = picture()
    for _ in range(3):
        session.write(0, image, "rgb")
        session.run(1)
    fake.forget()
    for _ in range(10):
        session.write(0, image, "rgb")
        session.run(1)
    assert not set(fake.calls()) & set(SETUP)


def test_layouts_come_and_go(session: TensorRtSession, launches: Launches) -> None:
    for height in range(30, 50):
        image = picture(height)
        session.write(0, image, "rgb")
        assert np.array_equal(session.run(1), answers(row_of(image)[None]))
    assert fake.live()["modules"] == 1 and fake.live()["device"] <= 2 + 2 + 8


def test_the_layout_that_was_not_used_for_longest_makes_room(session: TensorRtSession, launches: Launches) -> None:
    kept, oldest = picture(40), picture(41)
    for image in (kept, oldest, *map(picture, range(42, 48)), kept, picture(48)):
        session.write(0, image, "rgb")
    fake.forget()
    session.write(0, kept, "rgb")
    assert "cuMemAlloc_v2" not in fake.calls()
    session.write(0, oldest, "rgb")
    assert fake.calls().count("cuMemAlloc_v2") == 1


def test_a_picture_too_large_for_the_kernel_is_prepared_on_the_cpu(engine: fake.Engine, launches: Launches) -> None:
    squash = dataclasses.replace(CARD, preprocess=dataclasses.replace(CARD.preprocess, resize="squash"))
    session = TensorRtSession(fake.TRT, engine, fake.LOG, squash, TARGET)
    image, row = np.full((28 * 3200, 28, 3), 9, np.uint8), np.empty(input_shape(CARD), np.int8)
    with pytest.raises(VitEdgeError, match="shared memory"):
        patchify.launch(len(image), 28, 84, "rgb", squash)
    session.write(1, image, "rgb")
    write_input(image, squash, row)
    assert np.array_equal(session.run(2)[1:], answers(row[None]))
    assert not session.write_note and not launches.sizes
    session.close()


def test_what_is_no_picture_is_refused(session: TensorRtSession) -> None:
    with pytest.raises(VitEdgeError, match="must be a non-empty"):
        session.write(0, picture()[..., 0], "rgb")
    for row in (-1, 8):
        with pytest.raises(EngineError, match=f"there is no row {row}"):
            session.write(row, picture(), "rgb")


def test_without_a_compiler_pictures_are_prepared_on_the_cpu(
    engine: fake.Engine, monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    def no_compiler(*_: object) -> bytes:
        raise EngineError("NVRTC does not compile the kernel for 99.0: no such architecture")

    monkeypatch.setattr("vitedge.backends.cuda_pictures.compiled", no_compiler)
    session = TensorRtSession(fake.TRT, engine, fake.LOG, CARD, TARGET)
    image = picture()
    session.write(0, image, "rgb")
    assert np.array_equal(session.run(1), answers(row_of(image)[None]))
    assert "no such architecture" in session.write_note and not launches.sizes
    session.close()


def test_no_memory_for_a_picture_is_told_and_can_be_tried_again(session: TensorRtSession, launches: Launches) -> None:
    session.write(0, picture(), "rgb")
    large = picture(400, 300)
    for function in ("cuMemAlloc_v2", "cuMemHostAlloc"):
        fake.forget()
        fake.fail(function, fake.OUT_OF_MEMORY, after=1)  # the tables of weights still find some
        with pytest.raises(EngineError, match="no GPU memory left"):
            session.write(1, large, "rgb")
        large = picture(500, 300)
    fake.forget()
    session.write(1, large, "rgb")
    assert np.array_equal(session.run(2)[1:], answers(row_of(large)[None]))


@pytest.mark.parametrize("function", ["cuModuleLoadDataEx", "cuMemHostAlloc", "cuMemAlloc_v2"])
def test_no_memory_for_a_layout_is_told_and_the_next_picture_tries_again(
    session: TensorRtSession, launches: Launches, function: str
) -> None:
    if not cubin.compiler_version():
        pytest.skip("there is neither NVRTC nor nvcc")
    image = picture()
    fake.fail(function, fake.OUT_OF_MEMORY)
    for _ in range(2):
        with pytest.raises(EngineError, match="no GPU memory left"):
            session.write(0, image, "rgb")
    fake.forget()
    session.write(0, image, "rgb")
    assert np.array_equal(session.run(1), answers(row_of(image)[None]))
    assert launches.sizes and not session.write_note


def test_an_integrated_gpu_copies_nothing(engine: fake.Engine, launches: Launches) -> None:
    fake.DRIVER.fake_attribute(fake.INTEGRATED, 1)
    session = TensorRtSession(fake.TRT, engine, fake.LOG, CARD, TARGET)
    for turn in range(6):
        image, given = picture(), rows(8)
        if turn % 2:
            session.input[...] = given
        else:
            session.write(0, image, "rgb")
            given = row_of(image)[None]
        assert np.array_equal(session.run(1), answers(given[:1]))
    uploads = fake.calls().count("cuMemcpyHtoDAsync_v2")
    assert uploads == 1 and "cuMemcpyDtoHAsync_v2" not in fake.calls()  # the tables of weights alone
    session.close()


def test_forks_run_in_threads_of_their_own(session: TensorRtSession, launches: Launches) -> None:
    wrong: list[str] = []

    def work(own: TensorRtSession, seed: int) -> None:
        mine = np.random.default_rng(seed)
        for _ in range(30):
            image = mine.integers(0, 256, (40, 30, 3), np.uint8)
            own.write(0, image, "rgb")
            if not np.array_equal(own.run(1), answers(row_of(image)[None])):
                wrong.append("write")
            own.input[:2] = given = mine.integers(-128, 128, (2, *input_shape(CARD)), np.int8)
            if not np.array_equal(own.run(2), answers(given)):
                wrong.append("input")
        own.close()

    threads = [threading.Thread(target=work, args=(session.fork(), seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_session_that_finds_no_memory_leaves_nothing_behind(engine: fake.Engine) -> None:
    for after in range(6):
        fake.fail("cuMemAlloc_v2", fake.OUT_OF_MEMORY, after)
        try:
            TensorRtSession(fake.TRT, engine, fake.LOG, CARD, TARGET).close()
        except EngineError as error:
            assert "GPU memory" in str(error)
        fake.forget()
        gc.collect()
        assert set(fake.live().values()) == {0}
    engine.contexts = len(engine.made)
    with pytest.raises(EngineError, match="not enough GPU memory"):
        TensorRtSession(fake.TRT, engine, fake.LOG, CARD, TARGET)


def test_a_closed_session_says_so_and_closes_again(session: TensorRtSession) -> None:
    shown = session.input
    session.write(0, picture(), "rgb")
    session.close()
    session.close()
    for use in (lambda: session.run(1), lambda: session.write(0, picture(), "rgb"), session.fork):
        with pytest.raises(EngineError, match="the session is closed"):
            use()
    assert shown.shape[0] == 8  # the array itself stays


def test_the_benchmark_takes_a_frame_apart(session: TensorRtSession, launches: Launches) -> None:
    launches.pixels = "nv12"
    target = dataclasses.replace(TARGET, peaks=Peaks({"fp16": 100.0}, 1000.0))
    recipe, work = None, Work({"fp16": 10**9}, {"fp16": 10**6})
    manifest = Manifest(CARD, "fp16", recipe, target, "fp16", "", "", "tensorrt", "0", "", "", work=work)
    engine = Engine(Path(), manifest, session)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(gpu_runtime, "STAGE_RUNS", 3)
        patch.setattr(gpu_runtime, "WARM_RUNS", 3)
        stages = gpu_runtime.stages_of(engine)
        assert list(stages) == ["host copy, upload and kernel", "input upload", "plan", "download"] and min(stages.values()) > 0
        found = list(gpu_runtime.engine_candidates("fp16", engine, stack))
        for candidate in found:
            fake.forget()
            candidate.call()
            assert ("cuGraphLaunch" in fake.calls()) == candidate.facts["graphs"]
        assert [one.facts["preprocess"] for one in found].count("gpu") == 4 and len(found) == 6
        assert all(one.facts["roofline_ms"] == 0.02 for one in found)


def test_the_stand_in_for_tensorrt_of_the_tests_on_a_gpu(launches: Launches) -> None:
    if not cubin.compiler_version():
        pytest.skip("there is neither NVRTC nor nvcc")
    plan = stand_in.Plan(input_shape(CARD))
    with stand_in.open_stand_in(plan, CARD) as engine:
        for count in (2, 2, 2, 3, 2):
            given = rows(3)
            assert np.array_equal(engine(given[:count]), answers(given[:count]))
        image = picture()
        engine.write(1, image)
        assert np.array_equal(engine.run(2)[1:], answers(row_of(image)[None]))
        assert session_of(engine).graphs and not session_of(engine).write_note
    with cuda.Device():
        plan.driver.cuModuleUnload(plan.module)


def session_of(engine: Engine) -> Any:
    return engine._session


def test_a_fault_on_the_gpu_is_told(session: TensorRtSession) -> None:
    session.run(1)
    fake.fail("cuStreamSynchronize", fake.ILLEGAL_ADDRESS)
    with pytest.raises(EngineError, match=r"CUDA failed: cuStreamSynchronize failed: an illegal memory access"):
        session.run(1)
    fake.forget()


def test_a_session_can_be_closed_after_a_fault(engine: fake.Engine) -> None:
    session = TensorRtSession(fake.TRT, engine, fake.LOG, CARD, TARGET)
    for _ in range(3):
        session.run(1)
    fake.fail("cuStreamSynchronize", fake.ILLEGAL_ADDRESS)
    with pytest.raises(EngineError, match="illegal memory access"):
        session.close()
    session.close()


def test_a_session_frees_all_after_a_fault_that_stays(engine: fake.Engine, launches: Launches) -> None:
    session = TensorRtSession(fake.TRT, engine, fake.LOG, CARD, TARGET)
    session.write(0, picture(), "rgb")
    for count in (1, 1, 2, 2):
        session.run(count)
    assert fake.live()["graphs"] == 2
    fake.fault(fake.ILLEGAL_ADDRESS)
    with pytest.raises(EngineError, match="illegal memory access"):
        session.run(1)
    with pytest.raises(EngineError, match="illegal memory access"):
        session.close()
    session.close()
    with pytest.raises(EngineError, match="the session is closed"):
        session.run(1)
    assert set(fake.live().values()) == {0}, fake.live()
