"""Prompts -> replies of an OpenAI-compatible server: bounded concurrency, reported retries, progress.

The key of the OpenAI account goes to api.openai.com, or to the address of OPENAI_BASE_URL, and nowhere else.
Requests to this machine go past any proxy of the environment, which would read the key and could not reach the server.
"""

import asyncio
import contextlib
import ipaddress
import json
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data.conversation import ARGUMENTS, CALLS, TOOLS, Conversation, Message
from data.encode.frame import SERVED, Frame, spoken, without_system
from data.errors import UserError
from data.progress import Bar
from data.terminal import print
from data.tool_calls import answer_text, json_value
from eval.answer_log import Note, resume_answers
from eval.prediction import NOT_ASKED, Prediction

if TYPE_CHECKING:  # importing openai takes a second, which commands without a server save
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

TRIES = 7
OPENAI_URL = "https://api.openai.com/v1"
CHECK_URL = "is the server up, and is the address its /v1?"
FIRST_WAIT_S = 0.5  # doubled after each try: 32 s in all, enough for a server to restart or a queue to empty


class ServerError(UserError):
    """The server can't be reached or refuses; the message names the remedy."""


def served_model(url: str, wanted: str | None) -> str:
    """The name of the model to ask: the wanted one, or the only one. Raises ServerError if the server serves several
    models, or not the wanted one."""
    names = served_models(url)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise ServerError(f"{url} serves {', '.join(names)}; name one of them with --model")
    return wanted


def served_models(url: str) -> list[str]:
    # strict: the page of any other web server is then an OpenAIError too
    with openai_client(url, timeout=60, _strict_response_validation=True) as client:
        return [model.id for model in client.models.list().data]


@contextlib.contextmanager
def openai_client(url: str, remedy: str = CHECK_URL, direct: bool = False, **options: Any) -> "Iterator[OpenAI]":
    """A client of the server; its errors become a ServerError with the remedy. direct: past any proxy."""
    import openai

    transport = openai.DefaultHttpxClient(trust_env=not direct and not on_this_machine(url))
    try:
        with openai.OpenAI(http_client=transport, **_identity(url) | options) as client:
            yield client
    except openai.OpenAIError as error:
        raise ServerError(f"{url}: {_first_line(error)}; {remedy}") from error


def api_key(url: str) -> str:
    """The key to send: OPENAI_API_KEY to OpenAI and to OPENAI_BASE_URL, VLLM_API_KEY to other addresses; or "none"."""
    own, account = (os.environ.get(name, "") for name in ("VLLM_API_KEY", "OPENAI_API_KEY"))
    if _origin(url) == _origin(OPENAI_URL):
        return account or "none"
    if not _takes_account(url):
        return own or "none"
    return (own or account if on_this_machine(url) else account or own) or "none"


def on_this_machine(url: str) -> bool:
    """Whether the address is a loopback one, or 0.0.0.0; names other than localhost are not looked up."""
    host = _origin(url)[1]
    try:
        address = ipaddress.ip_address(host if ":" in host else socket.inet_aton(host))  # inet_aton knows 127.1 too
    except (ValueError, OSError):
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _identity(url: str) -> dict[str, Any]:
    """Options of an OpenAI client, which by itself sends the account's ids in the environment to any address."""
    import openai

    ids = {} if _takes_account(url) else dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.omit)
    key = api_key(url)
    return {"base_url": url, "api_key": key, "default_headers": {"Authorization": f"Bearer {key}", **ids}}


def _takes_account(url: str) -> bool:
    """Whether the user has named the address as one for the OpenAI account."""
    return _origin(url) in (_origin(OPENAI_URL), _origin(os.environ.get("OPENAI_BASE_URL") or OPENAI_URL))


def _origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port as the HTTP client reads them."""
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ServerError(f"{url}: is no address: {error}; name a server's /v1") from error
    return parsed.scheme, parsed.host, parsed.port


def server_predictions(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    concurrency: int = 16,
    keep: Path | None = None,
    recheck: int = 0,
    frame: Frame = SERVED,
) -> list[Prediction]:
    """The predictions of eval.predict.generate, through POST {url}/chat/completions. Raises ServerError that names the
    question if the server refuses one for another reason than its length.

    frame: what the model writes around an answer.
    keep, recheck: a file for the answers as they come, see eval.answer_log.resume_answers.
    """

    def ask(questions: Sequence[Conversation], note: Note = lambda number, answer: None) -> list[Prediction]:
        replies = chat_completions(
            url, model, questions, max_new_tokens, concurrency,
            lambda number, reply: note(number, prediction_of(reply, frame)), frame.system,
        )  # fmt: skip
        return [prediction_of(reply, frame) for reply in replies]

    if not keep:
        return ask(conversations)
    return resume_answers(keep, f"{url} {model}", conversations, max_new_tokens, ask, recheck)


def prediction_of(reply: "ChatCompletion | None", frame: Frame = SERVED) -> Prediction:
    if reply is None:
        return NOT_ASKED
    choice = reply.choices[0]
    new_tokens = reply.usage.completion_tokens if reply.usage else 0
    written = (choice.message.content or "").strip()
    text = spoken(written, frame)
    if choice.message.tool_calls:
        text = answer_text(text, map(_call, choice.message.tool_calls))
    more = None if text == written else written
    return Prediction(text, new_tokens, choice.finish_reason in ("stop", "tool_calls"), written=more)


def _call(call: Any) -> dict[str, Any]:
    """Name and arguments of a call in a reply; arguments that are no JSON stay text."""
    value, _ = json_value(call.function.arguments or "{}", 0)
    return {"name": call.function.name, "arguments": call.function.arguments if value is None else value}


def chat_completions(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    concurrency: int,
    note: "Callable[[int, ChatCompletion | None], None]" = lambda number, reply: None,
    system: bool | None = True,
    **options: Any,
) -> "list[ChatCompletion | None]":
    """The greedy replies in order; None for a prompt that is too long for the server.

    note: called with the number and the reply of each question as it comes. system: whether the server's chat template
    takes a system turn, as in Frame. options: further arguments of a chat completion.
    """
    import openai

    slots = asyncio.Semaphore(concurrency)
    bar = Bar("ask", len(conversations))
    answered = retries = 0

    async def ask(client: openai.AsyncOpenAI, number: int, conversation: Conversation) -> "ChatCompletion | None":
        nonlocal answered, retries
        reply: ChatCompletion | None = None
        own = list(conversation.prompt) if system in (True, None) else without_system(conversation.prompt)
        messages = sent(own)
        async with slots:
            for tried in range(1, TRIES + 1):
                try:
                    reply = await cast(Any, client.chat.completions).create(
                        model=model,
                        messages=messages,
                        temperature=0,
                        max_tokens=max_new_tokens,
                        **_with_arguments(options, conversation),
                    )
                    break
                except openai.BadRequestError as error:
                    if "maximum context length" in str(error):  # vLLM's and OpenAI's words
                        break
                    if system is None and messages != (joined := without_system(messages)) and "role" in str(error):
                        messages = joined  # the template may refuse a system turn
                        continue
                    problem = f"question {conversation.id} is refused: {_first_line(error)}"
                    raise ServerError(f"{url}: {problem}; see the server's log") from error
                except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                    if tried == TRIES:
                        raise ServerError(f"{url}: {_first_line(error)} ({TRIES} tries); {CHECK_URL}") from error
                    retries += 1
                    if retries == 1:
                        problem = f"{_first_line(error)}: asking again, up to {TRIES} times, with growing waits"
                        print(f"{url}: {problem}", file=sys.stderr, flush=True)
                    await asyncio.sleep(FIRST_WAIT_S * 2 ** (tried - 1) * random.uniform(0.8, 1.2))
                except openai.OpenAIError as error:
                    raise ServerError(f"{url}: {_first_line(error)}; {CHECK_URL}") from error
        note(number, reply)
        answered += 1
        bar.update(answered, f"{retries} asked again" if retries else "")
        return reply

    async def ask_all() -> "list[ChatCompletion | None]":
        # openai's own retries are not reported
        transport = openai.DefaultAsyncHttpxClient(trust_env=not on_this_machine(url))
        client = openai.AsyncOpenAI(http_client=transport, timeout=600, max_retries=0, **_identity(url))
        async with client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(client, i, c)) for i, c in enumerate(conversations)]
        return [task.result() for task in tasks]

    try:
        replies = asyncio.run(ask_all())
    except* ServerError as errors:
        raise errors.exceptions[0] from None  # the others say the same
    finally:
        bar.close()
    if retries:
        print(f"{retries} requests were asked again; all are answered", file=sys.stderr, flush=True)
    return replies


def _with_arguments(options: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
    """The options of a request, with the row's tools, and its arguments of the chat template as vLLM takes them."""
    arguments = dict(conversation.template_arguments)
    if tools := arguments.pop(TOOLS, None):
        options = {**options, TOOLS: tools}
    if not arguments:
        return options
    return {**options, "extra_body": {**options.get("extra_body", {}), ARGUMENTS: arguments}}


def sent(messages: Sequence[Message]) -> list[Message]:
    """The messages as OpenAI's interface takes them: arguments of calls as JSON text, and an id for each call, by which
    its result names it."""
    result: list[Message] = []
    waiting: list[str] = []  # ids of calls without a result so far
    for i, message in enumerate(messages):
        if CALLS in message:
            calls = [_sent(call, f"call{i:02}{j:03}") for j, call in enumerate(message[CALLS])]
            waiting = [call["id"] for call in calls]
            message = {**message, CALLS: calls}
        elif message["role"] == "tool":
            id = message.get("tool_call_id") or (waiting[0] if waiting else f"call{i:02}000")
            waiting = [each for each in waiting if each != id]
            message = {**message, "tool_call_id": id}
        result.append(message)
    return result


def _sent(call: dict[str, Any], id: str) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": id, **call, "function": {**function, "arguments": text}}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
