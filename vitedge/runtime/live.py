"""An engine and a source in, frames with their predictions out, annotated frames saved on the way.

    source -> Frame -> Predictor -> (Frame, Prediction) -> overlay -> recording

Knows nothing of terminals.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from vitedge.errors import VitEdgeError
from vitedge.runtime.camera import CAMERA, open_source
from vitedge.runtime.engine import open_engine
from vitedge.runtime.overlay import draw, names_folder, open_recorder
from vitedge.runtime.predictor import Predictor
from vitedge.specs import Frame, Prediction

DEFAULT_FPS = 25.0  # of a recording whose source has no rate of its own


def run(
    engine_path: Path, source_name: str, *, save: Path | None, top_k: int, limit: int | None, notes: list[str]
) -> Iterator[tuple[Frame, Prediction]]:
    """Yield every frame of the source with the engine's answer, and save it annotated if `save` says where.

    notes: receives a sentence for each picture that was lost, when the source has ended. Raises VitEdgeError, before
    anything is opened, for a recording that would overwrite its source or be found in it as pictures.
    """
    if save and not CAMERA.fullmatch(source_name):
        _check_apart(Path(source_name), save)
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(engine_path))
        source = stack.enter_context(open_source(source_name))
        recorder = stack.enter_context(open_recorder(save, source.fps or DEFAULT_FPS)) if save else None
        predictor = Predictor(engine, top_k)
        for frame in itertools.islice(source, limit):
            prediction = predictor(frame)
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
