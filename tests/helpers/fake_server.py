"""An OpenAI-like server in this process, whose replies a test makes up."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any]]  # status and body; status 0 closes the connection, as a server that is killed
Events = Iterator[dict[str, Any]]  # of a streamed answer


@contextmanager
def serving(
    answer: Callable[[dict[str, Any]], Reply | Events], *models: str, headers: list[dict[str, str]] | None = None
) -> Iterator[str]:
    """Its /v1 address; `answer` makes the reply to a chat completion's request. headers: takes those of all requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def parse_request(self) -> bool:
            whole = super().parse_request()
            if whole and headers is not None:
                headers.append({name.lower(): value for name, value in self.headers.items()})
            return whole

        def do_GET(self) -> None:
            named = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in models]
            self.reply(200, {"object": "list", "data": named})

        def do_POST(self) -> None:
            reply = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(reply, tuple):
                return self.reply(*reply)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in reply:
                self.chunk(f"data: {json.dumps(event)}\n\n")
            self.chunk("data: [DONE]\n\n")
            self.chunk("")

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

        def chunk(self, text: str) -> None:
            self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
            self.wfile.flush()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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


class Streamer:
    """Streams three chunks of an answer of four tokens, 20 ms between them. seen: all requests; most: at once."""

    def __init__(self) -> None:
        self.lock, self.seen = threading.Lock(), list[dict[str, Any]]()
        self.running = self.most = 0

    def __call__(self, request: dict[str, Any]) -> Reply | Events:
        return (500, {}) if request["model"] == "broken" else self.events(request)

    def events(self, request: dict[str, Any]) -> Events:
        with self.lock:
            self.seen.append(request)
            self.running += 1
            self.most = max(self.most, self.running)
        for word in ("", "a", "b", "c"):
            time.sleep(0.02)
            yield {"choices": [{"delta": {"content": word}}]}
        with self.lock:
            self.running -= 1
        yield {"choices": [], "usage": {"completion_tokens": 4}}
