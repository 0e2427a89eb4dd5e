"""The gate between training and serving: does the server answer like the run in this process?

graft verify RUN URL
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from data.atomic import write_json
from data.conversation import Conversation
from data.encode.chat import encode_prompt
from data.encode.frame import SERVED, Frame, frame_of, without_markers
from data.encode.pack import common_prefix
from data.terminal import Console, printable
from eval.client import chat_completions, prediction_of, served_model, served_models
from eval.likelihood import next_logprobs
from eval.predict import generate
from eval.results import score, summarize
from eval.server_checks import TOP, LocalAnswer, ServerAnswer, check_first_token, check_render, check_score, check_stop
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
    """Compare a server with its run, and return the record that is written to RUN/verify.json: `passed`, each check
    with its numbers, and the first prompt that differs. Raises ServerError if the server does not answer."""
    if not is_url(url):
        raise RecipeError(f"{url}: is not an address; name the server's /v1, such as http://127.0.0.1:8000/v1")
    recipe = run_any_recipe(run)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{run}: is a baseline, which vLLM does not serve; verify a run of a language model")
    drawn, source = questions_to_score(str(run), recipe, recipe.task, data, None, n, recipe.eval.metrics)
    own_name = run.resolve().name
    served = served_model(url, model or (own_name if own_name in served_models(url) else None))
    start = time.monotonic()
    use_all_cores()
    loaded = load_run(run)
    frame = without_markers(frame_of(loaded.tokenizer), loaded.tokenizer)
    served_answers = answer_by_server(url, served, drawn, recipe.eval.max_new_tokens, concurrency, frame)
    local_answers = answer_locally(loaded, drawn, recipe.eval.max_new_tokens, recipe.eval.batch_tokens)
    if not local_answers:
        raise RecipeError(f"--data: none of {len(drawn)} prompts fits into the model's positions; use shorter prompts")
    questions = [drawn[i] for i in local_answers]
    pairs = [(local, served_answers[i]) for i, local in local_answers.items()]
    scores = []
    for answers in zip(*pairs, strict=True):
        predictions = [answer.prediction for answer in answers]
        scored = score(recipe.task, questions, predictions, recipe.eval.metrics, recipe.eval.pattern)
        scores.append(summarize(recipe.task, scored))
    checks = [
        check_render(pairs),
        check_stop(pairs),
        check_first_token(pairs, margin),
        check_score(*(summary["scores"]["total"] for summary in scores)),
    ]
    different = [
        {"id": question.id, "in_process": local.prediction.text, "server": server.prediction.text}
        for question, (local, server) in zip(questions, pairs, strict=True)
        if local.prediction.text != server.prediction.text
    ]
    differences = (
        _difference(check.name, questions[i], *pairs[i], loaded.tokenizer) for check in checks for i in check.differing
    )
    record = {
        "run": run.name,
        "url": url,
        "model": served,
        "data": source,
        "prompts": len(pairs),
        "too_long_in_process": len(drawn) - len(pairs),
        "passed": all(check.passed is True for check in checks),
        "equal_answers": len(pairs) - len(different),
        "seconds": round(time.monotonic() - start, 1),
        "checks": {check.name: {"passed": check.passed, "text": check.text, **check.numbers} for check in checks},
        "different_answers": different,
        "first_difference": next(differences, None),
    }
    write_json(run / "verify.json", record)
    return record


def answer_by_server(
    url: str,
    model: str,
    questions: Sequence[Conversation],
    max_new_tokens: int,
    concurrency: int,
    frame: Frame = SERVED,
) -> list[ServerAnswer]:
    """The server's answer to each prompt. `return_token_ids` and `return_tokens_as_token_ids` are options of vLLM."""
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    replies = chat_completions(
        url, model, questions, max_new_tokens, concurrency,
        system=frame.system, logprobs=True, top_logprobs=TOP, extra_body=ids,
    )  # fmt: skip
    return [_server_answer(reply, frame) for reply in replies]


def _server_answer(reply: "ChatCompletion | None", frame: Frame) -> ServerAnswer:
    if reply is None:
        return ServerAnswer(prediction_of(reply))
    choice, top = reply.choices[0], None
    if choice.logprobs and choice.logprobs.content:
        named = {one.token: one.logprob for one in choice.logprobs.content[0].top_logprobs}
        if named and all(token.startswith("token_id:") for token in named):
            top = {int(token.removeprefix("token_id:")): logprob for token, logprob in named.items()}
    prompt, answer = (reply.model_extra or {}).get("prompt_token_ids"), (choice.model_extra or {}).get("token_ids")
    return ServerAnswer(prediction_of(reply, frame), prompt, answer, top)


def answer_locally(
    loaded: Loaded, questions: Sequence[Conversation], max_new_tokens: int, batch_tokens: int
) -> dict[int, LocalAnswer]:
    """Answers by the question's index, without questions that are too long for the model."""
    model, tokenizer = loaded.model, loaded.tokenizer
    predictions = generate(model, tokenizer, questions, max_new_tokens, batch_tokens, loaded.packed)
    asked = (i for i, prediction in enumerate(predictions) if prediction.asked)
    prompts = {i: encode_prompt(questions[i].prompt, tokenizer, questions[i].template_arguments) for i in asked}
    first = next_logprobs(model, list(prompts.values()), batch_tokens, loaded.packed)
    return {
        i: LocalAnswer(predictions[i], prompt, logprobs)
        for (i, prompt), logprobs in zip(prompts.items(), first, strict=True)
    }


def _difference(
    check: str, question: Conversation, local: LocalAnswer, server: ServerAnswer, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A prompt that differs: its two renders and answers side by side."""

    def sides(own: list[int], served: list[int] | None, unknown: str) -> dict[str, Any]:
        """Both texts, and their ids from the first difference on."""
        same = common_prefix(own, served) if served is not None else None
        text = tokenizer.decode(served) if served is not None else unknown
        return {
            "equal_tokens": same,
            "in_process": {"text": tokenizer.decode(own), "ids": own[same:]},
            "server": {"text": text, "ids": (served or [])[same:]},
        }

    no_prompt = "(not reported)" if server.prediction.asked else "(too long for the server)"
    return {
        "check": check,
        "id": question.id,
        "where": question.where,
        "prompt": sides(local.prompt, server.prompt, no_prompt),
        "answer": sides(list(local.prediction.ids), server.answer, server.prediction.text),
    }


def print_record(record: dict[str, Any], console: Console) -> None:
    title = f"{record['model']} at {record['url']} against {record['run']}"
    table = Table("check", "", f"{record['prompts']} prompts of {record['data']}", title=title, title_justify="left")
    words = {True: Text("passed", "green"), False: Text("FAILED", "red"), None: Text("NOT CHECKED", "red")}
    for name, check in record["checks"].items():
        table.add_row(name, words[check["passed"]], check["text"])
    console.print(table)
    console.print(f"{record['equal_answers']} of {record['prompts']} answers are the same text", highlight=False)
    if too_long := record["too_long_in_process"]:
        console.print(f"{too_long} prompts need more positions than the model has and are left out", highlight=False)
    if difference := record["first_difference"]:
        console.print(f"\nfirst difference ({difference['check']}): {difference['where']}", highlight=False)
        sides = Table("", "training, in-process", "server", show_lines=True)
        for column in sides.columns:
            column.overflow = "fold"
        for part in ("prompt", "answer"):
            own, served = difference[part]["in_process"], difference[part]["server"]
            sides.add_row(part, printable(own["text"]), "(the same)" if own == served else printable(served["text"]))
            if own != served and difference[part]["equal_tokens"] is not None:
                sides.add_row(f"ids from {difference[part]['equal_tokens']}", str(own["ids"]), str(served["ids"]))
        console.print(sides)
