"""What a user calls something that answers images in, one interface to all of them out.

    engine directory, MODEL/VARIANT                          ->  its backend
    model.onnx, MODEL/VARIANT.onnx [@RUNTIME]                ->  onnxruntime with all optimizations, openvino, tensorrt, ...
    path.py:factory, hf:..., timm:..., torchvision:... [@RUNTIME]   ->  torch, or torch.compile

What a name means is found out at once, so that a mistyped one is said before any work is done. It is opened when it is first
asked to answer. Knows nothing of what is measured.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitedge.backends import BACKENDS, Session, load_backend
from vitedge.backends.build import build_engine, read_manifest, read_source
from vitedge.bench.document import Candidate
from vitedge.bench.sides import TORCH_NAME, is_engine_name, require_torch
from vitedge.errors import VitEdgeError, import_package
from vitedge.runtime.engine import find_engine, open_engine
from vitedge.specs import Manifest, ModelCard, PixelFormat, Target
from vitedge.workspace import find_graph, short_path

TORCH = ("torch", "torch.compile")
MAX_BATCH = 16  # as many as the default target's engines take


@dataclass(frozen=True, slots=True)
class Setting:
    """How something is opened. threads: of the processor, for all streams together; None for as many as it likes.

    streams: how many calls run at a time, 0 for as many as its backend finds best.
    """

    threads: int | None = None
    streams: int = 1


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a contender comes from, as plain data, so that another process can open the same.

    given: as the user called it, without the runtime. checkpoint, preprocess: of a torch model.
    """

    given: str
    runtime: str
    checkpoint: str = ""
    preprocess: str = ""
    max_batch: int = MAX_BATCH


class Contender:
    """Something that answers images, like an Engine: a buffer to write into and a way to run what is in it.

    facts: what is known of it before it is opened. manifest: of an engine, else None. It is opened when it is first used, and
    anew by `open`; `fork` gives what another thread may run at the same time.
    """

    def __init__(self, origin: Origin, facts: Candidate, card: ModelCard, opener: Callable[[Setting], Session]) -> None:
        self.origin, self.facts, self.card = origin, facts, card
        self.max_batch = origin.max_batch
        self.manifest: Manifest | None = None
        self.folder: Path | None = None  # of an engine
        self._opener = opener
        self._session: Session | None = None

    @property
    def name(self) -> str:
        """What it is called, unlike any other that was opened with it."""
        return self.facts.name

    @property
    def ready_made(self) -> Origin:
        """Where another process finds it, as it was built for this run, if it was."""
        if self.folder is None or self.manifest is None:
            return self.origin
        return replace(self.origin, given=str(self.folder), runtime=self.manifest.backend)

    @property
    def input(self) -> NDArray[Any]:
        """[max_batch, ...], int8 patches or uint8 pixels, to write rows into. To be asked for anew after a `write`."""
        return self._opened().input

    def run(self, count: int) -> NDArray[np.float32]:
        """Run the first `count` rows of `input`; float32[count, ...], valid until the next run."""
        return self._opened().run(count)

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat = "rgb") -> None:
        """Preprocess a picture into a row of `input`."""
        self._opened().write(row, picture, pixels)

    def fork(self) -> Session:
        """Another session of it with an input of its own; the two may run at once, in a thread each."""
        return self._opened().fork()

    def open(self, setting: Setting = Setting(), *, elsewhere: bool = False) -> None:
        """Open it, in place of what was open, whose rows it then has in its input.

        elsewhere: in other memory, for which what was open is closed last, and stays where the new one does not open.
        """
        rows = None if self._session is None else self._session.input.copy()
        if not elsewhere:
            self.close()
        session = self._opener(setting)
        if rows is not None:
            session.input[:] = rows
        before, self._session = self._session, session
        if before is not None:
            before.close()

    def close(self) -> None:
        """Free what it holds; a second call does nothing. It opens again where it is used again."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _opened(self) -> Session:
        if self._session is None:
            self.open()
            assert self._session is not None
        return self._session

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def open_contenders(
    names: Sequence[str], checkpoint: Path | None = None, preprocess: Path | None = None, *, max_batch: int = MAX_BATCH
) -> Iterator[list[Contender]]:
    """What each of `names` means, closed in the end.

    checkpoint, preprocess: of every torch model among them. max_batch: that ONNX files and torch models take; an engine takes
    what it was built for. A name that means nothing, a runtime that is not installed, and one thing given twice are
    VitEdgeErrors; what does not open is one where it is first used.
    """
    split = [split_runtime(name) for name in names]
    require_torch([given for given, _ in split], checkpoint, preprocess)
    with tempfile.TemporaryDirectory(prefix="vitedge-bench-") as folder:
        found = [
            _contender(Origin(given, runtime, str(checkpoint or ""), str(preprocess or ""), max_batch), Path(folder))
            for given, runtime in split
        ]
        try:
            _require_distinct(found, names)
            _tell_apart(found)
            yield found
        finally:
            for contender in found:
                contender.close()


def split_runtime(name: str) -> tuple[str, str]:
    """ "x.onnx@openvino" as ("x.onnx", "openvino"); the runtime is "" where none is given."""
    given, at, runtime = name.rpartition("@")
    if not at or Path(name).exists():
        return name, ""
    if runtime not in (*BACKENDS, *TORCH):
        raise VitEdgeError(f"there is no runtime {runtime!r}", hint=f"known: {', '.join((*BACKENDS, *TORCH))}")
    return given, runtime


def _contender(origin: Origin, folder: Path) -> Contender:
    if TORCH_NAME.match(origin.given):
        return _torch(origin)
    if is_engine_name(origin.given):
        return _engine(origin)
    return _graph(origin, folder)


def _engine(origin: Origin) -> Contender:
    path = find_engine(Path(origin.given))
    manifest = read_manifest(path)
    if origin.runtime not in ("", manifest.backend):
        what = f"{origin.given} is an engine of {manifest.backend}, and runs on nothing else"
        raise VitEdgeError(what, hint=f"give the ONNX file that it was made from: MODEL/VARIANT.onnx@{origin.runtime}")
    facts = _built_facts(_facts(manifest.card, manifest.variant, manifest.backend), path, manifest)
    placed = replace(origin, given=str(path), runtime=manifest.backend, max_batch=manifest.target.batch[2])
    contender = Contender(placed, facts, manifest.card, lambda how: open_engine(path, how.streams, how.threads))
    contender.manifest, contender.folder = manifest, path
    return contender


def _graph(origin: Origin, folder: Path) -> Contender:
    path, runtime = find_graph(Path(origin.given)), origin.runtime or "onnxruntime"
    if runtime in TORCH:
        hint = f"give it to {', '.join(BACKENDS)}; or give torch the MODEL that it was made from"
        raise VitEdgeError(f"{runtime} does not run the ONNX file {origin.given}", hint=hint)
    source = read_source(path)
    backend = load_backend(runtime)
    facts = replace(
        _facts(source.card, source.variant, runtime),
        version=backend.version(),
        float_type=source.float_type,
        size_mib=path.stat().st_size / 2**20,
    )
    placed = replace(origin, given=str(path), runtime=runtime)
    target = Target(backend=runtime, batch=(1, 1, origin.max_batch))
    if runtime == "onnxruntime":
        from vitedge.backends.onnxruntime import open_fast

        return Contender(
            placed,
            replace(facts, device=backend.device(target)),
            source.card,
            lambda how: open_fast(path, source.card, replace(target, threads=how.threads, streams=how.streams)),
        )
    contender = Contender(placed, facts, source.card, lambda how: _built(contender, path, target, folder, how))
    return contender


def _built(contender: Contender, graph: Path, target: Target, folder: Path, how: Setting) -> Session:
    """An engine that is made of an ONNX file for this run alone."""
    if contender.folder is None:
        path = build_engine(graph, target, folder)
        manifest = read_manifest(path)
        contender.facts = _built_facts(contender.facts, path, manifest)
        contender.manifest, contender.folder = manifest, path
    return open_engine(contender.folder, how.streams, how.threads)


def _torch(origin: Origin) -> Contender:
    runtime = origin.runtime or "torch"
    if runtime not in TORCH:
        raise VitEdgeError(
            f"{origin.given} is a torch model, which {runtime} does not run", hint="export it first: vitedge export"
        )
    if not _has_compiler():
        raise VitEdgeError("this vitedge came in a bundle, without what runs torch models", hint="measure its engines")
    import_package("torch", "compile")
    from vitedge.compiler import eager

    checkpoint, preprocess = (Path(file) if file else None for file in (origin.checkpoint, origin.preprocess))

    def open_it(how: Setting) -> Session:
        return eager.open_torch(
            origin.given,
            checkpoint,
            preprocess,
            compiled=runtime == "torch.compile",
            max_batch=origin.max_batch,
            threads=how.threads,
            streams=max(1, how.streams),
        )

    card, size_mib = eager.look(origin.given, checkpoint, preprocess)
    facts = replace(_facts(card, "fp32", runtime), version=eager.version(), device="CPU", float_type="fp32", size_mib=size_mib)
    return Contender(replace(origin, runtime=runtime), facts, card, open_it)


def _has_compiler() -> bool:
    return importlib.util.find_spec("vitedge.compiler.eager") is not None


def _facts(card: ModelCard, variant: str, runtime: str) -> Candidate:
    name = f"{card.name}/{variant}@{runtime}"
    size, merged = card.preprocess.size, max(card.merged, default=0)
    return Candidate(name=name, model=card.name, variant=variant, runtime=runtime, image=size, merged=merged)


def _built_facts(facts: Candidate, folder: Path, manifest: Manifest) -> Candidate:
    """The facts with what is known of an engine. A file of its plan that is missing is found when it is opened."""
    plan = [folder / name for name in load_backend(manifest.backend).PLAN]
    return replace(
        facts,
        version=manifest.backend_version,
        device=manifest.device,
        float_type=manifest.float_type,
        size_mib=sum(file.stat().st_size for file in plan if file.is_file()) / 2**20,
    )


def _require_distinct(found: Sequence[Contender], names: Sequence[str]) -> None:
    """Refuse what was given twice: beside itself a thing shows nothing."""
    seen: dict[Origin, str] = {}
    for contender, name in zip(found, names, strict=True):
        given = contender.origin.given
        origin = replace(contender.origin, given=str(Path(given).resolve()) if Path(given).exists() else given)
        if origin in seen:
            what = name if name == seen[origin] else f"{seen[origin]}, as {name},"
            raise VitEdgeError(f"{what} is given twice", hint="give each engine, file or model once")
        seen[origin] = name


def _tell_apart(found: Sequence[Contender]) -> None:
    """Give those that would be called alike the names of their files."""
    counts = Counter(contender.name for contender in found)
    for contender in found:
        if counts[contender.name] > 1:
            stem = Path(contender.origin.given).name.removesuffix(".onnx")
            kind = "" if contender.folder else ".onnx"
            facts = contender.facts
            contender.facts = replace(facts, name=f"{facts.model}/{stem}{kind}@{facts.runtime}")
    if len({contender.name for contender in found}) < len(found):  # of the same file name in several folders
        for contender in found:
            contender.facts = replace(
                contender.facts, name=f"{short_path(Path(contender.origin.given))}@{contender.facts.runtime}"
            )
