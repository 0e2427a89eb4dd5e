"""The gate between training and serving: does the server answer as the run does in-process?

graft verify RUN URL
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from data.atomic import write_json
from data.conversation import Conversation
from data.encode.chat import encode_prompt
from data.encode.pack import common_prefix
from eval.client import ask_all, served_model, served_models
from eval.likelihood import next_logprobs
from eval.predict import generate
from eval.prediction import Prediction
from eval.results import score, summarize
from eval.server_checks import MARGIN, TOP, Check, Here, There, check_first_token, check_render, check_score, check_stop
from sft.errors import RecipeError
from sft.models.target import Loaded, is_url, load_run, run_any_recipe
from sft.recipe.schema import Recipe
from sft.scoring.evaluate import questions_to_score
from sft.session import use_all_cores

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion


def verify(
    run: Path,
    url: str,
    model: str | None = None,
    data: str | None = None,
    n: int = 200,
    concurrency: int = 16,
    margin: float | None = None,
) -> dict[str, Any]:
    """The record that is written to RUN/verify.json: `passed`, each check with its numbers, and the first prompt that
    differs in its two renders. Raises ServerError where the server can't be asked at all."""
    if not is_url(url):
        raise RecipeError(f"{url}: is no address; name the server's /v1, such as http://127.0.0.1:8000/v1")
    recipe = run_any_recipe(run)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{run}: is a baseline, which no model server serves; verify a run of a language model")
    questions, source = questions_to_score(str(run), recipe, recipe.task, data, None, n)
    served = served_model(url, model or _name_at(url, run))
    start = time.monotonic()
    there = ask_there(url, served, questions, recipe.eval.max_new_tokens, concurrency)
    use_all_cores()
    loaded = load_run(run)
    predictions, here = answer_here(loaded, questions, recipe.eval.max_new_tokens, recipe.eval.batch_tokens)
    asked = [i for i, p in enumerate(predictions) if p.asked]  # others have no answer in-process to compare with
    if not asked:
        raise RecipeError(f"--data: none of {len(questions)} prompts fits into the model's positions; name other data")
    here, told = [here[i] for i in asked], [there[i] for i in asked]
    scores = [
        summarize(recipe.task, score(recipe.task, [questions[i] for i in asked], answers))["scores"]["total"]
        for answers in ([predictions[i] for i in asked], [Prediction(t.text, 0, t.ended, t.asked) for t in told])
    ]
    checks = [
        check_render(here, told),
        check_stop(here, told),
        check_first_token(here, told, MARGIN if margin is None else margin),
        check_score(*scores),
    ]
    different = [
        {"id": questions[i].id, "in_process": predictions[i].text, "server": t.text}
        for i, t in zip(asked, told, strict=True)
        if predictions[i].text != t.text
    ]
    record = {
        "run": run.name,
        "url": url,
        "model": served,
        "data": source,
        "prompts": len(asked),
        "too_long_in_process": len(questions) - len(asked),
        "passed": all(check.passed is True for check in checks),
        "equal_answers": len(asked) - len(different),
        "seconds": round(time.monotonic() - start, 1),
        "checks": {check.name: {"passed": check.passed, "text": check.text, **check.numbers} for check in checks},
        "different_answers": different,
        "first_difference": _first_difference(checks, asked, questions, here, told, loaded.tokenizer),
    }
    write_json(run / "verify.json", record)
    return record


def ask_there(
    url: str, model: str, questions: Sequence[Conversation], max_new_tokens: int, concurrency: int
) -> list[There]:
    """What the server makes of each prompt. `return_token_ids` and `return_tokens_as_token_ids` are vLLM's."""
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    return ask_all(
        url, model, questions, max_new_tokens, concurrency, _there, logprobs=True, top_logprobs=TOP, extra_body=ids
    )


def answer_here(
    loaded: Loaded, questions: Sequence[Conversation], max_new_tokens: int, batch_tokens: int
) -> tuple[list[Prediction], list[Here]]:
    """Predictions, and the same with ids and the first token's log-probabilities."""
    model, tokenizer = loaded.model, loaded.tokenizer
    predictions = generate(model, tokenizer, questions, max_new_tokens, batch_tokens, loaded.packed)
    prompts = [encode_prompt(c.prompt, tokenizer) for c in questions]
    asked = [i for i, p in enumerate(predictions) if p.asked]
    first = dict(
        zip(asked, next_logprobs(model, [prompts[i] for i in asked], batch_tokens, loaded.packed), strict=True)
    )
    return predictions, [
        Here(prompt, list(p.ids), p.finished, first.get(i, torch.empty(0)))
        for i, (prompt, p) in enumerate(zip(prompts, predictions, strict=True))
    ]


def print_record(record: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{record['model']} at {record['url']} against {record['run']}", title_justify="left")
    table.add_column("check")
    table.add_column("")
    table.add_column(f"{record['prompts']} prompts of {record['data']}")
    words = {True: "[green]passed", False: "[red]FAILED", None: "[red]NOT MADE"}
    for name, check in record["checks"].items():
        table.add_row(name, words[check["passed"]], check["text"])
    console.print(table)
    console.print(f"{record['equal_answers']} of {record['prompts']} answers are the same text", highlight=False)
    if long := record["too_long_in_process"]:
        console.print(f"{long} prompts need more positions than the model has and are left out", highlight=False)
    if found := record["first_difference"]:
        console.print(f"\nfirst difference ({found['check']}): {found['where']}", highlight=False)
        sides = Table(show_lines=True)
        sides.add_column("")
        sides.add_column("training, in-process", overflow="fold")
        sides.add_column("server", overflow="fold")
        for part in ("prompt", "answer"):
            here, there = found[part]["in_process"], found[part]["server"]
            same = here == there
            sides.add_row(part, escape(here["text"]), "(the same)" if same else escape(there["text"]))
            if not same and found[part]["equal_tokens"] is not None:
                sides.add_row(f"ids from {found[part]['equal_tokens']}", str(here["ids"]), str(there["ids"]))
        console.print(sides)


def _name_at(url: str, run: Path) -> str | None:
    """The run's own name, where the server serves it beside others."""
    return run.resolve().name if run.resolve().name in served_models(url) else None


def _there(reply: "ChatCompletion | None") -> There:
    if reply is None:
        return There(None, None, False, None, "", asked=False)
    choice = reply.choices[0]
    told, extra = choice.logprobs, choice.model_extra or {}
    top = None
    if told and told.content:
        named = {one.token: one.logprob for one in told.content[0].top_logprobs}
        if named and all(token.startswith("token_id:") for token in named):
            top = {int(token.removeprefix("token_id:")): logprob for token, logprob in named.items()}
    prompt = (reply.model_extra or {}).get("prompt_token_ids")
    text = (choice.message.content or "").strip()
    return There(prompt, extra.get("token_ids"), choice.finish_reason == "stop", top, text)


def _first_difference(
    checks: Sequence[Check],
    asked: Sequence[int],
    questions: Sequence[Conversation],
    here: Sequence[Here],
    there: Sequence[There],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any] | None:
    """Of the first check that failed on a prompt: that prompt, its two renders and answers side by side."""
    failed = next((check for check in checks if check.first is not None), None)
    if failed is None or failed.first is None:
        return None
    h, t, question = here[failed.first], there[failed.first], questions[asked[failed.first]]
    return {
        "check": failed.name,
        "id": question.id,
        "where": question.where,
        "prompt": _sides(h.prompt, t.prompt, "(too long for the server)" if not t.asked else "(not told)", tokenizer),
        "answer": _sides(h.answer, t.answer, t.text, tokenizer),
    }


def _sides(
    here: list[int], there: list[int] | None, otherwise: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Both texts, and their ids from the first that differs."""
    same = common_prefix(here, there) if there is not None else None
    server = {"text": tokenizer.decode(there) if there is not None else otherwise, "ids": (there or [])[same:]}
    return {
        "equal_tokens": same,
        "in_process": {"text": tokenizer.decode(here), "ids": here[same:]},
        "server": server,
    }
