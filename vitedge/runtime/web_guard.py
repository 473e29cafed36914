"""Strangers' connections in, requests that may be answered out.

    connection: one request, bounded in time and size  ->  guard: may it be answered?  ->  an application

Needs uvicorn and Starlette; imported by web_server.py alone. uvicorn parses HTTP, and what it leaves open is closed here: clients
that say nothing or do not read, and more of them than there is room for. Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import quote

import h11
import uvicorn
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vitedge.runtime.web_access import HEADERS, Access, Refusal

MOST_CONNECTIONS = 64
MOST_HEADER_BYTES = 16 * 1024
REQUEST_S = 5.0  # that a connection has to send its request
SEND_S = 5.0  # that a viewer has to take what was sent, before it is dropped
REQUESTS_PER_S, BURST = 50, 100  # beyond which requests wait for their turn
GUARDED = [(name.lower().encode(), value.encode()) for name, value in {**HEADERS, "Connection": "close"}.items()]


class _GoneError(Exception):
    """There is nobody to send to any more."""


class Guard:
    """In front of all routes: who may not is told so, and every answer has the headers that keep other sites out."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._turn = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, message = True, {**message, "headers": [*message.get("headers", []), *GUARDED]}
            try:
                await send(message)
            except Exception as error:
                raise _GoneError from error

        await self._take_turn()
        try:
            await self._answer(scope)(scope, receive, send_guarded)
        except _GoneError:
            pass
        except Exception as error:  # noqa: BLE001  a bug of ours: told where such things are, and the view goes on
            asyncio.get_running_loop().call_exception_handler({"message": "the live view failed", "exception": error})
            if not started:
                with contextlib.suppress(_GoneError):
                    await PlainTextResponse("vitedge failed", 500)(scope, receive, send_guarded)

    async def _take_turn(self) -> None:
        """Let no more than REQUESTS_PER_S through, after a BURST; those beyond wait."""
        now = asyncio.get_running_loop().time()
        self._turn = max(self._turn, now - BURST / REQUESTS_PER_S) + 1 / REQUESTS_PER_S
        if self._turn > now:
            await asyncio.sleep(self._turn - now)

    def _answer(self, scope: Scope) -> ASGIApp:
        request = Request(scope)
        given = request.query_params.get("token")
        refusal = self._access.refusal(request.method, scope["path"], request.headers, given)
        if refusal is not None:
            return _refused(refusal)
        return self._moved_on(scope["path"]) if self._access.moves_on(request.headers, given) else self._app

    def _moved_on(self, path: str) -> Response:
        """The token goes into a cookie, and the page is asked for once more without it.

        By the page itself: a cookie that is only for this site does not go along with a redirect that began at another, as from a
        link in a chat.
        """
        place = f"/{quote(path.lstrip('/'))}"
        answer = HTMLResponse(
            f'<!doctype html><title>vitedge</title><a href="{place}">on</a>', headers={"Refresh": f"0; url={place}"}
        )
        answer.set_cookie(self._access.cookie_name, self._access.cookie, httponly=True, samesite="strict")
        return answer


def _refused(refusal: Refusal) -> Response:
    extra = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": "GET, HEAD"}}
    return PlainTextResponse(refusal.reason, refusal.status, extra.get(refusal.status))


class Connection(H11Protocol):
    """One request of one viewer, aborted where the request does not come or the answer is not taken in time.

    uvicorn waits for ever for a client that says nothing, and a transport that is closed for one that does not read. Nothing is
    buffered here beyond what is being sent, so that the clock runs whenever a viewer is slow.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for its request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self.since, self.asked = self.loop.time(), False
        self._clock = self.loop.call_later(REQUEST_S, transport.abort)
        if len(self.connections) > MOST_CONNECTIONS:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Parse it; the clock stops once, when the request is whole."""
        if not self.asked and len(data) > MOST_HEADER_BYTES:  # the limit of h11 is for what comes in parts
            self.transport.abort()
            return
        try:
            super().data_received(data)
        except h11.ProtocolError:  # what follows a request is none, while that is being answered
            self.transport.abort()
        if self.cycle is not None and not self.asked:
            self.asked = True
            self._clock.cancel()

    def pause_writing(self) -> None:
        """Start the clock for the viewer to take what is being sent."""
        super().pause_writing()
        self._clock.cancel()
        self._clock = self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It has taken all of it."""
        super().resume_writing()
        self._clock.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock, which would keep the connection in memory."""
        self._clock.cancel()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        """Abort the connection that has been without a request for longest, or this one, if there are too many."""
        here = [other for other in self.connections if isinstance(other, Connection) and not other.transport.is_closing()]
        if len(here) > MOST_CONNECTIONS:
            silent = [other for other in here if not other.asked]
            min(silent, key=lambda other: other.since).transport.abort()


def configure(app: ASGIApp) -> uvicorn.Config:
    """What strangers send is no news: uvicorn tells nothing of it on stderr. What fails here is told by the guard."""
    return uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", interface="asgi3", log_config=None, log_level="critical",
        access_log=False, proxy_headers=False, server_header=False, workers=1, timeout_graceful_shutdown=1,
        backlog=MOST_CONNECTIONS, h11_max_incomplete_event_size=MOST_HEADER_BYTES,
    )  # fmt: skip
