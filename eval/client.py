"""Prompts -> answers through an OpenAI-compatible server: bounded concurrency, retries that are told, progress."""

import asyncio
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from data.conversation import Conversation
from data.errors import UserError
from data.progress import Bar
from eval.answer_log import kept
from eval.prediction import Prediction

if TYPE_CHECKING:  # a second to import, for commands that ask no server
    from openai.types.chat import ChatCompletion

T = TypeVar("T")
TRIES = 7
FIRST_WAIT_S = 0.5  # doubled from try to try: 32 s in all, in which a server is restarted or a queue empties


class ServerError(UserError):
    """The server can't be reached or refuses; the text says what to do."""


def served_model(url: str, wanted: str | None) -> str:
    """The model to ask: the wanted one, or the only one. Raises ServerError where there are several."""
    names = served_models(url)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise ServerError(f"{url} serves {', '.join(names)}; name one of them with --model")
    return wanted


def served_models(url: str) -> list[str]:
    import openai

    # strict: any web server's page is then an OpenAIError too
    client = openai.OpenAI(base_url=url, api_key=api_key(), timeout=60, _strict_response_validation=True)
    try:
        return [model.id for model in client.models.list().data]
    except openai.OpenAIError as error:
        raise _unreachable(url, error) from error


def api_key() -> str:
    """What the server wants, where it wants one: OPENAI_API_KEY, or the VLLM_API_KEY that it was started with."""
    return os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY") or "none"


def ask_server(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    concurrency: int = 16,
    keep: Path | None = None,
) -> list[Prediction]:
    """What eval.predict.generate gives, through POST {url}/chat/completions. Raises ServerError that names the question
    where the server refuses one for another reason than its length.

    keep: a file for the answers as they come; those in it already are not asked again. It is the caller's to delete.
    """

    def ask(
        asked: Sequence[Conversation], note: Callable[[int, Prediction], None] = lambda *_: None
    ) -> list[Prediction]:
        return ask_all(url, model, asked, max_new_tokens, concurrency, _prediction, note)

    return kept(keep, f"{url} {model}", conversations, max_new_tokens, ask) if keep else ask(conversations)


def _prediction(reply: "ChatCompletion | None") -> Prediction:
    if reply is None:
        return Prediction("", 0, finished=False, asked=False)
    choice = reply.choices[0]
    used = reply.usage.completion_tokens if reply.usage else 0
    return Prediction((choice.message.content or "").strip(), used, choice.finish_reason == "stop")


def ask_all(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    concurrency: int,
    take: "Callable[[ChatCompletion | None], T]",
    note: Callable[[int, T], None] = lambda number, taken: None,
    **more: Any,
) -> list[T]:
    """What `take` makes of each greedy reply (None: the prompt is too long for the server), in order; `note` hears of
    each as it comes. more: further arguments of a chat completion."""
    ask = _ask_all(url, model, conversations, max_new_tokens, concurrency, take, note, more)
    return asyncio.run(ask)


async def _ask_all(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    concurrency: int,
    take: "Callable[[ChatCompletion | None], T]",
    note: Callable[[int, T], None],
    more: dict[str, Any],
) -> list[T]:
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key=api_key(), timeout=600, max_retries=0)  # ours are told
    slots = asyncio.Semaphore(concurrency)
    bar = Bar("ask", len(conversations))
    done = again = 0

    async def complete(conversation: Conversation) -> "ChatCompletion | None":
        nonlocal again
        for tried in range(1, TRIES + 1):
            try:
                return await cast(Any, client.chat.completions).create(
                    model=model,
                    messages=list(conversation.prompt),
                    temperature=0,
                    max_tokens=max_new_tokens,
                    **more,
                )
            except openai.BadRequestError as error:
                if "maximum context length" in str(error):  # vLLM's and OpenAI's words
                    return None
                problem = f"question {conversation.id} is refused: {first_line(error)}"
                raise ServerError(f"{url}: {problem}; see the server's log") from error
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                if tried == TRIES:
                    raise _unreachable(url, error, f" ({TRIES} tries)") from error
                again += 1
                if again == 1:
                    problem = f"{first_line(error)}: asking again, up to {TRIES} times, with longer and longer waits"
                    print(f"{url}: {problem}", file=sys.stderr, flush=True)
                await asyncio.sleep(FIRST_WAIT_S * 2 ** (tried - 1) * random.uniform(0.8, 1.2))
            except openai.OpenAIError as error:
                raise _unreachable(url, error) from error
        raise AssertionError("the last try returns or raises")

    async def ask(number: int, conversation: Conversation) -> T:
        nonlocal done
        async with slots:
            taken = take(await complete(conversation))
        note(number, taken)
        done += 1
        bar.update(done, f"{again} asked again" if again else "")
        return taken

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(i, c)) for i, c in enumerate(conversations)]
    except* ServerError as errors:  # the first says enough
        raise errors.exceptions[0] from None
    finally:
        bar.close()
        await client.close()
    if again:
        print(f"{again} requests were asked again; all are answered", file=sys.stderr, flush=True)
    return [task.result() for task in tasks]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _unreachable(url: str, error: BaseException, tries: str = "") -> ServerError:
    return ServerError(f"{url}: {first_line(error)}{tries}; is the server up, and is the address its /v1?")
