"""The gatekeeper before every route of a served model."""

import asyncio
from typing import Any

import httpx
import pytest

from sft.serving.gatekeeper import MAX_BODY_BYTES, Gatekeeper

ROUTES = ("/v1/models", "/v1/chat/completions", "/tokenize", "/invocations", "/docs", "/metrics", "/health", "/nothing")


async def inner(scope: Any, receive: Any, send: Any) -> None:
    """Any route: answers with the size of the body in bytes."""
    size, unfinished = 0, True
    while unfinished:
        message = await receive()
        size, unfinished = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(method: str, path: str, base: str = "http://127.0.0.1:8000", **options: Any) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app=Gatekeeper(inner))
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    return "s3cret"


@pytest.fixture
def no_key(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_asks_for_the_key(key, path):
    """S15"""
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": key}, {"Authorization": "Bearer "}):
        for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "TRACE"):
            assert ask(method, path, headers=headers).status_code == 401
    assert ask("GET", path, headers={"Authorization": f"bearer {key}"}).status_code == 200
    assert ask("GET", path, "http://any.host", headers={"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    "base", ["http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:8000", "http://localhost"]
)
def test_own_machine_needs_no_key(no_key, base):
    assert ask("GET", "/v1/models", base).status_code == 200
    assert ask("POST", "/v1/models", base, headers={"Origin": base}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost.evil:80", "", "evil:127.0.0.1"]
)
def test_rebound_name_is_refused(no_key, host):
    """S15: a page whose name resolves to 127.0.0.1 still sends that name."""
    assert ask("GET", "/tokenize", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", ""])
def test_request_of_another_origin_is_refused(no_key, origin):
    """S15: a page may send a POST whose answer it can't read."""
    assert ask("POST", "/v1/chat/completions", headers={"Origin": origin}).status_code == 403


def test_preflight_request_of_a_page_gets_nothing(key):
    """A browser sends it without the key; /metrics answers any method."""
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    refused = ask("OPTIONS", "/metrics", headers=preflight)
    assert refused.status_code == 401
    assert not [name for name in refused.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_request_that_a_page_of_another_site_makes_without_an_origin_is_refused(no_key, method, site, status):
    """An <img>, a <script> or a link: browsers send no Origin with a GET."""
    assert ask(method, "/metrics", headers={"Sec-Fetch-Site": site}).status_code == status


@pytest.mark.parametrize("name", ["Host", "Origin", "Authorization", "Content-Length", "Sec-Fetch-Site"])
@pytest.mark.parametrize("own", ["", "s3cret"])
def test_doubled_header_is_refused(name, own, monkeypatch):
    """The last of two would be looked at here, the first one perhaps by the server."""
    monkeypatch.setenv("VLLM_API_KEY", own)
    values = {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000", "Authorization": f"Bearer {own}"}
    values |= {"Content-Length": "0", "Sec-Fetch-Site": "none"}
    headers = [*values.items(), (name, values[name])]
    assert ask("POST", "/v1/models", headers=list(values.items())).status_code == 200
    assert ask("POST", "/v1/models", headers=headers).status_code == 400
    assert ask("POST", "/v1/models", headers=[*values.items(), (name.lower(), "evil.example")]).status_code == 400


def test_body_over_the_limit_is_refused_with_or_without_a_declared_length(no_key):
    """S16"""

    async def pieces():
        for _ in range(11):
            yield b"x" * 1_000_000

    assert ask("POST", "/tokenize", content=b"x" * 10_000_000).status_code == 413
    chunked = ask("POST", "/tokenize", content=pieces())
    assert (chunked.status_code, "4194304 bytes" in chunked.text) == (413, True)
    whole = ask("POST", "/tokenize", content=b"x" * MAX_BODY_BYTES)
    assert (whole.status_code, whole.text) == (200, str(MAX_BODY_BYTES))


def test_websockets_are_closed_and_the_server_may_start(no_key):
    sent, passed = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    for kind in ("lifespan", "websocket"):
        asyncio.run(Gatekeeper(app)({"type": kind, "headers": []}, receive, send))
    assert passed == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]
