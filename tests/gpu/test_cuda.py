"""The CUDA side of the runtime on a GPU. Skipped where there is none; `make test-gpu` runs it.

What can be tried without a GPU is in tests/driver/cases.py; here is what only a GPU can tell: that the kernel computes what the
CPU does, that a replayed graph answers as the plain run does, that memory stays flat, and that errors leave the device usable.
"""

from __future__ import annotations

import gc
import importlib.util
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import Made, input_rows
from tests.gpu.stand_in import Plan, open_stand_in
from tests.gpu.test_tensorrt import BACKENDS
from vitedge.backends import cubin, cuda, cuda_graph
from vitedge.backends.build import build_engine, read_source
from vitedge.backends.cuda_pictures import Pictures
from vitedge.errors import EngineError
from vitedge.preprocess import input_dtype, input_shape, write_input
from vitedge.runtime.engine import Engine, open_engine
from vitedge.specs import ModelCard, PixelFormat, Preprocess, Target

pytestmark = pytest.mark.skipif(cuda.find_gpu() is None, reason="there is no NVIDIA GPU here, or no PyCUDA")
no_graphs = pytest.mark.skipif(bool(cuda_graph.missing()), reason="cuda-bindings is not installed: pip install cuda-bindings")
no_kernels = pytest.mark.skipif(
    cuda.find_gpu() is not None and not cubin.compiler_version(), reason="there is neither NVRTC nor nvcc"
)
FORMATS: tuple[PixelFormat, ...] = ("rgb", "bgr", "grey", "yuyv", "nv12")
SIZES = ((1080, 1920), (480, 640), (224, 224), (720, 1280), (2160, 3840), (50, 2), (2, 50), (226, 230))
CARDS = {
    "patches": ModelCard(name="patches", task="embed", preprocess=Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3), patch=16),
    "patches of 14, squashed": ModelCard(
        name="squashed", task="embed", patch=14,
        preprocess=Preprocess((224, 280), (0.5,) * 3, (0.5,) * 3, resize="squash", interpolation="bilinear"),
    ),
    "image": ModelCard(name="image", task="embed", preprocess=Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3), patch=None),
    "grey patches": ModelCard(name="grey", task="embed", preprocess=Preprocess((28, 28), (0.5,), (0.5,), channels=1), patch=7),
}  # fmt: skip
RUNS, WARM_RUNS = 10_000, 300
FLAT_MIB = 8  # that the process may grow by in RUNS runs: allocators keep a little


@pytest.fixture(scope="module", params=[*BACKENDS, "stand-in"])
def opens(request: pytest.FixtureRequest, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Engine]:
    """Opens an engine of the small model; or where nothing builds for this GPU, the stand-in, which takes the same input."""
    graph = made.graphs["fp32"]
    if request.param != "stand-in":
        try:
            return partial(open_engine, build_engine(graph, Target("local", request.param), tmp_path_factory.mktemp("engines")))
        except EngineError as error:
            pytest.skip(str(error))
    if cuda_graph.missing() or not cubin.compiler_version():
        pytest.skip("the stand-in for TensorRT needs cuda-bindings, and NVRTC or nvcc")
    card = read_source(graph).card
    return partial(open_stand_in, Plan(input_shape(card)), card)


@pytest.fixture
def engine(opens: Callable[[], Engine]) -> Iterator[Engine]:
    with opens() as opened:
        yield opened


def session_of(engine: Engine) -> Any:
    """The session in an engine, with its switches."""
    return engine._session


def picture(height: int, width: int, pixels: PixelFormat = "rgb", seed: int = 0) -> NDArray[np.uint8]:
    shape = {"grey": (height, width), "nv12": (height * 3 // 2, width), "yuyv": (height, width, 2)}.get(
        pixels, (height, width, 3)
    )
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def rss_mib() -> float:
    """What the process has in memory."""
    return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * 4096 / 2**20


# Facts, buffers, events


def test_the_facts_of_the_gpu() -> None:
    gpu = cuda.require_gpu()
    assert gpu.name and gpu.memory_mib > 1000 and gpu.processors >= 1
    assert tuple(map(int, gpu.capability.split("."))) >= (5, 0) and int(gpu.driver.split(".")[0]) >= 12


@pytest.mark.parametrize("mapped", [False, True])
def test_a_buffer_goes_there_and_back(mapped: bool) -> None:
    rows = np.random.default_rng(1).integers(-128, 128, (8, 196, 768)).astype(np.int8)
    with cuda.Device():
        stream, buffer = cuda.Stream(), cuda.Buffer(rows.shape, rows.dtype, mapped=mapped)
        buffer.host[...] = rows
        buffer.upload(8, stream)
        stream.synchronize()
        if not mapped:
            buffer.host[...] = 0
        back = buffer.download(8, stream)
        stream.synchronize()
        assert np.array_equal(back, rows)
        buffer.close()
        stream.close()


def test_events_measure_what_a_copy_takes() -> None:
    with cuda.Device():
        stream, buffer = cuda.Stream(), cuda.Buffer((64, 2**20), np.dtype(np.uint8))
        before, after = cuda.Event(timed=True), cuda.Event(timed=True)
        before.record(stream)
        buffer.upload(64, stream)
        after.record(stream)
        after.synchronize()
        assert 0.1 < after.ms_since(before) < 1000  # 64 MiB: PCIe 3 to NVLink, or a laptop
        for owned in (before, after, buffer, stream):
            owned.close()


def test_use_after_close_is_an_error_and_closing_twice_is_not() -> None:
    with cuda.Device():
        stream, buffer, event = cuda.Stream(), cuda.Buffer((2, 2), np.dtype(np.uint8)), cuda.Event()
        held = buffer.host
        for owned in (buffer, event, stream) * 2:
            owned.close()
        for use in (lambda: buffer.upload(1, stream), stream.synchronize, event.synchronize):
            with pytest.raises(EngineError, match="is closed"):
                use()
        held[...] = 1  # the array is whole as long as somebody has it


def test_out_of_memory_is_an_engine_error_and_passes() -> None:
    with cuda.Device() as device:
        if cuda.require_gpu().integrated:
            pytest.skip("memory of an integrated GPU is that of the whole machine")
        stream, taken = cuda.Stream(), list[Any]()
        free = device.free_mib()
        driver = cuda._driver()
        taken.append(driver.mem_alloc(int(free - 200) * 2**20))  # all but 200 MiB, without its twin on the host
        with pytest.raises(EngineError, match="no GPU memory left") as caught:
            cuda.Buffer((1024, 2**20), np.dtype(np.uint8))
        assert caught.value.hint
        del caught
        gc.collect()
        taken.pop().free()
        buffer = cuda.Buffer((1024, 2**20), np.dtype(np.uint8))
        buffer.upload(1024, stream)
        stream.synchronize()
        buffer.close()
        stream.close()


# The kernel


@no_kernels
@pytest.mark.parametrize("pixels", FORMATS)
@pytest.mark.parametrize("name", CARDS)
def test_the_kernel_equals_the_cpu_bit_for_bit(name: str, pixels: PixelFormat) -> None:
    card = CARDS[name]
    shape = input_shape(card)
    with cuda.Device():
        stream, out = cuda.Stream(), cuda.Buffer((3, *shape), input_dtype(card))
        pictures = Pictures(card, cuda.require_gpu())
        for seed, (height, width) in enumerate(SIZES * 2):  # the second time with nothing left to make
            image, wanted = picture(height, width, pixels, seed), np.zeros(shape, input_dtype(card))
            write_input(image, card, wanted, pixels)
            layout = pictures.layout(image, pixels, stream)
            pictures.write(image, layout, out.row_address(1), stream)
            given = out.download(3, stream)
            stream.synchronize()
            assert np.array_equal(given[1], wanted), (height, width, np.abs(given[1].astype(int) - wanted).max())
            assert not given[0].any() or seed, "a row beside it was written"
        for owned in (pictures, out, stream):
            owned.close()


@no_kernels
def test_a_damaged_kernel_in_the_cache_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card, image = CARDS["patches"], picture(480, 640)
    for damage in (
        lambda data: data,
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\x7fELF" + bytes(500),
    ):
        for path in tmp_path.rglob("*.cubin"):
            path.write_bytes(damage(path.read_bytes()))
        with cuda.Device():
            stream, out = cuda.Stream(), cuda.Buffer((1, *input_shape(card)), input_dtype(card))
            pictures = Pictures(card, cuda.require_gpu())
            pictures.write(image, pictures.layout(image, "rgb", stream), out.address, stream)
            given = out.download(1, stream)
            stream.synchronize()
            wanted = np.zeros(input_shape(card), input_dtype(card))
            write_input(image, card, wanted)
            assert np.array_equal(given[0], wanted)
            for owned in (pictures, out, stream):
                owned.close()
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


# Sessions


@no_kernels
@pytest.mark.parametrize("pixels", FORMATS)
def test_a_written_picture_answers_as_one_that_the_cpu_prepared(engine: Engine, pixels: PixelFormat) -> None:
    card, rows = engine.manifest.card, np.zeros((4, *engine.input.shape[1:]), engine.input.dtype)
    for turn in range(5):
        images = [picture(480, 640, pixels, seed) for seed in range(turn, turn + 4)]
        for row, image in zip(rows, images, strict=True):
            write_input(image, card, row, pixels)
        wanted = engine(rows)
        for row, image in enumerate(images):
            engine.write(row, image, pixels)
        assert np.array_equal(engine.run(4), wanted)
        assert np.array_equal(engine.run(4), wanted)
        assert np.array_equal(engine.input[:4], rows)
    assert not session_of(engine).write_note


@no_graphs
@pytest.mark.parametrize("backend_batch", [1, 3, 8])
def test_a_graph_answers_as_the_plain_run_does(engine: Engine, made: Made, backend_batch: int) -> None:
    rows, session = input_rows(engine, made.images, 8), session_of(engine)
    session.graphs = False
    plain = [engine(rows[start:][:backend_batch]) for start in range(0, 9 - backend_batch)]
    session.graphs = True
    for _ in range(3):
        for start, wanted in enumerate(plain):
            assert np.array_equal(engine(rows[start:][:backend_batch]), wanted)
    assert session.graphs and not session.graphs_note, session.graphs_note


@no_graphs
def test_batch_sizes_may_change_from_run_to_run(engine: Engine, made: Made) -> None:
    rows, session = input_rows(engine, made.images, 8), session_of(engine)
    session.graphs = False
    wanted = {count: engine(rows[:count]) for count in range(1, 9)}
    session.graphs = True
    for count in np.random.default_rng(0).integers(1, 9, 200).tolist():
        assert np.array_equal(engine(rows[:count]), wanted[count]), count
    assert session.graphs


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=no_graphs)])
@pytest.mark.parametrize("written", [False, pytest.param(True, marks=no_kernels)])
def test_memory_stays_flat(engine: Engine, made: Made, graphs: bool, written: bool) -> None:
    session, rows, image = session_of(engine), input_rows(engine, made.images, 2), picture(480, 640)
    session.graphs = graphs
    device = cuda.Device()

    def runs(count: int) -> None:
        for _ in range(count):
            if written:
                engine.write(0, image)
                engine.write(1, image)
            else:
                engine.input[:2] = rows
            engine.run(2)

    runs(WARM_RUNS)
    gc.collect()
    free, resident = device.free_mib(), rss_mib()
    runs(RUNS)
    gc.collect()
    assert abs(device.free_mib() - free) < 1  # others on the GPU are not expected
    assert rss_mib() - resident < FLAT_MIB


def test_sessions_come_and_go_without_leaving_anything(opens: Callable[[], Engine]) -> None:
    device = cuda.Device()

    def come_and_go() -> None:
        with opens() as engine:
            for _ in range(4):
                engine.write(0, picture(480, 640))
                engine.run(1)

    for _ in range(3):
        come_and_go()
    gc.collect()
    free = device.free_mib()
    for _ in range(20):
        come_and_go()
    gc.collect()
    assert abs(device.free_mib() - free) < 4


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=no_graphs)])
def test_two_contexts_run_in_two_threads(engine: Engine, graphs: bool) -> None:
    images = [picture(480, 640, seed=seed) for seed in range(2)]
    wanted = []
    for image in images:
        engine.write(0, image)
        wanted.append(engine.run(1).copy())
    wrong: list[int] = []

    def work(own: Engine, number: int) -> None:
        session_of(own).graphs = graphs
        for _ in range(300):
            own.write(0, images[number])
            if not np.array_equal(own.run(1), wanted[number]):
                wrong.append(number)
        own.close()

    threads = [threading.Thread(target=work, args=(engine.fork(), number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_engine_says_so(opens: Callable[[], Engine]) -> None:
    engine = opens()
    engine.write(0, picture(100, 100))
    engine.close()
    engine.close()
    for use in (lambda: engine.run(1), lambda: engine.write(0, picture(100, 100)), lambda: engine.input):
        with pytest.raises(EngineError, match="is closed"):
            use()


def test_torch_in_the_same_process_is_not_disturbed(engine: Engine, made: Made) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    rows = input_rows(engine, made.images, 2)
    wanted = engine(rows)
    left = torch.arange(64, dtype=torch.float32, device="cuda").reshape(8, 8)
    expected = left @ left
    for _ in range(20):
        assert np.array_equal(engine(rows), wanted)
        assert torch.equal(left @ left, expected)
    with cuda.Device():
        assert torch.equal(left @ left, expected)  # the context is the one that torch has
    assert torch.equal(left @ left, expected)
