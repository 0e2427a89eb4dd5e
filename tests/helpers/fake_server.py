"""An OpenAI-like server in this process, whose replies a test makes up."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any]]  # status and body; status 0 closes the connection, as a server that is killed


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Reply], *models: str) -> Iterator[str]:
    """Its /v1 address; `answer` makes the reply of a chat completion's request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            named = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in models]
            self.reply(200, {"object": "list", "data": named})

        def do_POST(self) -> None:
            self.reply(*answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def reply(self, status: int, body: dict[str, Any]) -> None:
            if not status:
                self.close_connection = True
                return
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    with running(Handler) as url:
        yield url


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The /v1 address of a server with this handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def completion(
    text: str, finish: str = "stop", tokens: int = 7, choice: dict[str, Any] | None = None, **more: Any
) -> Reply:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}
    one = {"index": 0, "finish_reason": finish, "message": message, **(choice or {})}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "served", "choices": [one], "usage": usage}
    return 200, body | more


class Streaming(BaseHTTPRequestHandler):
    """Streams three chunks of an answer of four tokens, 20 ms between them."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    seen: list[dict] = []  # noqa: RUF012
    together = most = 0

    def do_GET(self) -> None:
        named = [{"id": n, "object": "model", "created": 0, "owned_by": "me"} for n in ("base", "merged")]
        data = json.dumps({"object": "list", "data": named}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        kind, request = type(self), json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with kind.lock:
            kind.seen.append(request)
            kind.together += 1
            kind.most = max(kind.most, kind.together)
        self.send_response(200 if request["model"] != "broken" else 500)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for word in ("", "a", "b", "c"):
            time.sleep(0.02)
            self.event({"choices": [{"delta": {"content": word}}]})
        self.event({"choices": [], "usage": {"completion_tokens": 4}})
        with kind.lock:
            kind.together -= 1
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def event(self, body: dict) -> None:
        data = f"data: {json.dumps(body)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def streaming() -> Iterator[str]:
    """The /v1 address of a server of models base and merged that streams."""
    Streaming.seen, Streaming.together, Streaming.most = [], 0, 0
    with running(Streaming) as url:
        yield url
