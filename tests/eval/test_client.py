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


def test_kept_answers_of_another_model_under_the_same_name_are_dropped(questions, tmp_path, capsys):
    """Three of them are asked again, the longest; a power cut left NULs, and a line of something else."""
    keep, asked_texts, ends = tmp_path / NAME, [], [""]

    def answer(request: dict):
        asked_texts.append(last(request))
        return (
            completion(f"{asked_texts[-1]}{ends[0]}") if len(asked_texts) != 7 else (400, {"error": {"message": "b"}})
        )

    with serving(answer, "served") as url:
        with pytest.raises(ServerError):
            server_predictions(url, "served", questions[:12], 9, 1, keep, 3)
        with keep.open("ab") as file:
            file.write(bytes(9) + b"\n\xff\n[1]\n" + bytes(5))
        server_predictions(url, "served", questions[:12], 9, 1, keep, 3)
        assert len(asked_texts) == 7 + 3 + 6
        assert "3 lines are damaged" in capsys.readouterr().err
        ends[0] = " of another model"
        answers = server_predictions(url, "served", questions[:12], 9, 1, keep, 3)
        assert len(asked_texts) == 16 + 3 + 12
        assert all(a.text.endswith(ends[0]) for a in answers)
        assert f"{url} served now answers otherwise" in capsys.readouterr().err


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


OPENAI, VLLM = "sk-of-the-account", "key-of-a-server"


@pytest.mark.parametrize(
    ("url", "base_url", "key"),
    [
        ("http://127.0.0.1:8000/v1", "", VLLM),
        ("https://models.example/v1", "", VLLM),
        ("https://api.openai.com/v1", "", OPENAI),
        ("https://API.OpenAI.com:443/v1/", "", OPENAI),
        ("http://api.openai.com/v1", "", VLLM),  # in the clear
        ("https://api.openai.com.evil.example/v1", "", VLLM),
        ("https://api.openai.com@evil.example/v1", "", VLLM),
        ("https://models.example/v1", "https://models.example/v1", OPENAI),
        ("https://models.example:81/v1", "https://models.example/v1", VLLM),
        ("http://localhost:8000/v1", "http://localhost:8000/v1", VLLM),  # ours wants its own
    ],
)
def test_key_of_the_openai_account_goes_to_openai_and_where_the_user_names(url, base_url, key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", OPENAI)
    monkeypatch.setenv("VLLM_API_KEY", VLLM)
    monkeypatch.setenv("OPENAI_BASE_URL", base_url)
    assert client.api_key(url) == key
    monkeypatch.delenv("VLLM_API_KEY")
    assert client.api_key(url) == (OPENAI if key == OPENAI or url == base_url else "none")
    monkeypatch.setenv("VLLM_API_KEY", VLLM)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert client.api_key(url) == (
        "none" if url.lower().startswith(("https://api.openai.com/", "https://api.openai.com:")) else VLLM
    )


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://127.1:8000/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://graft.localhost/v1", True),
        ("http://0.0.0.0:8000/v1", True),
        ("http://127.0.0.1.evil.example/v1", False),
        ("http://localhost.evil.example/v1", False),
        ("http://10.0.0.1/v1", False),
    ],
)
def test_addresses_of_this_machine(url, here):
    assert client.on_this_machine(url) is here


def test_nothing_of_the_openai_account_reaches_another_server_and_no_proxy_sees_it(questions, monkeypatch):
    """All requests: the list of models, questions, a chat, a load."""
    account = {"OPENAI_API_KEY": OPENAI, "OPENAI_ADMIN_KEY": f"admin-{OPENAI}", "OPENAI_ORG_ID": f"org-{OPENAI}"}
    account |= {"OPENAI_PROJECT_ID": f"project-{OPENAI}", "OPENAI_CUSTOM_HEADERS": f"Authorization: Bearer {OPENAI}"}
    for name, value in (
        account | dict.fromkeys(("HTTP_PROXY", "http_proxy", "all_proxy"), "http://127.0.0.1:9")
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_API_KEY", VLLM)
    seen: list[dict[str, str]] = []
    server = Streamer()
    with serving(echo, "m", headers=seen) as url, serving(server, "m", headers=seen) as streams:
        server_predictions(url, served_model(url, None), questions[:1], 9)
        CliRunner().invoke(app, ["chat", streams], input="Hello\n\n", catch_exceptions=False)
        asked = ["bench", "serve", streams, "--clients", "1", "--requests", "1", "--rounds", "1"]
        assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0
    assert len(seen) >= 6
    assert {headers["authorization"] for headers in seen} == {f"Bearer {VLLM}"}
    assert OPENAI not in str(seen)


def test_text_of_a_server_does_not_act_on_the_terminal(questions, capsys):
    """Its answers, its errors and the names of its models."""
    sequence = "\x1b]0;owned\x07\x9b2J\u202e"

    def streams(request: dict):
        for part in ("a\tb\n", *sequence):
            yield {"choices": [{"delta": {"content": part}}]}

    with serving(streams, "m") as url:
        chat = CliRunner().invoke(app, ["chat", url], input="Hello\n\n", catch_exceptions=False).output
    with serving(streams, f"m{sequence}", "other") as url:
        names = CliRunner().invoke(app, ["chat", url], input="Hello\n\n", catch_exceptions=False).output
    with (
        serving(lambda request: (503, {"error": {"message": sequence}}), "m") as url,
        pytest.raises(ServerError) as error,
    ):
        server_predictions(url, "m", questions[:1], 9)
    printed = (chat, names, str(error.value), *capsys.readouterr())
    assert "a\tb\n␛]0;owned␇⟨U+009B⟩2J" in chat
    assert "owned" in names
    assert not set("".join(printed)) & set("\x1b\x07\x9b\u202e")
