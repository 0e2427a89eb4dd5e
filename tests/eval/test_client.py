"""A server is asked for what in-process generation gives; refusals, delays and broken connections are handled."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from data.conversation import Conversation
from eval import client
from eval.answer_log import NAME
from eval.client import ServerError, served_model, server_predictions
from sft.cli import app
from tests.helpers.fake_server import Streamer, completion, serving

pytestmark = pytest.mark.heavy

LONGEST = 4096  # characters


def last(request: dict) -> str:
    return request["messages"][-1]["content"]


def echo(request: dict):
    """Replies with the question; certain words in it make the server refuse it."""
    if "crash" in last(request):
        return 0, {}
    if "forbidden" in last(request):
        return 400, {"error": {"message": "no such role", "code": 400}}
    if len(last(request)) > LONGEST:
        return 400, {"error": {"message": "This model's maximum context length is 2048 tokens.", "code": 400}}
    return completion(f" {last(request).split('Question: ')[1]} ")


@pytest.fixture
def url():
    with serving(echo, "served") as address:
        yield address


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)


def texts(questions) -> list[str]:
    return [last({"messages": q.prompt}).split("Question: ")[1] for q in questions]


def test_server_is_asked_greedily_and_answers_come_in_order(questions):
    requests = []
    with serving(lambda request: (requests.append(request), echo(request))[1], "served") as url:
        answers = server_predictions(url, served_model(url, None), questions[:20], max_new_tokens=9)
    assert [a.text for a in answers] == texts(questions[:20])
    assert all(a.finished and a.new_tokens == 7 for a in answers)
    assert (requests[-1]["temperature"], requests[-1]["max_tokens"], requests[-1]["model"]) == (0, 9, "served")


def test_model_that_is_not_served_is_named(url):
    assert served_model(url, "served") == "served"
    with pytest.raises(ServerError, match="serves served; .* --model"):
        served_model(url, "other")


def asked(text: str, name: str) -> Conversation:
    return Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": "?"}), name, "")


def test_question_too_long_for_the_server_is_not_asked_and_the_others_are_answered(url, questions):
    long = asked("Question: " + "word " * 1000, "long1")
    answers = server_predictions(url, "served", [*questions[:4], long, *questions[4:8]], 9)
    assert [a.asked for a in answers] == [True] * 4 + [False] + [True] * 4


def test_question_that_the_server_refuses_is_named(url, questions):
    with pytest.raises(ServerError, match="question q9 is refused: .*no such role"):
        server_predictions(url, "served", [*questions[:4], asked("Question: forbidden", "q9")], 9)


def test_server_that_goes_away_is_one_line(url, questions):
    with pytest.raises(ServerError, match=r"\(7 tries\); .*its /v1\?") as caught:
        server_predictions(url, "served", [*questions[:4], asked("Question: crash", "q"), *questions[4:8]], 9)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("status", [429, 503, 0])
def test_overloaded_server_is_asked_again_and_the_retries_are_reported(questions, status, capsys):
    lock, refused = threading.Lock(), set()

    def overloaded(request: dict):
        with lock:
            if len(refused) < 5 and last(request) not in refused:
                refused.add(last(request))
                return status, {"error": {"message": "later"}}
        return echo(request)

    with serving(overloaded, "served") as url:
        answers = server_predictions(url, "served", questions[:10], 9)
    assert [a.text for a in answers] == texts(questions[:10])
    stderr = capsys.readouterr().err
    assert stderr.count("up to 7 times") == 1
    assert "5 requests were asked" in stderr


def test_waits_grow_and_end(questions, monkeypatch):
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    with serving(lambda request: (503, {}), "served") as url, pytest.raises(ServerError):
        server_predictions(url, "served", questions[:1], 9)
    assert len(waits) == client.TRIES - 1
    assert all(later > earlier for earlier, later in zip(waits, waits[1:], strict=False))


def test_refused_key_is_not_tried_again(questions):
    requests = []

    def refuses(request: dict):
        requests.append(request)
        return 401, {"error": "Unauthorized"}

    with serving(refuses, "served") as url, pytest.raises(ServerError, match="401"):
        server_predictions(url, "served", questions[:1], 9)
    assert len(requests) == 1


def test_interrupted_evaluation_resumes(questions, tmp_path, capsys):
    keep, asked_texts = tmp_path / "out" / NAME, []
    breaks = [True]

    def answer(request: dict):
        asked_texts.append(last(request))
        return (400, {"error": {"message": "broken"}}) if breaks[0] and len(asked_texts) > 6 else echo(request)

    with serving(answer, "served", "other") as url:
        with pytest.raises(ServerError, match="broken"):
            server_predictions(url, "served", questions[:12], 9, 1, keep)
        assert "6 answers are kept" in capsys.readouterr().err
        with keep.open("a") as file:
            file.write('{"number": 11, "te')  # as a crash leaves it
        breaks[0], asked_texts[:] = False, []
        answers = server_predictions(url, "served", questions[:12], 9, 1, keep)
        assert (len(asked_texts), [a.text for a in answers]) == (6, texts(questions[:12]))
        assert "6 answers are read" in capsys.readouterr().err
        assert answers == server_predictions(url, "served", questions[:12], 9, 1, None)
        for changed in (("other", questions[:12], 9), ("served", questions[1:12], 9), ("served", questions[:12], 8)):
            asked_texts[:] = []
            server_predictions(url, *changed, 1, keep)
            assert len(asked_texts) == len(changed[1]), "another model, other data or another length start over"
    assert json.loads(keep.read_text().split("\n")[1])["text"]


def test_evaluation_keeps_answers_only_until_its_results_are_written(questions, tmp_path):
    from sft.scoring.evaluate import evaluate
    from tests.helpers.places import SAMPLES

    with serving(echo, "served") as url:
        results = evaluate(url, tmp_path, "squad_v2", str(SAMPLES / "squad_dev.json"), 5)
        assert results["questions_per_s"] > 0
        assert not (tmp_path / NAME).exists()
        (tmp_path / NAME).write_text('{"key": "of something else"}\n')
        assert "questions_per_s" not in evaluate(url, tmp_path, "squad_v2", str(SAMPLES / "squad_dev.json"), 5)


def test_chat_prints_what_the_server_streams_and_sends_the_earlier_turns():
    server = Streamer()
    with serving(server, "base", "merged") as url:
        done = CliRunner().invoke(app, ["chat", url, "--model", "merged"], input="Hello\nMore\n\n")
    assert done.exit_code == 0, done.output
    assert done.output.count("abc\n") == 2
    assert [m["content"] for m in server.seen[-1]["messages"]] == ["Hello", "abc", "More"]
    assert all(request["stream"] for request in server.seen)


def test_web_server_without_a_model_is_a_clear_error():
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.raises(ServerError, match=r"; .*its /v1\?"):
        served_model(f"http://127.0.0.1:{server.server_port}", None)
    server.shutdown()


def test_server_that_does_not_run_is_a_clear_error(questions):
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1: .*; .*its /v1\?"):
        server_predictions("http://127.0.0.1:9/v1", "m", questions[:2], 5)
