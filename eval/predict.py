"""Prompts -> answers: greedy, in-process or through an OpenAI-compatible server."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.chat import encode_prompt, end_of_turn
from data.conversation import Conversation, DataError
from data.errors import UserError
from data.progress import Bar, track
from eval.generate import generate_ids, generate_one
from eval.rows import takes_rows


@dataclass(frozen=True)
class Prediction:
    text: str
    new_tokens: int
    finished: bool  # the model ended its turn; False: cut at max_new_tokens
    asked: bool = True  # False: prompt and answer may need more positions than the model has, so it counts as wrong
    probability: float | None = None  # of the answer, where the system gives one


class ServerError(UserError):
    """The server can't be reached or refuses; the text says what to do."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_tokens: int,
    packed: bool = True,
) -> list[Prediction]:
    """Greedy answers, in order. What several prompts share (a passage) is computed once, and nothing is padded.
    `packed=False` generates one prompt at a time, for models that can't take a pack's mask."""
    prompts = [encode_prompt(c.prompt, tokenizer) for c in conversations]
    limit = max_positions(model.config)
    asked = [i for i, prompt in enumerate(prompts) if limit is None or len(prompt) + max_new_tokens <= limit]
    stop = end_tokens(model, tokenizer)
    model.eval()
    chosen = [prompts[i] for i in asked]
    if packed and takes_rows(model):
        found = generate_ids(model, chosen, stop, max_new_tokens, batch_tokens)
    else:
        found = [generate_one(model, prompt, stop, max_new_tokens) for prompt in track(chosen, "answer")]
    answers = dict(zip(asked, found, strict=True))
    return [
        Prediction(
            str(tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
            len(tokens),
            bool(tokens) and tokens[-1] in stop,
            i in answers,
        )
        for i, tokens in ((i, answers.get(i, [])) for i in range(len(prompts)))
    ]


def check_fits(name: str, prompt_tokens: int, max_new_tokens: int, config: PretrainedConfig) -> None:
    """Raise DataError where the answer could run over the last position that the model was made for."""
    limit = max_positions(config)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise DataError(
            name,
            f"{prompt_tokens} prompt tokens and up to {max_new_tokens} new ones exceed the model's {limit} positions; "
            "lower max_new_tokens or shorten the prompt",
        )


def max_positions(config: PretrainedConfig) -> int | None:
    """None for a model without such a limit: ALiBi, state-space and recurrent ones."""
    text = config.get_text_config()
    return text.max_position_embeddings if hasattr(text, "max_position_embeddings") else None


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end the assistant's turn."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {i for i in (*listed, tokenizer.eos_token_id, end_of_turn(tokenizer)) if i is not None}


def served_model(url: str, wanted: str | None) -> str:
    """The model to ask: the wanted one, or the only one. Raises ServerError where there are several."""
    import openai

    # strict: any web server's page is then an OpenAIError too
    client = openai.OpenAI(base_url=url, api_key=api_key(), timeout=60, _strict_response_validation=True)
    try:
        names = [model.id for model in client.models.list().data]
    except openai.OpenAIError as error:
        raise _unreachable(url, error) from error
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise ServerError(f"{url} serves {', '.join(names)}; name one of them with --model")
    return wanted


def api_key() -> str:
    """What the server wants, where it wants one: OPENAI_API_KEY, or the VLLM_API_KEY that it was started with."""
    return os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY") or "none"


def ask_server(
    url: str, model: str, conversations: Sequence[Conversation], max_new_tokens: int, concurrency: int = 16
) -> list[Prediction]:
    """The same through POST {url}/chat/completions, `concurrency` requests in flight. Raises ServerError that names
    the question where the server refuses one for another reason than its length."""
    return asyncio.run(_ask_all(url, model, conversations, max_new_tokens, concurrency))


async def _ask_all(
    url: str, model: str, conversations: Sequence[Conversation], max_new_tokens: int, concurrency: int
) -> list[Prediction]:
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key=api_key(), timeout=600, max_retries=3)
    slots = asyncio.Semaphore(concurrency)
    bar = Bar("ask", len(conversations))
    done = 0

    async def ask(conversation: Conversation) -> Prediction:
        nonlocal done
        async with slots:
            try:
                reply = await client.chat.completions.create(
                    model=model,
                    messages=cast(Any, list(conversation.prompt)),
                    temperature=0,
                    max_tokens=max_new_tokens,
                )
            except openai.BadRequestError as error:
                if "maximum context length" in str(error):  # vLLM's and OpenAI's words
                    return Prediction("", 0, finished=False, asked=False)
                problem = f"question {conversation.id} is refused: {first_line(error)}"
                raise ServerError(f"{url}: {problem}; see the server's log") from error
            except openai.OpenAIError as error:
                raise _unreachable(url, error) from error
        done += 1
        bar.update(done)
        choice = reply.choices[0]
        used = reply.usage.completion_tokens if reply.usage else 0
        return Prediction((choice.message.content or "").strip(), used, choice.finish_reason == "stop")

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(c)) for c in conversations]
    except* ServerError as errors:  # the first says enough
        raise errors.exceptions[0] from None
    finally:
        bar.close()
        await client.close()
    return [task.result() for task in tasks]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _unreachable(url: str, error: BaseException) -> ServerError:
    return ServerError(f"{url}: {first_line(error)}; is the server up, and is the address its /v1?")
