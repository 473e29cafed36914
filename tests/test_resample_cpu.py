"""The compiled loops against Pillow, bit for bit: formats, sizes, views, threads, and what happens without numba."""

from __future__ import annotations

import itertools
import os
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.engines import run_python
from tests.test_pixels import picture
from vitedge import preprocess, resample_cpu
from vitedge.pixels import to_rgb
from vitedge.preprocess import input_dtype, input_shape, resize, write_input
from vitedge.specs import ModelCard, PixelFormat, Preprocess

pytest.importorskip("numba")
FORMATS: tuple[PixelFormat, ...] = ("rgb", "bgr", "grey", "yuyv", "nv12")
NARROW, WIDE = st.integers(1, 20), st.integers(1, 500)


def card(size: tuple[int, int], patch: int | None, channels: int = 3, **keys: Any) -> ModelCard:
    mean = (0.5,) * channels
    return ModelCard("test", "classify", Preprocess(size=size, mean=mean, std=mean, channels=channels, **keys), patch)


@st.composite
def cards(draw: st.DrawFn) -> ModelCard:
    """Models of up to 96 pixels a side, of patches or of the image."""
    patch = draw(st.sampled_from([None, 1, 3, 4, 14, 16]))
    side = st.integers(1, 96) if patch is None else st.integers(1, 96 // patch).map(lambda count: count * patch)
    return card(
        (draw(side), draw(side)),
        patch,
        draw(st.sampled_from([1, 3])),
        resize=draw(st.sampled_from(["crop", "squash"])),
        crop_pct=draw(st.sampled_from([1.0, 0.9, 0.875])),
        interpolation=draw(st.sampled_from(["bicubic", "bilinear"])),
    )


def expected(image: NDArray[np.uint8], model: ModelCard, pixels: PixelFormat) -> NDArray[Any]:
    """What Pillow makes of the picture as RGB, cut into patches by numpy."""
    resized, patch = resize(to_rgb(image, pixels), model.preprocess), model.patch
    if patch is None:
        return resized
    height, width, channels = resized.shape
    patches = resized.reshape(height // patch, patch, width // patch, patch, channels).transpose(0, 2, 1, 3, 4)
    return (patches.reshape(-1, patch * patch * channels).astype(np.int16) - 128).astype(np.int8)


def written(image: NDArray[np.uint8], model: ModelCard, pixels: PixelFormat) -> NDArray[Any]:
    """What write_input makes of it."""
    out = np.full(input_shape(model), 77, input_dtype(model))
    write_input(image, model, out, pixels)
    return out


def assert_equal(image: NDArray[np.uint8], model: ModelCard, pixels: PixelFormat = "rgb") -> None:
    np.testing.assert_array_equal(written(image, model, pixels), expected(image, model, pixels))


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """However small the picture and however few the cores."""
    monkeypatch.setattr(resample_cpu, "_cores", lambda: 4)
    monkeypatch.setattr(resample_cpu, "PIXELS_A_THREAD", 1)
    resample_cpu._plan.cache_clear()
    yield
    resample_cpu._plan.cache_clear()


def test_the_loops_are_there() -> None:
    assert resample_cpu.kernels() is not None


@settings(max_examples=300, deadline=None)
@given(NARROW | WIDE, NARROW | WIDE, cards(), st.sampled_from(FORMATS), st.integers(0, 99))
def test_every_size_and_format_is_what_pillow_makes_of_it(
    height: int, width: int, model: ModelCard, pixels: Any, seed: int
) -> None:
    assert_equal(picture(height, width, pixels, seed), model, pixels)


@pytest.mark.usefixtures("four_threads")
@settings(max_examples=100, deadline=None)
@given(NARROW | WIDE, NARROW | WIDE, cards(), st.sampled_from(FORMATS), st.integers(0, 99))
def test_it_is_the_same_from_four_threads(height: int, width: int, model: ModelCard, pixels: Any, seed: int) -> None:
    assert_equal(picture(height, width, pixels, seed), model, pixels)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(1080, 1920, 224), (3000, 5000, 224), (1, 1, 224), (1, 5000, 32), (3000, 1, 32), (480, 640, 518), (37, 53, 224)],
)
@pytest.mark.parametrize(("pixels", "channels"), [("rgb", 3), ("nv12", 3), ("yuyv", 1)])
def test_frames_of_cameras_and_extreme_ones(height: int, width: int, size: int, pixels: Any, channels: int) -> None:
    assert_equal(picture(height, width, pixels), card((size, size), None, channels), pixels)


@pytest.mark.parametrize("pixels", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_frame_that_fits_is_copied(pixels: PixelFormat, channels: int) -> None:
    assert_equal(picture(32, 32, pixels), card((32, 32), 8, channels), pixels)


@pytest.mark.parametrize("levels", [(0, 0), (255, 255), (0, 255)])
def test_black_and_white_overshoot_as_in_pillow(levels: tuple[int, int]) -> None:
    stripes = np.array(levels, np.uint8)[np.arange(300) // 7 % 2]
    assert_equal(np.broadcast_to(stripes[:, None], (200, 300, 3)), card((48, 48), 16))


VIEWS = (
    np.s_[:, ::-1], np.s_[..., ::-1], np.s_[::2, 10:-7], np.s_[::-1], np.s_[::-1, ::-1, ::-1], np.s_[:, ::2], np.s_[3:4, 5:6],
)  # fmt: skip


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("pixels", ["rgb", "bgr"])
def test_views_of_any_strides_are_read_right(view: Any, pixels: PixelFormat) -> None:
    image = picture(100, 131, pixels)
    image.flags.writeable = False
    assert_equal(image[view], card((32, 48), 16), pixels)


@pytest.mark.parametrize("view", [np.s_[:, ::2], np.s_[::-1], np.s_[:, 4:-4], np.s_[:, ::-1]], ids=str)
@pytest.mark.parametrize("pixels", ["grey", "yuyv", "nv12"])
def test_views_of_other_formats_are_read_right(view: Any, pixels: PixelFormat) -> None:
    assert_equal(picture(96, 144, pixels)[view], card((32, 48), 16), pixels)


def test_a_single_row_repeated_is_a_picture() -> None:
    assert_equal(np.broadcast_to(picture(1, 90, "rgb"), (70, 90, 3)), card((32, 48), 16))


@pytest.mark.parametrize("patch", [8, None])
def test_one_row_of_a_batch_is_written_and_no_other(patch: int | None) -> None:
    model = card((40, 24), patch)
    batch = np.full((3, *input_shape(model)), 77, input_dtype(model))
    write_input(picture(99, 77, "nv12"), model, batch[1], "nv12")
    assert (batch[[0, 2]] == 77).all()
    np.testing.assert_array_equal(batch[1], expected(picture(99, 77, "nv12"), model, "nv12"))


@pytest.mark.usefixtures("four_threads")
def test_many_threads_at_once_do_not_disturb_each_other() -> None:
    cases = [
        (picture(90 + 40 * number, 300 - 20 * number, pixels, number), card((32, 32), 8, channels), pixels)
        for number, (pixels, channels) in enumerate(itertools.product(FORMATS, (1, 3)))
    ]
    wanted = [expected(*case) for case in cases]
    start = threading.Barrier(len(cases))

    def repeat(number: int) -> bool:
        start.wait()
        return all(np.array_equal(written(*cases[number]), wanted[number]) for _ in range(20))

    with ThreadPoolExecutor(len(cases)) as pool:
        assert all(pool.map(repeat, range(len(cases))))


@pytest.mark.parametrize("pixels", FORMATS)
def test_a_call_allocates_nothing_that_stays_and_no_buffer(pixels: PixelFormat) -> None:
    model, image = card((64, 64), 16), picture(720, 1280, pixels)
    out = np.empty(input_shape(model), np.int8)
    workers = resample_cpu._pool()._max_workers
    together = threading.Barrier(workers)

    def warm_up(_: int) -> None:
        together.wait()
        written(image, model, pixels)

    list(resample_cpu._pool().map(warm_up, range(workers)))  # now every thread has its scratch
    write_input(image, model, out, pixels)
    tracemalloc.start()
    try:
        write_input(image, model, out, pixels)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10):
            write_input(image, model, out, pixels)
        resample_cpu._pool().submit(int).result()  # behind all that was offered and taken back
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # on a busy machine the pool holds up to 5 kB a call of what was taken back; the scratch alone is 100 kB and more
    assert after - before < 64_000
    assert peak - before < 100_000


def test_plans_are_kept_and_not_for_ever() -> None:
    resample_cpu._plan.cache_clear()
    for width in range(30, 80):
        assert_equal(picture(30, width, "rgb"), card((16, 16), 8))
    assert resample_cpu._plan.cache_info().currsize == resample_cpu._plan.cache_info().maxsize
    assert_equal(picture(30, 79, "rgb"), card((16, 16), 8))
    assert resample_cpu._plan.cache_info().hits == 1


@pytest.mark.parametrize("pixels", FORMATS)
def test_without_the_loops_pillow_gives_the_same(pixels: PixelFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    image, model = picture(120, 90, pixels), card((32, 48), 16)
    compiled = written(image, model, pixels)
    monkeypatch.setattr(resample_cpu, "kernels", lambda: None)
    resized = []
    monkeypatch.setattr(preprocess, "resize", lambda *arguments: resized.append(1) or resize(*arguments))
    np.testing.assert_array_equal(written(image, model, pixels), compiled)
    assert resized


PROGRAM = """
import os, sys
import numpy as np
sys.modules.update({absent})
from vitedge import resample_cpu
from vitedge.preprocess import input_shape, write_input
from vitedge.specs import ModelCard, Preprocess
card = ModelCard("test", "classify", Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3), 8)
image = np.random.default_rng(0).integers(0, 256, (500, 700, 3), np.uint8)
out = np.empty(input_shape(card), np.int8)
write_input(image, card, out)
print(resample_cpu.kernels() is not None, out.tobytes().hex())
"""


@pytest.mark.parametrize(
    ("absent", "environment", "loops"), [("{}", {}, True), ("numba=None", {}, False), ("{}", {"NUMBA_DISABLE_JIT": "1"}, False)]
)
def test_numba_may_be_missing_or_switched_off(absent: str, environment: dict[str, str], loops: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (500, 700, 3), np.uint8)
    done = run_python(PROGRAM.format(absent=absent), **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(loops), expected(image, card((32, 32), 8), "rgb").tobytes().hex()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_a_forked_process_goes_on() -> None:
    done = run_python(
        "import os\n"
        "from vitedge import resample_cpu\n"
        "resample_cpu._cores, resample_cpu.PIXELS_A_THREAD = lambda: 4, 1\n"
        + PROGRAM.format(absent="{}")
        + "first = out.copy()\n"
        "child = os.fork()\n"
        "out[:] = 0\n"
        "write_input(image, card, out)\n"
        "assert np.array_equal(out, first)\n"
        "if child:\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_thread_that_outlives_the_program_goes_on() -> None:
    """The interpreter then lets no pool take work any more."""
    done = run_python(
        "import threading, time\n"
        "from vitedge import resample_cpu\n"
        "resample_cpu._cores, resample_cpu.PIXELS_A_THREAD = lambda: 4, 1\n"
        + PROGRAM.format(absent="{}")
        + "first = out.copy()\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    time.sleep(0.3)\n"
        "    out[:] = 0\n"
        "    write_input(image, card, out)\n"
        "    print(np.array_equal(out, first))\n"
        "threading.Thread(target=late).start()\n"
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.split()[-1] == "True"


def test_what_can_be_kept_nowhere_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = resample_cpu.kernels()
    asked = []

    def njit(signature: Any, **options: Any) -> Any:
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'resample': no locator available for file")
        return lambda function: function

    monkeypatch.setattr(loops, "njit", njit)
    assert loops.compiled_now(len) is len
    assert asked == [{"nogil": True, "cache": True}, {"nogil": True}]
