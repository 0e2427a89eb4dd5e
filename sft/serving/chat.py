"""Talk to a run, an export, a base or a server in the terminal: `graft chat TARGET`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from rich.text import Text

from data.conversation import Message
from data.encode.chat import encode_prompt, stop_tokens
from data.errors import UserError
from data.readers.prompts import columns_in
from data.terminal import Console, print
from sft.models.target import is_run, is_url, load_target, run_any_recipe
from sft.recipe.schema import Recipe, common_prompts

Reply = Callable[[list[Message]], str]


def chat(target: str, served_model: str | None, system: str | None, max_new_tokens: int) -> None:
    """Read a line, stream an answer; /reset forgets the conversation, an empty line or Ctrl-D ends it.

    system: by default the one that the recipe of a run gives all rows."""
    console = Console()
    if system is None and is_run(target):
        system = system_of_rows(Path(target))
        if system:
            console.print(f"system: {system}", style="dim", highlight=False, markup=False)
    reply = _server(target, served_model, max_new_tokens) if is_url(target) else _local(target, max_new_tokens)
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    console.print("/reset starts over, an empty line or Ctrl-D ends", style="dim", highlight=False)
    for line in _lines(console):
        if line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": reply(messages)})
        except UserError as error:  # too long, or the server is down: drop this line and go on
            messages.pop()
            console.print(f"error: {error}; /reset starts over", style="red", highlight=False)


def system_of_rows(run: Path) -> str | None:
    """The recipe's `system` of data.train; None if sources differ or if it is written from columns."""
    recipe = run_any_recipe(run)
    template = common_prompts(recipe.data.train).get("system") if isinstance(recipe, Recipe) else None
    return None if template is None or columns_in(template) else template.replace("{{", "{").replace("}}", "}")


def _lines(console: Console) -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while line := console.input(Text("you ", "bold")).strip():
            yield line


def _local(target: str, max_new_tokens: int) -> Reply:
    from transformers import TextStreamer

    from eval.generate import generate_one
    from eval.predict import check_fits

    loaded = load_target(target)
    model, tokenizer = loaded.model, loaded.tokenizer
    stop = set(stop_tokens(model.generation_config.eos_token_id, tokenizer))

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", flush=True)

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def reply(messages: list[Message]) -> str:
        prompt = encode_prompt(messages, tokenizer)
        check_fits("conversation", len(prompt), max_new_tokens, model.config)
        answer = generate_one(model, prompt, stop, max_new_tokens, streamer)
        return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()

    return reply


def _server(url: str, served_model: str | None, max_new_tokens: int) -> Reply:
    from eval.client import openai_client
    from eval.client import served_model as find_model

    name = find_model(url, served_model)

    def reply(messages: list[Message]) -> str:
        answer = ""
        with openai_client(url) as client:
            for event in cast(Any, client.chat.completions).create(
                model=name, messages=messages, max_tokens=max_new_tokens, temperature=0, stream=True
            ):
                part = event.choices[0].delta.content or "" if event.choices else ""
                answer += part
                print(part, end="", flush=True)
        print()
        return answer

    return reply
