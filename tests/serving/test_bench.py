"""The load test: how many clients ask at once, what is counted, and what is compared."""

import json

import pytest
from typer.testing import CliRunner

from eval.client import ServerError
from sft.cli import app
from sft.serving.bench import Load, bench_serve, make_prompts, summarize
from tests.helpers.fake_server import Streamer, serving


@pytest.fixture
def server():
    return Streamer()


@pytest.fixture
def url(server):
    with serving(server, "base", "merged") as address:
        yield address


def test_number_of_clients_is_as_asked_and_all_requests_are_counted(server, url):
    rows = bench_serve([url], ["base"], [3], requests=9, prompt_words=5, new_tokens=4, rounds=2)
    assert server.most == 3
    assert len(server.seen) == 2 * 9 + 1, "and a warm-up before the first round"
    (row,) = rows
    assert (row["requests"], row["relative"]) == (18, [1.0, 1.0, 1.0])
    assert row["output_tokens_per_s"] == pytest.approx(4 * row["requests_per_s"], rel=0.01), "tokens, not chunks"
    assert 40 <= row["first_token_ms"]["p50"] < 400, "an empty delta is no token"
    assert 20 <= row["inter_token_ms"]["p50"] < 200
    assert row["requests_per_s"] <= 3 / 0.08, "four waits of 20 ms a request"


def test_models_take_turns_and_get_the_same_prompts_each_once(server, url):
    bench_serve([url], [], [2], requests=2, prompt_words=5, new_tokens=4, rounds=2)
    order = [request["model"] for request in server.seen]
    assert order == ["base"] * 3 + ["merged"] * 5 + ["base"] * 2, "the second round begins with the other one"
    asked = {name: sorted(r["messages"][0]["content"] for r in server.seen if r["model"] == name) for name in order}
    assert asked["base"] == asked["merged"]
    beginnings = {text.split()[0] for text in asked["base"]}
    assert len(beginnings) == len(asked["base"])
    assert all(request["ignore_eos"] for request in server.seen)
    server.seen.clear()
    bench_serve([url], ["base"], [2], requests=2, prompt_words=5, new_tokens=4, rounds=2)
    assert not {r["messages"][0]["content"] for r in server.seen} & set(asked["base"]), "nor by the next run"


def test_prompts_are_the_same_each_time():
    assert make_prompts(3, 5, "a") == make_prompts(3, 5, "a")
    assert len(set(make_prompts(3, 5, "a") + make_prompts(3, 5, "b"))) == 6


def test_ratio_is_taken_round_by_round():
    def loads(*seconds: float) -> list[Load]:
        return [Load(s, [([0.1, s], 10)]) for s in seconds]

    assert summarize(loads(2.0, 10.0, 4.0), loads(1.0, 10.0, 3.0))["relative"] == [0.75, 0.5, 1.0]


def test_refused_request_ends_it_with_one_line(url, monkeypatch):
    monkeypatch.setattr("sft.serving.bench.served_models", lambda url: ["broken"])
    with pytest.raises(ServerError, match="broken: status 500"):
        bench_serve([url], [], [2], 4, 5, 4, 1)
    with pytest.raises(ServerError, match="--model base: .* served: broken"):
        bench_serve([url], ["base"], [2], 4, 5, 4, 1)


def test_command_prints_a_table_and_writes_the_same(url, tmp_path):
    out = tmp_path / "bench.json"
    common = ["--requests", "2", "--rounds", "1", "--prompt-words", "5"]
    done = CliRunner().invoke(
        app, ["bench", "serve", url, "--clients", "1,2", *common, "--out", str(out)], env={"COLUMNS": "120"}
    )
    assert done.exit_code == 0, done.output
    assert "base's tokens/s" in " ".join(done.output.split())
    rows = json.loads(out.read_text())
    assert [(row["clients"], row["model"]) for row in rows] == [(1, "base"), (1, "merged"), (2, "base"), (2, "merged")]
    assert CliRunner().invoke(app, ["bench", "serve", url, "--clients", "x"]).exit_code == 2
