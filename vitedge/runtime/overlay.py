"""Frames and what a model said of them in, pictures for people out.

    Frame + Prediction + ModelCard  ->  draw  ->  uint8[H, W, 3] RGB  ->  Recorder: OUT.mp4, OUT.avi or a folder of JPEGs

Knows nothing of engines or sources: whoever has a Prediction can draw it, whoever has pictures can record them.
"""

from __future__ import annotations

import functools
import math
import os
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitedge.errors import VitEdgeError
from vitedge.resampling import seen_region
from vitedge.runtime.opencv import load_cv2
from vitedge.specs import Frame, ModelCard, Prediction, Preprocess, Timing
from vitedge.workspace import staged, writing

Picture = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels

MIN_WIDTH, MAX_UPSCALED_HEIGHT = 320, 1280
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}  # the ones inside every OpenCV; H.264 is missing from the wheels
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
BEST, OTHER = (0, 168, 150), (84, 110, 122)
HEAT_OPACITY, PANEL_OPACITY, BAR_OPACITY = 0.8, 0.6, 0.85
FONT_SCALE = 1 / 36  # of OpenCV's own unit, a line of about 36 pixels
ELLIPSIS = "..."
JPEG_QUALITY = 92
MAX_STEM_BYTES = 200  # a file name may have 255 bytes, and the temporary one is longer


def draw(frame: Frame, prediction: Prediction, card: ModelCard, *, text: bool = True) -> Picture:
    """The frame with its prediction on it, as a new uint8[H, W, 3] RGB array.

    classify: the best labels as bars. dense: the output's one channel as a heat map on the part of the frame that the
    model saw; values outside 0..1 are stretched from their minimum to their maximum. All tasks: the time of the stages.
    text: whether to draw labels and times, which a page that has them beside the picture does without.
    Pictures narrower than 320 pixels are first enlarged by a whole factor. Raises VitEdgeError for a dense output of
    several channels.
    """
    canvas = _enlarged(frame.image)
    if card.task == "dense":
        _draw_heat(canvas, _single_channel(prediction.array), card.preprocess)
    if text:
        unit = max(20, min(canvas.shape[:2]) // 24)  # the height of a row of text
        _draw_timing(canvas, prediction.timing, unit)
        _draw_labels(canvas, prediction.top, unit)
    return canvas


def _enlarged(image: Picture) -> Picture:
    """A C-contiguous copy that is wide enough to write on."""
    height, width = image.shape[:2]
    factor = max(1, min(math.ceil(MIN_WIDTH / width), MAX_UPSCALED_HEIGHT // height))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _single_channel(output: NDArray[np.float32]) -> NDArray[np.float32]:
    if output.ndim < 2 or output.size != output.shape[-1] * output.shape[-2]:
        message = f"only a dense output of one channel can be drawn, not {list(output.shape)}"
        raise VitEdgeError(message, hint="read Prediction.array, or run without --save")
    values: NDArray[np.float32] = output.reshape(output.shape[-2:])
    return values


def _draw_heat(canvas: Picture, values: NDArray[np.float32], preprocess: Preprocess) -> None:
    """Blend the map in, the more opaque the higher the value, so that the background stays visible."""
    cv2 = _cv2()
    rows, columns = seen_region(canvas.shape[0], canvas.shape[1], preprocess)
    (top, bottom), (left, right) = map(round, rows), map(round, columns)
    seen = canvas[top:bottom, left:right]
    heat = cv2.resize(_normalised(values), (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
    levels = cv2.convertScaleAbs(heat, alpha=255)  # 8 bits throughout: the same in floats took four times as long
    shares, colours = _heat_tables()
    cv2.multiply(seen, cv2.applyColorMap(levels, shares), seen, scale=1 / 255)
    cv2.add(seen, cv2.applyColorMap(levels, colours), seen)
    if seen.shape != canvas.shape:
        cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), WHITE, 1)


@functools.cache
def _heat_tables() -> tuple[Picture, Picture]:
    """For each level of heat what is left of the picture, in 255ths, and the colour that is added, both uint8[256, 1, 3]."""
    cv2 = _cv2()
    levels = np.arange(256, dtype=np.uint8)[:, None]
    opacity = HEAT_OPACITY * levels[..., None] / 255
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    shares = np.repeat(np.rint(255 * (1 - opacity)), 3, axis=2)
    return shares.astype(np.uint8), np.rint(colours * opacity).astype(np.uint8)


def _normalised(values: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        message = f"the output to be drawn has values from {low} to {high}"
        raise VitEdgeError(message, hint="an overflow? compare it with the fp32 engine")
    if low < 0 or high > 1:
        values = (values - np.float32(low)) / max(high - low, float(np.finfo(np.float32).tiny))
    return values


def _draw_timing(canvas: Picture, timing: Timing, unit: int) -> None:
    busy_ms = timing.total_ms - timing.capture_ms
    text = f"preprocess {timing.preprocess_ms:.1f}  infer {timing.infer_ms:.1f} ms  {1000 / max(busy_ms, 1e-3):.0f} fps"
    right = min(_text_width(text, 0.75 * unit) + unit, canvas.shape[1])
    _tint(canvas, (0, 0, unit, right), BLACK, PANEL_OPACITY)
    _write(canvas, text, (0, unit // 2, unit, right), 0.75 * unit)


def _draw_labels(canvas: Picture, top: tuple[tuple[str, float], ...], unit: int) -> None:
    """A panel in the lower left corner, one row a label, its bar as long as its probability."""
    height, width = canvas.shape[:2]
    margin, size = unit // 2, 0.85 * unit
    shown = top[: max(1, (height - 2 * unit) // unit)]
    left, right = margin, min(width - margin, 16 * unit)
    first = height - margin - len(shown) * unit
    _tint(canvas, (first, left, height - margin, right), BLACK, PANEL_OPACITY)
    for row, (label, probability) in enumerate(shown):
        upper, lower = first + row * unit, first + (row + 1) * unit
        bar = left + round((right - left) * probability)
        _tint(canvas, (upper + 1, left, lower - 1, bar), OTHER if row else BEST, BAR_OPACITY)
        percent = f"{100 * probability:.1f}%"
        start = right - unit // 4 - _text_width(percent, size)
        _write(canvas, percent, (upper, start, lower, right), size)
        _write(canvas, label, (upper, left + unit // 4, lower, start - unit // 4), size)


def _tint(canvas: Picture, box: Box, colour: tuple[int, int, int], opacity: float) -> None:
    top, left, bottom, right = box
    part = canvas[max(top, 0) : max(bottom, 0), left:right]
    part[...] = np.rint(part * (1 - opacity) + np.multiply(colour, opacity))


def _write(canvas: Picture, text: str, box: Box, size: float) -> None:
    """White text of about `size` pixels a line, centered between top and bottom, shortened until it fits the box."""
    cv2 = _cv2()
    top, left, bottom, right = box
    shown = text
    while text and _text_width(shown, size) > right - left:
        text = text[:-1]
        shown = text.rstrip() + ELLIPSIS if text else ""
    baseline = round((top + bottom + _text_size("X", size)[1]) / 2)
    cv2.putText(canvas, shown, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, size * FONT_SCALE, WHITE, 1, cv2.LINE_AA)


def _text_width(text: str, size: float) -> int:
    return _text_size(text, size)[0]


def _text_size(text: str, size: float) -> tuple[int, int]:
    """Width and height of a capital, without what hangs below the line; OpenCV 4 and 5 come with different fonts."""
    cv2 = _cv2()
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size * FONT_SCALE, 1)
    return width, height


@functools.cache
def _cv2() -> Any:
    """Asked for at each text of each frame: `load_cv2` would go through the environment and the import system again."""
    return load_cv2()


def open_recorder(path: Path, fps: float) -> Recorder:
    """A video for a path that ends in .mp4 or .avi; JPEGs in a folder for one without suffix, or a folder that exists.

    fps: frames a second of the video, positive; a folder has no use for it. Raises VitEdgeError for another suffix or a
    place that cannot be written to.
    """
    return FolderRecorder(path) if names_folder(path) else VideoRecorder(path, fps)


def names_folder(path: Path) -> bool:
    """Whether `open_recorder` takes the path for a folder of pictures."""
    return path.is_dir() or not path.suffix


class Recorder(ABC):
    """Takes pictures until `close`. What was recorded is kept even where the block of `with` fails."""

    @abstractmethod
    def write(self, picture: Picture, name: str = "") -> None:
        """Append a picture, uint8[H, W, 3] RGB, of the frame called `name`."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was recorded; calling it twice is safe."""

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class FolderRecorder(Recorder):
    """Pictures as `<index>-<name>.jpg` in a folder, made where it is missing; each is whole as soon as it is there."""

    def __init__(self, folder: Path) -> None:
        _make_folder(folder)
        self._folder = folder
        self._count = 0

    def write(self, picture: Picture, name: str = "") -> None:
        stem = "-".join(part for part in (f"{self._count:06d}", Path(name).stem) if part)
        with staged(self._folder / f"{_cut(stem)}.jpg") as temporary:
            Image.fromarray(picture).save(temporary, quality=JPEG_QUALITY)
        self._count += 1

    def close(self) -> None:
        """Nothing is left to do."""


class VideoRecorder(Recorder):
    """Pictures in one video file. Until closed it lies beside `path` under a hidden name; without a picture there is no file.

    The first picture gives the size, less a last odd row or column that codecs refuse; others are scaled into it with
    their proportions kept. `close` raises VitEdgeError, and leaves the file that was there before, if not all of them can
    be read back: OpenCV's writers do not say that a disk is full.
    """

    def __init__(self, path: Path, fps: float) -> None:
        if path.suffix.lower() not in CODECS:
            raise VitEdgeError(f"cannot record {path.name}", hint=f"known: {', '.join(CODECS)}, or a folder for single pictures")
        if not 0 < fps < math.inf:
            raise VitEdgeError(f"a video needs a positive number of frames a second, not {fps}")
        _make_folder(path.parent)
        self._path = path
        self._fps = fps
        self._size = (0, 0)
        self._count = 0
        self._writer: Any = None
        self._opened = ExitStack()  # ends the video, checks it, then gives it its name

    def write(self, picture: Picture, name: str = "") -> None:
        cv2 = _cv2()
        if self._writer is None:
            self._size = (max(2, picture.shape[0] & ~1), max(2, picture.shape[1] & ~1))
            self._open()
        self._writer.write(cv2.cvtColor(_fitted(picture, self._size), cv2.COLOR_RGB2BGR))
        self._count += 1

    def close(self) -> None:
        self._writer = None
        self._opened.close()

    def _open(self) -> None:
        with ExitStack() as opening:
            partial = opening.enter_context(staged(self._path))
            self._writer = self._video_writer(partial)
            opening.callback(self._check, partial)
            opening.callback(self._writer.release)
            self._opened = opening.pop_all()

    def _video_writer(self, partial: Path) -> Any:
        cv2 = _cv2()
        codec = CODECS[partial.suffix.lower()]
        writer = cv2.VideoWriter(str(partial), cv2.VideoWriter_fourcc(*codec), self._fps, self._size[::-1])
        if not writer.isOpened():
            described = f"{codec} of {self._size[1]} x {self._size[0]} pixels at {self._fps:g} frames a second"
            hint = "try the other of .mp4 and .avi, and see whether the disk is full"
            raise VitEdgeError(f"OpenCV cannot write {self._path}: {described}", hint=hint)
        return writer

    def _check(self, partial: Path) -> None:
        if _ends_at(partial, self._count):
            return
        readable = _readable_frames(partial)  # slow, but sure: not every container can count or seek
        if readable < self._count:
            message = f"only {readable} of {self._count} frames could be written to {self._path}, is the disk full?"
            raise VitEdgeError(message, hint="free some space, or save elsewhere; what was there before has not been touched")


def _cut(stem: str) -> str:
    """The stem without the characters of its end that make it longer than MAX_STEM_BYTES."""
    while len(stem.encode("utf-8", "surrogatepass")) > MAX_STEM_BYTES:
        stem = stem[:-1]
    return stem


def _make_folder(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VitEdgeError(f"cannot write to the folder {folder}", hint="give one that you may write to")


def _ends_at(video: Path, count: int) -> bool:
    """Whether the video announces `count` frames and the last of them decodes."""
    cv2 = _cv2()
    capture = cv2.VideoCapture(str(video))
    try:
        announced = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        return bool(announced == count and capture.set(cv2.CAP_PROP_POS_FRAMES, count - 1) and capture.read()[0])
    finally:
        capture.release()


def _readable_frames(video: Path) -> int:
    capture = _cv2().VideoCapture(str(video))
    try:
        return sum(1 for _ in iter(lambda: capture.read()[0], False))
    finally:
        capture.release()


def _fitted(picture: Picture, size: tuple[int, int]) -> Picture:
    """The picture at exactly `size` (height, width): its odd edge cut off, or scaled and centered on black."""
    height, width = size
    if picture.shape[0] in (height, height + 1) and picture.shape[1] in (width, width + 1):
        return picture[:height, :width]
    cv2 = _cv2()
    scale = min(height / picture.shape[0], width / picture.shape[1])
    rows, columns = max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale))
    fitted = np.zeros((height, width, 3), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    fitted[top : top + rows, left : left + columns] = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA)
    return fitted
