"""An engine directory in, an open engine out.

    with open_engine("engines/fashion-vit/int8-0123456789ab") as engine:
        engine.input[0] = ...            # written in place by preprocessing
        scores = engine.run(1)           # float32[1, classes]

Everything that could make an engine give wrong answers is checked before it is opened. Needs numpy and one backend;
knows nothing of torch or onnx.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.backends import Session, load_backend
from vitedge.backends.build import plan_sha256, read_manifest
from vitedge.errors import EngineError, VitEdgeError
from vitedge.specs import Manifest, ModelCard, PixelFormat
from vitedge.workspace import find_engines, short_path


def open_engine(path: str | Path, streams: int | None = None, threads: int | None = None) -> Engine:
    """Open the engine in the directory `path`, after checking that it is whole and fits this machine.

    streams: how many forks of it compute at a time, 0 for as many as the backend finds best. threads: of the processor, for all
    of them together. By default, both as its target says.
    EngineError: not an engine, a plan that was changed or cut short, one made by a newer backend, or one whose float
    type this device does not compute in.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    backend = load_backend(manifest.backend)
    missing = [name for name in backend.PLAN if not (folder / name).is_file()]
    if missing or plan_sha256(folder, backend.PLAN) != manifest.plan_sha256:
        what = f"{missing[0]} is missing" if missing else "its plan is not the one that its manifest describes"
        raise EngineError(f"{folder} is damaged: {what}", hint="it was cut short or changed; build it again, or copy it again")
    try:
        backend.check(manifest)
    except EngineError as error:
        raise EngineError(f"{folder} does not fit this machine: {error}", hint=error.hint) from error
    if manifest.float_type not in backend.float_types(manifest.target):
        raise EngineError(
            f"{folder} computes in {manifest.float_type}, which {backend.device(manifest.target)} does not do natively",
            hint="build the engine again on this machine",
        )
    target = manifest.target
    manifest = replace(
        manifest,
        target=replace(target, streams=target.streams if streams is None else streams, threads=threads or target.threads),
    )
    return Engine(folder, manifest, backend.open(folder, manifest.card, manifest.target, manifest.float_type))


def find_engine(name: Path) -> Path:
    """The engine directory `name`, or for MODEL/VARIANT the one made last of those that open here, or, if none does, of all."""
    found = find_engines(name)
    return next((folder for folder in found if len(found) > 1 and _fits_here(folder)), found[0])


def _fits_here(folder: Path) -> bool:
    """Whether an engine is for a machine like this one, as far as its manifest tells."""
    try:
        manifest = read_manifest(folder)
        backend = load_backend(manifest.backend)
        if not backend.runs_here(manifest.target):
            return False
        backend.check(manifest)
    except VitEdgeError:
        return False
    return True


class Engine:
    """An open engine: a buffer to write into and a way to run what is in it.

    max_batch: the largest batch it was built for. streams: how many forks of it compute at a time.

    Threads that share an engine take turns: `run`, a call and `close` wait for one another. There is one buffer for what
    goes in and one for what comes out, though, and each call overwrites both. So threads must agree on who fills `input`
    and until when an answer of `run` is read, or use `engine(rows)`, which copies in, runs and copies out in one turn, or
    open one engine each.
    """

    def __init__(self, path: Path, manifest: Manifest, session: Session) -> None:
        self.path, self.manifest = path, manifest
        self.streams, self.max_batch = session.streams, manifest.target.batch[2]
        self._session: Session | None = session
        self._turn = threading.RLock()  # a call holds it around its run

    @property
    def card(self) -> ModelCard:
        """What the model is and how it is fed."""
        return self.manifest.card

    @property
    def name(self) -> str:
        """Its directory, as short as it can be said."""
        return short_path(self.path)

    @property
    def input(self) -> NDArray[Any]:
        """[max_batch, ...], int8 patches or uint8 pixels, to write rows into. To be asked for anew after a `write`.

        `write` may leave its row on the GPU: then this brings it back, and an array from before cannot be written into. That
        holds for the array itself, not for views taken of it (`row = engine.input[0]`): what they write after a `write` is lost.
        """
        return self._open().input

    def run(self, count: int) -> NDArray[np.float32]:
        """Run the first `count` rows of `input`; float32[count, ...], valid until the next run of whatever thread.

        A count below the smallest batch of the target runs that batch, with whatever the other rows hold.
        """
        if not 1 <= count <= self.max_batch:
            hint = f"run in parts of at most {self.max_batch}, or build with a larger batch in the target"
            raise EngineError(
                f"a batch of {count} does not fit this engine, which was built for 1 to {self.max_batch}", hint=hint
            )
        with self._turn:
            return self._open().run(max(count, self.manifest.target.batch[0]))[:count]

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat = "rgb") -> None:
        """Preprocess a picture, laid out as `vitedge.pixels` says, into a row of `input`."""
        if not 0 <= row < self.max_batch:
            raise EngineError(f"there is no row {row}: the engine was built for {self.max_batch}", hint="rows count from 0")
        with self._turn:
            self._open().write(row, picture, pixels)

    def fork(self) -> Engine:
        """The same plan, opened once more with an `input` of its own: engines that run in a thread each, and are closed each."""
        with self._turn:
            return Engine(self.path, self.manifest, self._open().fork())

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Copy `rows` ([count, ...] of the input's dtype) in, run them, and return a copy of the answer; safe in any thread."""
        with self._turn:
            given = self.input
            if rows.dtype != given.dtype or rows.shape[1:] != given.shape[1:]:
                wanted = ", ".join(map(str, given.shape[1:]))
                raise EngineError(
                    f"the engine takes {given.dtype}[batch, {wanted}], not {rows.dtype}{list(rows.shape)}",
                    hint="vitedge.preprocess.write_input makes such rows from images",
                )
            given[: min(len(rows), self.max_batch)] = rows[: self.max_batch]
            answer: NDArray[np.float32] = self.run(len(rows)).copy()
        return answer

    @property
    def size_mib(self) -> float:
        """Size of the plan on disk, in MiB."""
        return sum((self.path / name).stat().st_size for name in load_backend(self.manifest.backend).PLAN) / 2**20

    def close(self) -> None:
        """Free the backend's memory; a second call does nothing."""
        with self._turn:
            if self._session is not None:
                self._session.close()
                self._session = None

    def _open(self) -> Session:
        if self._session is None:
            raise EngineError(f"{self.path} is closed")
        return self._session

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
