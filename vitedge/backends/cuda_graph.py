"""Work that is put into a CUDA stream in, a graph that puts all of it there in one launch out: through cuda-bindings.

    graph = capture(stream.handle, lambda: ...)      nothing of it runs
    graph.launch()                                   all of it runs, in the same stream

PyCUDA has no graphs, so they are captured on the handle of its stream. The context must be current (see `cuda.Device`).
Knows nothing of what it captures; addresses are fixed by it, so whoever frees memory closes the graph first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitedge.backends import cuda
from vitedge.errors import EngineError, MissingPackageError, VitEdgeError, first_line, import_package

EXTRA, PACKAGE = "gpu", "cuda-bindings"


def missing() -> str:
    """Why there are no CUDA graphs here, "" where there are."""
    try:
        _driver()
    except MissingPackageError as error:
        return str(error)
    return ""


class Graph:
    """A captured piece of work, bound to the stream that it was captured in."""

    def __init__(self, executable: Any, stream: int) -> None:
        self._driver, self._executable, self._stream = _driver(), executable, stream

    def launch(self) -> None:
        """Begin to run all of it behind what is in the stream."""
        if self._executable is None:
            raise EngineError("the graph is closed")
        (status,) = self._driver.cuGraphLaunch(self._executable, self._stream)
        if status:
            raise _failure("cuGraphLaunch", status)

    def close(self) -> None:
        """Free the graph, once it is done; a second call does nothing."""
        executable, self._executable = self._executable, None
        if executable is not None:
            _checked("cuGraphExecDestroy", executable)


def capture(stream: int, work: Callable[[], object]) -> Graph:
    """The graph of what `work` puts into the stream with the handle `stream`. An EngineError says why it cannot be captured.

    Only calls of this thread are looked at, so others may allocate meanwhile. Whatever happens, Ctrl-C included, the stream can
    be used again; what neither CUDA nor vitedge raised is raised as it is.
    """
    driver = _driver()
    _checked("cuStreamBeginCapture", stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    try:
        work()
    except BaseException as error:
        _abandon(stream)
        if not (isinstance(error, VitEdgeError) or cuda.is_failure(error)):
            raise
        raise EngineError(f"this cannot be captured as a CUDA graph: {first_line(error)}") from error
    graph = _checked("cuStreamEndCapture", stream)
    try:
        return Graph(_checked("cuGraphInstantiate", graph, 0), stream)
    finally:
        _checked("cuGraphDestroy", graph)


def _abandon(stream: int) -> None:
    """End a capture that failed; that it did is known, so no status tells anything new, or may take the place of why."""
    status, graph = _driver().cuStreamEndCapture(stream)
    if not status and int(graph):
        _driver().cuGraphDestroy(graph)


def _checked(function: str, *arguments: Any) -> Any:
    """What a function of CUDA's driver gives beside its status; an EngineError where the status is one."""
    status, *given = getattr(_driver(), function)(*arguments)
    if status:
        raise _failure(function, status)
    return given[0] if given else None


def _failure(function: str, status: Any) -> EngineError:
    _, text = _driver().cuGetErrorString(status)
    said = text.decode() if isinstance(text, bytes) else "no such status is known"
    return EngineError(f"{function} failed: {said} ({int(status)})", hint="start the program again, or set graphs = False")


def _driver() -> Any:
    return import_package("cuda.bindings.driver", EXTRA, PACKAGE)
