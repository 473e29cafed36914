"""Image files in, what was counted of them in parts out, from the workers of a Ray cluster.

    files, cut into parts  ->  worker: opens engines or a graph once, answers part after part  ->  Part or Findings

What `judge` (bench/accuracy.py) and `conduct` (compiler/survey.py) make of the parts is the same to the last bit as in one
process. A worker computes on one core; one that dies is started anew, and the part it was at is done again. Images, engines and
graphs are read where the worker runs, under the names they have here: a cluster of several machines needs a file system that
all of them see. Knows nothing of what is counted.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vitedge import __version__
from vitedge.bench.accuracy import Case, Judgeable, Part, judge_parts
from vitedge.bench.accuracy import Spread as JudgeSpread
from vitedge.bench.contenders import MAX_BATCH, Contender, Setting, open_contenders
from vitedge.errors import VitEdgeError, first_line, import_package

if TYPE_CHECKING:
    from onnx import ModelProto

    from vitedge.compiler.survey import Findings, Survey
    from vitedge.compiler.survey import Spread as SurveySpread
    from vitedge.images import ImageFile

SURVEYED = 16  # images in a part of a survey, whose statistics are some megabytes
RESTARTS = 20  # of one worker; more is no accident
RETRIES = 4  # of one part: it may be what kills
CONNECTING_S = 5.0  # to a cluster
LOOKING_S = 1.0  # after which parts that take too long are looked for
LATE_S, LATE = 30.0, 4.0  # a part is late after so many seconds, and so many times what the slowest took
AHEAD = 2  # parts that a worker has been given, so that it never waits for the next one

Opener = Callable[[], AbstractContextManager[Sequence[Judgeable]]]


class Desk(Protocol):
    """What is open at a worker, and answers parts."""

    def answer(self, first: int, files: Sequence[ImageFile]) -> Any:
        """What is counted of some files, of which the first is number `first` of all."""

    def close(self) -> None:
        """Free it."""


class Job(Protocol):
    """What a worker is to do with each part; plain data."""

    def open(self) -> Desk:
        """Open what it takes."""


@dataclass(frozen=True, slots=True)
class _Given:
    """To which worker a part was given, the number of its first file, and when, in seconds."""

    number: int
    start: int
    at: float


@dataclass(frozen=True, slots=True)
class _Reply:
    """Of a worker. failure: a sentence and a hint, where it cannot go on. absent: a file that it does not see, or the folder."""

    result: Any = None
    failure: tuple[str, str | None] | None = None
    absent: Path | None = None


@contextmanager
def open_cluster(where: str) -> Iterator[Cluster]:
    """Workers on this machine, as many as it has cores ("local") or as said ("4"), or those of a cluster by its address ("auto",
    "10.0.0.1:6379"). Without the package ray a MissingPackageError; an address at which no cluster is, is a VitEdgeError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_package("ray", "ray")
    count = os.cpu_count() or 1 if where == "local" else int(where) if where.isdecimal() else None
    if count is not None and not 1 <= count <= 1024:
        raise VitEdgeError(f"{count} workers cannot be started here", hint="--ray local starts one for each core")
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, where, count)
    try:
        cluster = Cluster(ray, count or max(1, int(ray.available_resources().get("CPU", 1))))
        try:
            yield cluster
        finally:
            cluster.close()
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, where: str, count: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    if count is not None:
        ray.init(address="local", num_cpus=count, **quiet)  # else it would join what somebody else runs here
        return
    host, _, port = where.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would wait for minutes, and print what it waits for
            socket.create_connection((host, int(port)), CONNECTING_S).close()
        ray.init(address=where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OverflowError, OSError) as error:
        hint = "ray start --head starts one; --ray local needs none"
        raise VitEdgeError(f"there is no Ray cluster at {where}: {first_line(error)}", hint=hint) from error


@contextmanager
def on_one_core(
    names: Sequence[str], checkpoint: Path | None = None, preprocess: Path | None = None, max_batch: int = MAX_BATCH
) -> Iterator[Sequence[Contender]]:
    """What `open_contenders` gives, each on one thread; one that does not open says so where it is used."""
    with open_contenders(names, checkpoint, preprocess, max_batch=max_batch) as found:
        for contender in found:
            with suppress(Exception):
                contender.open(Setting(threads=1))
        yield found


def judging(where: str, opener: Opener) -> JudgeSpread:
    """What `judge` takes to have its parts judged by workers at `where`, which are gone before anything is timed."""
    import_package("ray", "ray")  # said before any work is done

    def spread(case: Case, files: Sequence[ImageFile]) -> Iterator[Part]:
        with open_cluster(where) as cluster:
            yield from cluster.judging(opener)(case, files)

    return spread


@contextmanager
def surveying(where: str) -> Iterator[SurveySpread]:
    """What `calibrate` takes to have the images looked at by the workers at `where`, which end with it."""
    with open_cluster(where) as cluster:
        yield cluster.surveying()


class Cluster:
    """Some workers, which do one job after the other. sent, received: bytes, of the parts and of what was counted of them."""

    def __init__(self, ray: Any, count: int) -> None:
        self.count = count
        self.sent = self.received = 0
        self._ray, self._jobs = ray, 0
        actor = ray.remote(num_cpus=1, max_restarts=RESTARTS, max_task_retries=RETRIES)(_Worker)
        self._workers = [actor.remote(str(Path.cwd())) for _ in range(count)]
        try:
            nodes = ray.get([worker.node.remote() for worker in self._workers])
        except ray.exceptions.RayError as error:
            hint = f"install vitedge {__version__} with its extra `ray` on every machine of the cluster"
            raise VitEdgeError(f"workers cannot be started: {str(error).strip().splitlines()[-1]}", hint=hint) from error
        self._places = [nodes[:index].count(node) for index, node in enumerate(nodes)]  # of each worker, a core of its machine

    def judging(self, opener: Opener) -> JudgeSpread:
        """What `judge` takes to have the parts judged here.

        opener: opens the contenders that `judge` has, and perhaps more; plain data, such as a partial of a module's function.
        """

        def spread(case: Case, files: Sequence[ImageFile]) -> Iterator[Part]:
            for parts in self._spread(_Judging(opener, case), files, case.part):
                yield from parts

        return spread

    def surveying(self) -> SurveySpread:
        """What `calibrate` takes to have the images looked at here."""

        def spread(model: ModelProto, survey: Survey[Any], files: Sequence[ImageFile]) -> Iterator[Findings]:
            return self._spread(_Surveying(model.SerializeToString(), survey), files, SURVEYED)

        return spread

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return list(self._ray.get([worker.pid.remote() for worker in self._workers]))

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []

    def _spread(self, job: Job, files: Sequence[ImageFile], size: int) -> Iterator[Any]:
        """What the workers answer to the files in parts of `size`, as it comes."""
        self._jobs += 1
        shared = [self._ray.put(job)]  # in a list: a worker fetches it only once
        parts = {start: pickle.dumps((start, files[start : start + size])) for start in range(0, len(files), size)}
        waiting, running, slowest = deque(parts), dict[Any, _Given](), 0.0

        def give(number: int, start: int) -> None:
            self.sent += len(parts[start])
            place = self._places[number]
            task = self._workers[number].answer.remote(self._jobs, __version__, place, shared, parts[start])
            running[task] = _Given(number, start, time.monotonic())

        for number in list(range(self.count)) * AHEAD:
            if waiting:
                give(number, waiting.popleft())
        try:
            while parts:
                ready, _ = self._ray.wait(list(running), timeout=LOOKING_S)
                for task in ready:
                    given = running.pop(task)
                    if given.start in parts:  # else another worker was faster
                        try:
                            result = self._received(task)
                        except VitEdgeError:
                            if any(other.start == given.start for other in running.values()):
                                continue
                            raise
                        del parts[given.start]
                        slowest = max(slowest, time.monotonic() - given.at)
                        yield result
                    if waiting:
                        give(given.number, waiting.popleft())
                for number, start in self._late(running, parts, max(LATE_S, LATE * slowest)):
                    give(number, start)
        finally:  # of who asks for no more, or of parts that another worker did
            for task in running:
                self._ray.cancel(task)

    def _late(self, running: dict[Any, _Given], parts: Collection[int], patience_s: float) -> list[tuple[int, int]]:
        """An idle worker for each part that is overdue: its machine may be gone. Whichever answer comes first counts."""
        idle = sorted(set(range(self.count)) - {given.number for given in running.values()})
        latest = {given.start: given.at for given in sorted(running.values(), key=lambda given: given.at)}
        overdue = [start for start, at in latest.items() if start in parts and time.monotonic() - at > patience_s]
        return list(zip(idle, overdue, strict=False))

    def _received(self, task: Any) -> Any:
        try:
            content: bytes = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:  # a bug, or what a runtime raises
            raise VitEdgeError(f"a worker failed: {first_line(error.cause)}") from error
        except self._ray.exceptions.RayError as error:
            hint = "one of the images, or too little memory, may be what kills it: try without --ray"
            raise VitEdgeError(f"a worker died again and again: {first_line(error)}", hint=hint) from error
        self.received += len(content)
        reply: _Reply = pickle.loads(content)
        if reply.failure:
            raise VitEdgeError(reply.failure[0], hint=reply.failure[1])
        if reply.absent and reply.absent.exists():
            hint = "put images and engines on a file system that all machines of the cluster have under one name"
            raise VitEdgeError(f"a worker does not see {reply.absent}", hint=hint)
        return reply.result


class _Worker:
    """One process on one core, which keeps open what the current job takes."""

    def __init__(self, folder: str) -> None:
        self._folder, self._job = folder, 0
        self._desk: Desk | None = None
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def pid(self) -> int:
        """The process."""
        return os.getpid()

    def node(self) -> str:
        """The machine."""
        return str(import_package("ray", "ray").get_runtime_context().get_node_id())

    def answer(self, job: int, version: str, place: int, shared: list[Any], part: bytes) -> bytes:
        """A pickled _Reply to a pickled part of job number `job`. place: which core is that of this worker alone."""
        first, files = pickle.loads(part)
        if self._cores:  # OpenVINO binds its threads to the first cores that it may have, and so in every worker to the same
            os.sched_setaffinity(0, {self._cores[place % len(self._cores)]})
        try:
            reply = self._answer(job, version, shared, first, files)
        except VitEdgeError as error:  # as data: not every one can be made from its message
            reply = _Reply(failure=(str(error), error.hint))
        return pickle.dumps(reply)

    def _answer(self, job: int, version: str, shared: list[Any], first: int, files: Sequence[ImageFile]) -> _Reply:
        if version != __version__:
            raise VitEdgeError(f"vitedge {version} was started, and a worker has {__version__}", hint="install one everywhere")
        if not Path(self._folder).is_dir():
            return _Reply(absent=Path(self._folder))
        os.chdir(self._folder)  # so that relative names mean the same
        absent = next((file.path for file in files if not file.path.exists()), None)
        if job != self._job or self._desk is None:
            if self._desk is not None:
                self._desk.close()
            self._desk = import_package("ray", "ray").get(shared[0]).open()
            self._job = job
        return _Reply(self._desk.answer(first, files), absent=absent)


@dataclass(frozen=True, slots=True)
class _Judging:
    opener: Opener
    case: Case

    def open(self) -> Desk:
        """Open the contenders."""
        return _Bench(self.opener, self.case)


class _Bench:
    """Contenders that are judged."""

    def __init__(self, opener: Opener, case: Case) -> None:
        self._case, self._stack = case, ExitStack()
        found = {contender.name: contender for contender in self._stack.enter_context(opener())}
        self._contenders = [found[name] for name in case.names]

    def answer(self, first: int, files: Sequence[ImageFile]) -> list[Part]:
        """The Parts of some files."""
        return list(judge_parts(self._contenders, self._case, files, first))

    def close(self) -> None:
        """Close the contenders."""
        self._stack.close()


@dataclass(frozen=True, slots=True)
class _Surveying:
    model: bytes
    survey: Survey[Any]

    def open(self) -> Desk:
        """Open the model."""
        return _Lookout(self.model, self.survey)


class _Lookout:
    """A model whose activations are looked at."""

    def __init__(self, model: bytes, survey: Survey[Any]) -> None:
        from vitedge.compiler.survey import open_stored

        self._survey, self._probe = survey, open_stored(model, survey)

    def answer(self, first: int, files: Sequence[ImageFile]) -> Findings:
        """The Findings in some files."""
        from vitedge.compiler.survey import look

        return look(self._probe, self._survey, files, first)

    def close(self) -> None:
        """A session of ONNX Runtime ends with its last reference."""
