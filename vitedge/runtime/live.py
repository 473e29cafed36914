"""An engine and a source in, frames with their predictions out, annotated frames saved on the way.

    source -> Frame -> Predictor or Batcher -> (Frame, Prediction) -> overlay -> recording

A camera's frames are answered one at a time, as soon as can be; those of files and folders many at a time. Knows nothing of
terminals.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from vitedge.errors import VitEdgeError
from vitedge.runtime.camera import CAMERA, open_source
from vitedge.runtime.engine import open_engine
from vitedge.runtime.overlay import draw, names_folder, open_recorder
from vitedge.runtime.predictor import Predictor
from vitedge.runtime.throughput import open_batcher, predict_all
from vitedge.specs import Frame, Prediction

DEFAULT_FPS = 25.0  # of a recording whose source has no rate of its own


def run(
    engine_path: Path, source_name: str, *, save: Path | None, top_k: int, limit: int | None, notes: list[str]
) -> Iterator[tuple[Frame, Prediction]]:
    """Yield every frame of the source with the engine's answer, and save it annotated if `save` says where.

    notes: receives a sentence for each picture that was lost, when the source has ended. Raises VitEdgeError, before
    anything is opened, for a recording that would overwrite its source or be found in it as pictures.
    """
    camera = CAMERA.fullmatch(source_name) is not None
    if save and not camera:
        _check_apart(Path(source_name), save)
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(engine_path, None if camera else 0))
        source = stack.enter_context(open_source(source_name))
        recorder = stack.enter_context(open_recorder(save, source.fps or DEFAULT_FPS)) if save else None
        frames = itertools.islice(source, limit)
        if camera:
            predictor = Predictor(engine, top_k)
            answered = ((frame, predictor(frame)) for frame in frames)
        else:
            answered = predict_all(stack.enter_context(open_batcher(engine, top_k)), frames)
        for frame, prediction in stack.enter_context(closing(answered)):
            if recorder:
                recorder.write(draw(frame, prediction, engine.manifest.card), frame.name)
            yield frame, prediction
        notes += source.skipped


def _check_apart(source: Path, save: Path) -> None:
    """Refuse the source itself, whatever it is called there, and for pictures also the folders in a source folder."""
    real = Path(os.path.realpath(save))
    if _same(source, real):
        raise VitEdgeError(f"{save} is the source, which the recording would overwrite", hint="save to another place")
    if names_folder(save) and any(_same(source, parent) for parent in real.parents):
        message = f"{save} lies in the source folder {source}, whose images the recorded ones would join"
        raise VitEdgeError(message, hint="save to a folder outside of it")


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one is not there yet, or cannot be looked at: opening it says why
        return False
