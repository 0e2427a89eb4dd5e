"""Talk to a run, an export, a base or a server in the terminal: `graft chat TARGET`."""

from collections.abc import Callable
from typing import Any, cast

from rich.console import Console

from data.conversation import Message
from data.encode.chat import encode_prompt, stop_tokens
from data.errors import UserError
from sft.models.target import is_url, load_target

Reply = Callable[[list[Message]], str]


def chat(target: str, served_model: str | None, system: str | None, max_new_tokens: int) -> None:
    """Read a line, stream an answer; /reset forgets the conversation, an empty line or Ctrl-D ends it."""
    console = Console()
    reply = _server(target, served_model, max_new_tokens) if is_url(target) else _local(target, max_new_tokens)
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    console.print("[dim]/reset starts anew, an empty line or Ctrl-D ends[/dim]")
    while True:
        try:
            line = console.input("[bold]you[/bold] ").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": reply(messages)})
        except UserError as error:  # too long, or the server is away: what was said before is kept
            messages.pop()
            console.print(f"error: {error}; /reset starts anew", style="red", markup=False, highlight=False)


def _local(target: str, max_new_tokens: int) -> Reply:
    import torch
    from transformers import TextStreamer

    from eval.predict import check_fits

    loaded = load_target(target)
    stop = stop_tokens(loaded.model.generation_config.eos_token_id, loaded.tokenizer)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def reply(messages: list[Message]) -> str:
        device = next(loaded.model.parameters()).device
        prompt = encode_prompt(messages, loaded.tokenizer)
        check_fits("conversation", len(prompt), max_new_tokens, loaded.model.config)
        ids = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            out = cast(Any, loaded.model).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                eos_token_id=stop, pad_token_id=min(stop), use_cache=True, streamer=streamer,
            )  # fmt: skip
        return str(loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    return reply


def _server(url: str, served_model: str | None, max_new_tokens: int) -> Reply:
    import openai

    from eval.client import ServerError, api_key
    from eval.client import served_model as find_model

    name = find_model(url, served_model)
    client = openai.OpenAI(base_url=url, api_key=api_key())

    def reply(messages: list[Message]) -> str:
        try:
            stream = cast(Any, client.chat.completions).create(
                model=name, messages=messages, max_tokens=max_new_tokens, temperature=0, stream=True
            )
            parts = []
            for event in stream:
                parts.append(event.choices[0].delta.content or "" if event.choices else "")
                print(parts[-1], end="", flush=True)
            print()
            return "".join(parts)
        except openai.OpenAIError as error:
            raise ServerError(f"{url}: {error}; is the server up, and is the address its /v1?") from error

    return reply
