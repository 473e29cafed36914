"""Who may read: with the token, under the address's own name, and on behalf of no other site."""

from __future__ import annotations

import pytest

from vitedge.runtime.web_access import Access, is_loopback

TOKEN = "a-token_of.letters"
BROWSER = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def status(access: Access, given: str | None = None, *, method: str = "GET", path: str = "/metrics", **headers: str) -> int:
    named = {"host": "localhost:8080", **{name.replace("_", "-"): value for name, value in headers.items()}}
    refusal = access.refusal(method, path, named, given)
    return refusal.status if refusal else 200


@pytest.mark.parametrize(
    "host", ["localhost:8080", "localhost", "127.0.0.1:9", "127.8.9.1", "[::1]:8080", "LOCALHOST", "a.localhost:1"]
)
def test_on_loopback_its_own_names_are_answered_also_through_a_tunnel(host: str) -> None:
    assert status(Access("127.0.0.1", 8080, None), host=host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "192.168.1.5",
        "",
        "[",
        "::1",
        "@localhost.x",
    ],
)
def test_on_loopback_a_foreign_name_is_dns_rebinding(host: str) -> None:
    assert status(Access("127.0.0.1", 8080, None), host=host) == 403
    assert status(Access("127.0.0.1", 8080, TOKEN), TOKEN, host=host) == 403


@pytest.mark.parametrize("origin", ["http://[::1", "http://evil.example", "null", "[", ""])
def test_an_origin_that_is_none_of_ours_or_none_at_all_is_refused(origin: str) -> None:
    assert status(Access("127.0.0.1", 8080, None), host="localhost:8080", origin=origin) == 403


def test_with_a_token_any_name_of_another_address_is_answered() -> None:
    access = Access("0.0.0.0", 8080, TOKEN)
    assert status(access, TOKEN, host="jetson.local:8080") == 200
    assert status(access, host="jetson.local:8080") == 401


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_other_sites_get_nothing_but_a_link_to_the_page(site: str) -> None:
    access = Access("127.0.0.1", 8080, None)
    assert status(access, sec_fetch_site=site) == 403
    link = {**BROWSER, "sec-fetch-site": site}
    assert status(access, path="/", **link) == 200
    assert status(access, path="/stream/0", **link) == 403
    assert status(access, path="/", **{**link, "sec-fetch-dest": "iframe"}) == 403
    assert status(access, path="/", **{**link, "sec-fetch-mode": "no-cors"}) == 403


def test_an_origin_must_be_this_one() -> None:
    access = Access("127.0.0.1", 8080, None)
    assert status(access, origin="http://localhost:8080") == 200
    for origin in ("http://localhost:3000", "null", "", "https://evil.example", "http://localhost:8080.evil.example"):
        assert status(access, origin=origin) == 403
    assert status(access, origin="https://vit.example", host="localhost:8080") == 403
    assert status(Access("10.0.0.2", 80, TOKEN), TOKEN, origin="https://vit.example", host="vit.example") == 200  # behind TLS


def test_the_token_is_taken_from_the_url_a_header_or_the_cookie() -> None:
    access = Access("0.0.0.0", 8080, TOKEN)
    assert status(access, TOKEN) == 200
    assert status(access, authorization=f"Bearer {TOKEN}") == status(access, authorization=f"bearer  {TOKEN}") == 200
    assert status(access, cookie=f"other=1; vitedge-8080={access.cookie}") == 200
    assert TOKEN not in access.cookie


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \xe9\xff"},
        {"cookie": f"vitedge-8080={TOKEN}"},
        {"cookie": "vitedge-8080="},
        {"cookie": "\x00=;;,=\"'"},
        {"cookie": f"vitedge-8081={Access('0.0.0.0', 8080, TOKEN).cookie}"},
    ],
)
def test_everything_else_is_no_token(headers: dict[str, str]) -> None:
    access = Access("0.0.0.0", 8080, TOKEN)
    for given in (None, "", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\udce9"):
        assert status(access, given, **headers) == 401
        assert status(access, given, method="POST", **headers) == 401


def test_only_looking_is_possible() -> None:
    access = Access("127.0.0.1", 8080, None)
    assert status(access, method="HEAD") == 200
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "get"):
        assert status(access, method=method) == 405
    assert status(access, content_length="5") == status(access, transfer_encoding="chunked") == 413


def test_a_token_leaves_the_address_bar_of_browsers_alone() -> None:
    access = Access("0.0.0.0", 8080, TOKEN)
    assert access.moves_on({"accept": "text/html,application/xhtml+xml"}, TOKEN)
    assert not access.moves_on({"accept": "text/html"}, None)
    assert not access.moves_on({"accept": "*/*"}, TOKEN)
    assert not Access("127.0.0.1", 8080, None).moves_on({"accept": "text/html"}, TOKEN)


def test_loopback_is_told_from_other_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost", "LocalHost", "localhost.")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "192.168.1.1", "example.org", "localhost.example.org", "127.1")))
