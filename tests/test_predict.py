"""Generation in packs says what one-by-one generation says; a server is asked for the same."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from data.conversation import Conversation
from data.squad import UNANSWERABLE
from eval.predict import ServerError, ask_server, generate, served_model
from eval.run import score, summarize
from sft.model import load_base
from sft.recipe import Model


def test_packed_answers_equal_transformers_own_generate(smollm, tokenizer, questions):
    model = load_base(Model(base=str(smollm), dtype="float32"), torch.device("cpu"))
    chosen = questions[:10]
    packed = generate(model, tokenizer, chosen, max_new_tokens=12, batch_tokens=900)
    alone = generate(model, tokenizer, chosen, max_new_tokens=12, batch_tokens=900, packed=False)
    assert packed == alone
    assert len({p.text for p in packed}) > 3


def test_answers_come_in_order_and_say_whether_they_ended(tiny, tokenizer, questions):
    model = load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu"))
    forward = generate(model, tokenizer, questions[:20], 5, 600)
    backward = generate(model, tokenizer, questions[:20][::-1], 5, 4000)
    assert [p.text for p in forward] == [p.text for p in backward[::-1]]
    assert all(p.new_tokens == 5 or p.finished for p in forward)


@pytest.mark.parametrize("packed", [True, False])
def test_question_that_the_model_has_no_positions_for_is_not_asked_and_counts_as_wrong(
    tiny, tokenizer, questions, packed
):
    model = load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu"))
    turns = ({"role": "user", "content": "word " * 2100}, {"role": "assistant", "content": UNANSWERABLE})
    asked = [questions[0], Conversation(turns, "long", "f:1"), questions[1]]  # an empty answer would be right for it
    predictions = generate(model, tokenizer, asked, 5, 600, packed)
    assert [p.asked for p in predictions] == [True, False, True]
    assert predictions[0].text == generate(model, tokenizer, questions[:1], 5, 600, packed)[0].text
    results = summarize("squad_v2", score("squad_v2", asked, predictions))
    assert (results["questions"], results["too_long_for_model"]) == (3, 1)
    assert score("squad_v2", asked, predictions)[1].scores == {"exact": 0.0, "f1": 0.0}


class FakeOpenAI(BaseHTTPRequestHandler):
    longest = 4096  # characters
    seen: list[dict] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": "served", "object": "model", "created": 0, "owned_by": "me"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(request)
        if request["messages"][-1]["content"].count("crash"):
            self.close_connection = True  # as of a server that is killed
            return
        if request["messages"][-1]["content"].count("forbidden"):
            self.reply({"error": {"message": "no such role", "code": 400}}, status=400)
            return
        if len(request["messages"][-1]["content"]) > self.longest:
            error = {"message": "This model's maximum context length is 2048 tokens.", "code": 400}
            self.reply({"error": error}, status=400)
            return
        text = request["messages"][-1]["content"].split("Question: ")[1]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f" {text} "}}
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "served", "choices": [choice], "usage": usage})  # fmt: skip

    def reply(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url():
    server = HTTPServer(("127.0.0.1", 0), FakeOpenAI)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_server_is_asked_greedily_and_answers_come_in_order(url, questions):
    answers = ask_server(url, served_model(url, None), questions[:20], max_new_tokens=9)
    assert [a.text for a in answers] == [q.prompt[-1]["content"].split("Question: ")[1] for q in questions[:20]]
    assert all(a.finished and a.new_tokens == 7 for a in answers)
    request = FakeOpenAI.seen[-1]
    assert (request["temperature"], request["max_tokens"], request["model"]) == (0, 9, "served")


def test_model_that_is_not_served_is_named(url):
    assert served_model(url, "served") == "served"
    with pytest.raises(ServerError, match="serves served; name one of them with --model"):
        served_model(url, "other")


def asked(text: str, name: str) -> Conversation:
    return Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": "?"}), name, "")


def test_question_too_long_for_the_server_is_told_and_the_others_are_answered(url, questions):
    long = asked("Question: " + "word " * 1000, "long1")
    answers = ask_server(url, "served", [*questions[:4], long, *questions[4:8]], 9)
    assert [a.asked for a in answers] == [True] * 4 + [False] + [True] * 4


def test_question_that_the_server_refuses_is_named(url, questions):
    with pytest.raises(ServerError, match="question q9 is refused: .*no such role"):
        ask_server(url, "served", [*questions[:4], asked("Question: forbidden", "q9")], 9)


def test_server_that_goes_away_is_one_line(url, questions, monkeypatch):
    import openai

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)
    with pytest.raises(ServerError, match="is the server up") as caught:
        ask_server(url, "served", [*questions[:4], asked("Question: crash", "q"), *questions[4:8]], 9)
    assert len(str(caught.value).splitlines()) == 1


def test_web_server_that_is_no_model_server_is_a_clear_error():
    class Page(FakeOpenAI):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>")

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(ServerError, match="is the address its /v1"):
        served_model(f"http://127.0.0.1:{server.server_port}", None)
    server.shutdown()


def test_server_that_is_not_there_is_a_clear_error(questions, monkeypatch):
    import openai

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1: .*is the server up"):
        ask_server("http://127.0.0.1:9/v1", "m", questions[:2], 5)
