"""A request's method, path and headers in, whether it may be answered out.

Two things are kept away: who does not have the token, where one is asked for, and other sites in the browser of somebody who
does. The browser says in `Sec-Fetch-Site` and `Origin` on whose behalf it asks, and in `Host` under which name it found this
address: on loopback a foreign name means that a site had its own name point here (DNS rebinding). Knows nothing of what is
served.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

METHODS = ("GET", "HEAD")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FOREIGN = "this page is not for other sites"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the answer is instead."""

    status: int
    reason: str


class Access:
    """Who may read what is served on `host` and `port`. token: what it takes, None for whoever reaches the address."""

    def __init__(self, host: str, port: int, token: str | None) -> None:
        self._loopback, self._token = is_loopback(host), token
        self.cookie_name = f"vitedge-{port}"  # cookies do not tell ports apart
        self.cookie = "" if token is None else hmac.new(token.encode(), b"a viewer's cookie", hashlib.sha256).hexdigest()

    def refusal(self, method: str, path: str, headers: Mapping[str, str], given: str | None) -> Refusal | None:
        """Why a request is not answered, None where it is. headers: by their names in lower case. given: the token of its URL."""
        host = headers.get("host", "")
        if self._loopback and not is_loopback(_name_of(host)):
            return Refusal(403, f"this address is not called {_name_of(host) or 'nothing'}")
        if _is_foreign(path, headers, host):
            return Refusal(403, FOREIGN)
        if not self._knows_token(headers, given):
            return Refusal(401, "the token is missing or wrong: open the address that vitedge printed")
        if method not in METHODS:
            return Refusal(405, "there is nothing to do here but to look")
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            return Refusal(413, "a request has no body here")
        return None

    def moves_on(self, headers: Mapping[str, str], given: str | None) -> bool:
        """Whether a browser shows the token in its address bar, out of which a cookie gets it."""
        return self._token is not None and given is not None and "text/html" in headers.get("accept", "")

    def _knows_token(self, headers: Mapping[str, str], given: str | None) -> bool:
        if self._token is None:
            return True
        kind, _, credentials = headers.get("authorization", "").partition(" ")
        offered = [(given, self._token), (_cookie(headers, self.cookie_name), self.cookie)]
        if kind.lower() == "bearer":
            offered.append((credentials.strip(), self._token))
        return any([_equal(one, wanted) for one, wanted in offered if one is not None])  # noqa: C419  each takes its time


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address or name."""
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_foreign(path: str, headers: Mapping[str, str], host: str) -> bool:
    """Whether a browser asks on behalf of another site. Who follows a link to the page from there may."""
    origin = headers.get("origin")
    if origin is not None and _host_of(origin) != host.lower():
        return True
    follows = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document" and path == "/"
    return headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not follows


def _host_of(origin: str) -> str:
    """Host and port of an Origin header, "" where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name_of(host: str) -> str:
    """The name or address in a Host header, "" where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(headers: Mapping[str, str], name: str) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return None
    return found.value if found else None


def _equal(one: str, other: str) -> bool:
    """In the same time wherever they differ."""
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode("utf-8", "surrogatepass"))
