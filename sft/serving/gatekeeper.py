"""Guards every route of a served model: vLLM loads it by `--middleware sft.serving.gatekeeper.Gatekeeper`.

vLLM demands its key on /v1 only; /tokenize, /invocations, /metrics and others are open, and it takes a body of any
size. The gatekeeper demands the key of VLLM_API_KEY on every route. Without a key the server listens on loopback only.
A web page that the user has open can still reach it; its requests name another Host or an Origin, and are refused.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

MAX_BODY_BYTES = 4 * 2**20  # over a million tokens; parsing and tokenizing 10 MB stalls all other requests
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Gatekeeper:
    """ASGI middleware. 401: no key or a wrong one; 403: a foreign Host or Origin; 413: body too large."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.key = os.environ.get("VLLM_API_KEY", "")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # vLLM's websockets are for speech
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self._refusal(scope["method"], headers):
            return await _reply(send, *refused)
        body = await _body(receive, headers.get("content-length", ""))
        if body is None:
            return await _reply(send, 413, f"the body exceeds {MAX_BODY_BYTES} bytes; shorten the prompt")

        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()  # after the body only a disconnect can come

        return await self.app(scope, replay, send)

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        if self.key:
            if method == "OPTIONS":  # a browser's preflight request has no key and gets no data
                return None
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self.key.encode()):
                return None
            return 401, "this server demands its key: Authorization: Bearer KEY"
        host, origin = headers.get("host", ""), headers.get("origin")
        if host.rsplit(":", 1)[0] not in LOOPBACK and host not in LOOPBACK:
            return 403, f"Host {host!r} is not this machine's loopback address"
        if origin is not None and origin.partition("://")[2] != host:
            return 403, f"web page {origin} may not use this server; start it with VLLM_API_KEY set to allow that"
        return None


async def _body(receive: Receive, declared: str) -> bytes | None:
    """The whole body; None if its declared or its real size exceeds the limit."""
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        return None
    body, complete = bytearray(), False
    while not complete:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        complete = not message.get("more_body", False)
    return bytes(body)


async def _reply(send: Send, status: int, problem: str) -> None:
    body = json.dumps({"error": {"message": problem, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
