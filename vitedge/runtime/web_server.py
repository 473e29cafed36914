"""Requests over HTTP in; the page, pictures and figures of a live view out, as fast as each viewer takes them.

    Guard (web_guard.py)  ->  a route  ->  an answer, or a stream of whatever is newest

Needs Starlette and uvicorn, so it is imported where a live view is opened. All of it runs in one thread with one event loop,
apart from `Site.deliver_soon` and `Site.close`. Nothing waits for a viewer but the task that serves it. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from vitedge.runtime.web_access import Access
from vitedge.runtime.web_figures import Figures
from vitedge.runtime.web_guard import Guard, configure
from vitedge.runtime.web_pictures import Feed, Look, Picture, Pictures
from vitedge.runtime.web_viewers import BOUNDARY, IDLE, Viewer, as_event, as_frame, as_part

PAGE = Path(__file__).parent / "web_page"
FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
MOST_VIEWERS = 16  # of streams, each of which may take a megabyte a second
STALLED_S = 1.0  # after which a viewer gives way to another where there are MOST_VIEWERS
TICK_S = 0.1  # from one message with figures to the next
SNAPSHOT_S = 5.0
NOTHING = PlainTextResponse("there is nothing here", 404)
NO_CAMERA = PlainTextResponse("there is no such camera", 404)


class Site:
    """What a live view serves. listener: a socket that listens already. figures, pictures: of the run."""

    def __init__(self, listener: socket.socket, access: Access, figures: Figures, cameras: int) -> None:
        self._listener, self._figures, self._cameras = listener, figures, range(cameras)
        self._files = {path: (PAGE / name).read_bytes() for path, (name, _) in FILES.items()}
        self._viewers: set[Viewer] = set()
        self._guests: set[Viewer] = set()  # who wait for a single picture
        self._loop = asyncio.new_event_loop()
        self._server = uvicorn.Server(configure(Guard(self._routes(), access)))

    def serve(self, pictures: Pictures) -> None:
        """Answer requests until `close`, in the thread that calls it."""
        self._pictures = pictures
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    def close(self) -> None:
        """Abort all connections and end `serve`, from any thread."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._stop)

    def deliver_soon(self, feed: Feed, picture: Picture) -> None:
        """A new picture, from any thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver, feed, picture)

    async def _serve(self) -> None:
        self._herald = asyncio.create_task(self._tell_all())  # kept: a task that nobody holds may vanish
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            self._abort_all()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    def _stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._abort_all()

    def _abort_all(self) -> None:
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    async def _tell_all(self) -> None:
        """Tell all viewers of figures what is new, in one message for all of them."""
        numbers: list[int] | None = None
        while True:
            await asyncio.sleep(TICK_S)
            listening = [viewer for viewer in self._viewers if viewer.listens]
            if listening:
                message, numbers = self._figures.message(numbers or [0] * len(self._cameras))
                for viewer in listening:
                    viewer.tell(message)

    def _deliver(self, feed: Feed, picture: Picture) -> None:
        for viewer in (*self._viewers, *self._guests):
            viewer.show(feed, picture)

    def _routes(self) -> Router:
        routes = [
            *(Route(path, self._file) for path in FILES),
            Route("/live", self._live),
            Route("/stream/{camera}", self._stream),
            Route("/snapshot/{camera}.jpg", self._snapshot),
            Route("/api/latest", self._latest),
            Route("/api/events", self._events),
            Route("/metrics", self._metrics),
            Route("/healthz", self._health),
        ]
        return Router(routes, redirect_slashes=False, default=NOTHING)

    async def _file(self, request: Request) -> Response:
        path = request.scope["path"]
        return Response(self._files[path], media_type=FILES[path][1])

    async def _latest(self, request: Request) -> Response:
        return JSONResponse(self._figures.latest())

    async def _metrics(self, request: Request) -> Response:
        return Response(self._figures.metrics(len(self._viewers)), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _health(self, request: Request) -> Response:
        ailing = self._figures.ailing()
        return PlainTextResponse("\n".join(ailing or ["ok"]) + "\n", 503 if ailing else 200)

    async def _snapshot(self, request: Request) -> Response:
        """The newest frame with what the model says of it, of full size."""
        feed = self._feed_of(request.path_params["camera"], "full")
        if feed is None:
            return NO_CAMERA
        guest = Viewer([feed])
        self._guests.add(guest)
        try:
            guest.ask(self._pictures)
            await asyncio.wait_for(guest.wake.wait(), SNAPSHOT_S)
        except asyncio.TimeoutError:
            return PlainTextResponse("no frame has come yet", 503)
        finally:
            self._guests.remove(guest)
        jpeg = guest.inbox[feed].jpeg
        return Response(jpeg, media_type="image/jpeg") if jpeg else PlainTextResponse("the frame cannot be shown", 503)

    async def _stream(self, request: Request) -> Response:
        """Pictures as multipart/x-mixed-replace, which <img>, players and OpenCV read."""
        feed = self._feed_of(request.path_params["camera"], "labelled")
        if feed is None:
            return NO_CAMERA
        kind = "multipart/x-mixed-replace; boundary=picture"
        return Stream(self, Viewer([feed], as_part), kind, BOUNDARY)

    async def _events(self, request: Request) -> Response:
        """The figures of the page as server-sent events."""
        return Stream(self, Viewer([], as_event, listens=True), "text/event-stream", b"")

    async def _live(self, request: Request) -> Response:
        """Figures, and pictures of the cameras in `pictures` (numbers with commas; by default all), on one connection."""
        wanted = request.query_params.get("pictures")
        names = [str(camera) for camera in self._cameras] if wanted is None else [name for name in wanted.split(",") if name]
        feeds = [feed for name in names if (feed := self._feed_of(name, "plain"))]
        if len(feeds) < len(names):
            return NO_CAMERA
        return Stream(self, Viewer(feeds, as_frame, listens=True), "application/octet-stream", b"")

    def _feed_of(self, camera: str, look: Look) -> Feed | None:
        """The pictures of a camera by its number as it stands in a URL; None where there is no such camera."""
        return next((Feed(number, look) for number in self._cameras if str(number) == camera), None)

    def admit(self, viewer: Viewer) -> bool:
        """Whether there is room for a viewer; one that has not taken its last picture for a while gives way."""
        if len(self._viewers) >= MOST_VIEWERS:
            slowest = min(self._viewers, key=lambda other: other.busy_since)
            if self._loop.time() - slowest.busy_since < STALLED_S:
                return False
            self.dismiss(slowest)
        self._viewers.add(viewer)
        if viewer.listens:
            viewer.tell(self._figures.message()[0])  # all that is remembered comes first
        return True

    def dismiss(self, viewer: Viewer) -> None:
        """A viewer is gone, or shall go."""
        viewer.leave.set()
        self._viewers.discard(viewer)

    async def send_newest(self, viewer: Viewer, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Send a viewer whatever is newest, over and over; what it has not taken is replaced by what comes after it."""
        viewer.ask(self._pictures)
        while True:
            await viewer.wake.wait()
            taken, parts = viewer.take()
            viewer.busy_since = self._loop.time()
            await send(b"".join(parts))
            await send(b"")  # returns when the viewer has taken all before it
            viewer.busy_since = IDLE
            for feed in taken:
                self._pictures.ask_next(feed)


class Stream(Response):
    """An answer that goes on until the viewer leaves or must."""

    def __init__(self, site: Site, viewer: Viewer, media_type: str, first: bytes) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._site, self._viewer, self._first = site, viewer, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_part(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        if scope["method"] != "HEAD" and not self._site.admit(self._viewer):
            await PlainTextResponse("there are too many viewers", 503, {"Retry-After": "5"})(scope, receive, send)
            return
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body"})
                return
            await send_part(self._first)
            await _first_of(self._site.send_newest(self._viewer, send_part), _gone(receive), self._viewer.leave.wait())
        finally:
            self._site.dismiss(self._viewer)


async def _gone(receive: Receive) -> None:
    """Until the viewer has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(*ways: Any) -> None:
    """Until one of them ends; the others are cancelled. Raises what that one raised."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
