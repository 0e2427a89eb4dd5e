"""The gate: a server that answers like the run passes; each kind of difference is named."""

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed
from typer.testing import CliRunner

from data.encode.chat import encode_prompt, stop_tokens
from eval.generate import generate_one
from eval.likelihood import next_logprobs
from eval.prediction import Prediction
from eval.results import limit_questions
from eval.server_checks import LocalAnswer, ServerAnswer, check_first_token, check_score, check_stop
from sft.cli import app
from sft.models.load import load_base
from sft.models.target import Loaded, load_run
from sft.recipe.schema import Model
from tests.helpers.builders import save_tiny, write_recipe
from tests.helpers.fake_server import completion, serving

pytestmark = pytest.mark.heavy

N = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, questions) -> Path:
    """A run folder with a random adapter on a random base of large logits, whose answers end within three tokens."""
    folder = tmp_path_factory.mktemp("verify")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    base = save_tiny(config, folder / "base", tokenizer)
    set_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    path = folder / "run"
    tuned.save_pretrained(path / "adapter")
    tokenizer.save_pretrained(path / "adapter")
    recipe = write_recipe(folder / "r.yaml", base, eval="{data: data/samples/squad_dev.json, max_new_tokens: 5}")
    shutil.copy(recipe, path / "recipe.yaml")
    third = {
        generate_one(tuned, encode_prompt(q.prompt, tokenizer), {tokenizer.eos_token_id}, 3)[-1]
        for q in limit_questions(questions, N)
    }
    settings = json.loads((base / "generation_config.json").read_text())
    settings["eos_token_id"] = sorted(third | {tokenizer.eos_token_id})
    (base / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def served(run) -> Loaded:
    return load_run(run)


@pytest.fixture(scope="module")
def in_process(run) -> Loaded:
    return load_run(run)


@pytest.fixture
def engine(served, in_process, monkeypatch) -> "Engine":
    monkeypatch.setattr("sft.serving.verify.load_run", lambda run: in_process)
    return Engine(served)


class Engine:
    """Chat completions of the run's model, as vLLM returns them; a test changes a part of it."""

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.tokenizer = loaded.model, copy.copy(loaded.tokenizer)
        self.stop = set(stop_tokens(self.model.generation_config.eos_token_id, self.tokenizer))
        self.returns_ids = True

    def __call__(self, request: dict):
        prompt = encode_prompt(request["messages"], self.tokenizer)
        answer = generate_one(self.model, prompt, self.stop, request["max_tokens"])
        logprobs, ids = next_logprobs(self.model, [prompt], 4096, packed=False)[0].topk(request["top_logprobs"])
        top = [
            {"token": f"token_id:{i}", "logprob": p, "bytes": []}
            for i, p in zip(ids.tolist(), logprobs.tolist(), strict=True)
        ]
        finish = "stop" if answer[-1] in self.stop else "length"
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        if not self.returns_ids:
            return completion(text, finish)
        listed = {"content": [{**top[0], "top_logprobs": top}]}
        return completion(text, finish, len(answer), {"logprobs": listed, "token_ids": answer}, prompt_token_ids=prompt)


def verified(run: Path, engine: Engine, code: int, *options: str) -> tuple[dict, str]:
    with serving(engine, "served") as url:
        done = CliRunner().invoke(app, ["verify", str(run), url, "--n", str(N), *options], env={"COLUMNS": "160"})
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return json.loads((run / "verify.json").read_text()), done.output


def results(record: dict) -> dict:
    return {name: check["passed"] for name, check in record["checks"].items()}


def test_server_that_answers_like_the_run_passes(run, served):
    record, shown = verified(run, Engine(served), 0)
    assert record["passed"]
    assert set(results(record).values()) == {True}
    assert record["checks"]["render"]["equal"] == record["equal_answers"] == record["prompts"] == N
    assert record["checks"]["stop"]["equal"] > N // 2
    assert record["checks"]["first token"]["equal_sets"] == N
    assert record["checks"]["first token"]["largest_difference_nats"] < 1e-3
    assert (record["first_difference"], record["different_answers"]) == (None, [])
    assert "passed" in shown
    assert "FAILED" not in shown


def test_record_can_be_printed_as_json(run, engine):
    record, shown = verified(run, engine, 0, "--json")
    assert json.loads(shown[shown.index("{") :]) == record


def test_other_template_is_shown_side_by_side(run, engine):
    engine.tokenizer.chat_template = engine.tokenizer.chat_template.replace(
        "<|im_start|>assistant", "<|im_start|>robot"
    )
    record, shown = verified(run, engine, 1)
    assert results(record)["render"] is False
    difference = record["first_difference"]
    assert (difference["check"], record["checks"]["render"]["equal"]) == ("render", 0)
    own, other = difference["prompt"]["in_process"], difference["prompt"]["server"]
    assert own["text"].endswith("<|im_start|>assistant\n")
    assert other["text"].endswith("<|im_start|>robot\n")
    assert engine.tokenizer.decode(own["ids"]) == "assistant\n", "ids from the first difference on"
    assert difference["id"] in shown
    assert "<|im_start|>robot" in shown


def test_end_token_that_the_server_does_not_know_is_found(run, engine):
    engine.stop = {engine.tokenizer.eos_token_id}
    record, shown = verified(run, engine, 1)
    assert results(record)["stop"] is False
    assert results(record)["render"] is True
    answer = record["first_difference"]["answer"]
    assert answer["in_process"]["ids"] == []
    assert {row["id"] for row in record["different_answers"]} >= {record["first_difference"]["id"]}
    assert len(answer["server"]["ids"]) > 0, "the server goes on after the run has ended"
    assert "do not" in shown


def test_answer_that_the_server_ends_too_early_is_found(run, engine, questions, tokenizer):
    engine.stop = {
        generate_one(engine.model, encode_prompt(q.prompt, tokenizer), {0}, 1)[0] for q in limit_questions(questions, N)
    }
    assert results(verified(run, engine, 1)[0])["stop"] is False


def test_other_model_is_found_by_its_first_tokens(run, engine):
    engine.model.disable_adapter_layers()  # the base, as if the server had dropped the adapter
    try:
        record, _ = verified(run, engine, 1)
    finally:
        engine.model.enable_adapter_layers()
    assert results(record)["first token"] is False
    assert results(record)["render"] is True


def test_server_that_returns_no_ids_passes_no_check_that_needs_them(run, engine):
    engine.returns_ids = False
    record, shown = verified(run, engine, 1)
    assert results(record) == {"render": None, "stop": None, "first token": None, "score": True}
    assert "returns no prompt_token_ids" in shown


def test_server_that_refuses_a_prompt_for_its_length_is_found(run, engine):

    def short(request: dict):
        if len(request["messages"][-1]["content"]) > 600:
            return 400, {"error": {"message": "This model's maximum context length is 128 tokens."}}
        return engine(request)

    record, shown = verified(run, short, 1)
    assert results(record)["render"] is False
    assert "(too long " in shown


def test_unreachable_server_is_one_line(run):
    done = CliRunner().invoke(app, ["verify", str(run), "http://127.0.0.1:9/v1"])
    assert done.exit_code == 2
    assert "its /v1?" in done.output


def test_invalid_address_is_one_line(run):
    done = CliRunner().invoke(app, ["verify", str(run), str(run)])
    assert (done.exit_code, "name the server's /v1" in done.output) == (2, True)


def test_next_logprobs_are_those_of_each_prompt_alone(tiny, tokenizer, questions):
    model = load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu"))
    prompts = [encode_prompt(q.prompt, tokenizer) for q in (*questions[:6], questions[0])]
    together = next_logprobs(model, prompts, 900)
    with torch.inference_mode():
        alone = torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(next_logprobs(model, prompts, 900, packed=False), alone, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2), "if they were equal, any order would pass"


def local(answer: list[int], ended: bool = True, first: Sequence[float] = (0.0, -1.0, -9.0)) -> LocalAnswer:
    return LocalAnswer(Prediction("", 0, ended, ids=tuple(answer)), [1], torch.tensor(first))


def server(answer: list[int] | None, ended: bool = True, top: dict[int, float] | None = None) -> ServerAnswer:
    return ServerAnswer(Prediction("", 0, ended), [1], answer, top)


@pytest.mark.parametrize(
    ("one", "other", "passed"),
    [
        (local([5, 9]), server([5, 9]), True),
        (local([5, 9]), server([5, 9], ended=False), False),  # cut by length at the end token
        (local([5, 9]), server([5, 9, 5], ended=False), False),
        (local([5, 6, 9]), server([5]), False),
        (local([5, 6], ended=False), server([5, 6, 9]), False),
        (local([5, 6, 9]), server([5, 7, 7, 7], ended=False), False),  # no pair is left to prove it
        (local([5, 6], ended=False), server([5, 6], ended=False), False),
    ],
)
def test_ends_are_compared_if_the_tokens_before_are_equal(one, other, passed):
    assert check_stop([(one, other)]).passed is passed


def test_answers_that_diverged_are_counted_and_not_judged():
    check = check_stop([(local([5, 9]), server([5, 9])), (local([5, 6, 9]), server([5, 7, 7], ended=False))])
    assert check.passed
    assert check.numbers["diverged_and_cut"] == 1


def test_first_token_may_differ_within_the_margin_only():
    near, far = server([], top={1: -0.5, 0: -0.6}), server([], top={2: -0.5, 0: -0.6})
    assert check_first_token([(local([]), near)], margin=1.5).passed
    assert not check_first_token([(local([]), near)], margin=0.5).passed
    assert not check_first_token([(local([]), far)], margin=1.5).passed
    assert not check_first_token([(local([]), server([], top={7: -0.1}))]).passed, (
        "an id that the run's vocabulary lacks"
    )


def test_likely_first_tokens_have_the_same_probability_on_both_sides():
    logprobs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    mine = LocalAnswer(Prediction("", 0, True), [1], logprobs)
    same = {i: float(p) for i, p in enumerate(logprobs)}

    def judge(**changed: float) -> bool | None:
        top = same | {int(k[1:]): math.log(v) for k, v in changed.items() if v}
        for k in (k for k, v in changed.items() if not v):
            del top[int(k[1:])]
        return check_first_token([(mine, server([], top=top))], margin=0.5).passed

    assert judge()
    assert judge(_3=0.001), "an unlikely token may differ"
    assert judge(_1=0.2), "0.41 nats"
    assert not judge(_2=0.05), "1.1 nats, although the likeliest is the same"
    assert not judge(_3=0.3), "likely at the server only"
    broken = LocalAnswer(Prediction("", 0, True), [1], torch.full((4,), float("nan")))
    assert not check_first_token([(broken, server([], top=same))]).passed
    assert not judge(_1=0), "likely in-process, and not even among those that the server lists"


def test_ends_of_too_few_answers_prove_nothing():
    same, other = (local([5, 9]), server([5, 9])), (local([5, 6, 9]), server([5, 7, 9]))
    for pairs, passed in (([same, same, other], True), ([same, other, other], False)):
        check = check_stop(pairs)
        assert check.passed is passed, check.text


def test_score_must_lie_in_the_other_ones_interval():
    def total(value: float, low: float, high: float) -> dict:
        return {"questions": 9, "exact": value, "exact_95": [low, high]}

    assert check_score(total(50, 45, 55), total(54, 52, 60)).passed
    assert check_score(total(50, 49, 51), total(54, 48, 60)).passed
    assert not check_score(total(50, 49, 51), total(54, 52, 60)).passed
