"""Chat template -> text, exactly as transformers renders it, within limits of time and size.

A chat template is a program that comes with a model. transformers runs it in a sandbox without access to Python's
internals, but with no limit of time or memory. Here another process renders (data/encode/template_worker.py), and the
kernel limits it, so the limits hold for whatever a template calls.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import IO, Any, cast

from transformers import PreTrainedTokenizerBase

from data.conversation import ARGUMENTS, DATE, DataError, Message
from data.encode import template_worker

SECONDS = 10.0  # CPU time of one render
CHARACTERS = 10_000_000  # of one render, plus 100 for each character of the messages
TEMPLATE_CHARACTERS = 200_000  # the longest real templates have about 20,000

TURNS = ("system", "user", "assistant", "user")
PROBES = [
    [{"role": role, "content": "What is the capital of France?"} for role in turns]
    for turns in (TURNS, TURNS[1:], TURNS[1:2])
]

TODAY = re.compile(r"set (\w+) = strftime_now\((['\"])(.+?)\2\)")
OVER_LIMITS = "chat template over its limits"  # a DataError's kind


@dataclass
class Render:
    """One render: the text of each part (n, generation), the first n messages; `generation` appends the beginning of
    the assistant's turn. arguments: what the template is given besides."""

    messages: Sequence[Message]
    parts: Sequence[tuple[int, bool]]
    where: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


Result = list[str] | DataError  # the texts of a render


class _Worker:
    """The process that renders. It is started at the first render, and again after a render that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.given: dict[str, Any] = {}  # template and variables of the last request
        self.lock = threading.Lock()  # one request at a time

    def ask(
        self,
        template: str,
        variables: dict[str, Any],
        renders: Sequence[dict[str, Any]],
        seconds: float,
        receive: Callable[[dict[str, Any]], None],
    ) -> None:
        """Call `receive` with the reply to each render, while the worker goes on to the next. The reply to a render
        that ends the process is {"over": what}; those after it get none. `receive` must not ask for a render."""
        if len(template) > TEMPLATE_CHARACTERS:
            return receive({"over": "length"})
        given = {"template": template, "variables": variables}
        with self.lock:
            process = self.process
            if process is None or self.owner != os.getpid():  # a forked process needs a worker of its own
                process = self._start()
            request: dict[str, Any] = {"renders": renders, "seconds": seconds}
            if given != self.given:
                request["given"] = self.given = given
            try:
                with contextlib.suppress(BrokenPipeError):
                    cast(IO[bytes], process.stdin).write(json.dumps(request).encode() + b"\n")
                    cast(IO[bytes], process.stdin).flush()
                for _ in renders:
                    if not (line := cast(IO[bytes], process.stdout).readline()):
                        break
                    receive(json.loads(line))
                else:
                    return
            except BaseException:  # Ctrl-C: the next request must not get this one's replies
                self.stop()
                raise
            self.process = None
            process.communicate()  # waits for its end
            ended = process.returncode
        return receive({"over": "seconds" if ended == -signal.SIGPROF else f"exit code {ended}"})

    def _start(self) -> "subprocess.Popen[bytes]":
        self.process = subprocess.Popen(
            [sys.executable, "-P", template_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process only
        )
        self.owner, self.given = os.getpid(), {}
        return self.process

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.communicate()


_worker = _Worker()
atexit.register(_worker.stop)


def arguments_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """What the tokenizer's template is given by default; None if that is not decided. It is saved with the tokenizer,
    so that an adapter and an export are asked as they were trained."""
    own: dict[str, Any] | None = tokenizer.init_kwargs.get(ARGUMENTS)
    return own


def date_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The day, YYYY-MM-DD, that the tokenizer's template writes as today; None: the day on which it is rendered."""
    own: str | None = tokenizer.init_kwargs.get(DATE)
    return own


def date_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The fixed date by the names of a template's variables that stand in for today's, as Llama 3's `date_string`: for
    a server, which has no other way to fix it."""
    day, template = date_of(tokenizer), str(tokenizer.chat_template)
    if day is None:
        return {}
    named = ((m[1], date.fromisoformat(day).strftime(m[3])) for m in TODAY.finditer(template))
    return {name: text for name, text in named if f"{name} is defined" in template}


def row_arguments(tokenizer: PreTrainedTokenizerBase, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The tokenizer's arguments with a row's own."""
    return {**(arguments_of(tokenizer) or {}), **(own or {})}


def render_all(
    renders: Sequence[Render],
    tokenizer: PreTrainedTokenizerBase,
    receive: Callable[[Result], None],
    seconds: float = SECONDS,
    characters: int = CHARACTERS,
    template: str | None = None,
) -> None:
    """Call `receive` with the texts of each render, in order, while the worker goes on to the next; with a DataError
    that names model.chat_template if the template refuses the messages, fails or exceeds a limit. Renders after one
    that exceeds a limit may be left out. `receive` must not render itself.

    template: another one than the tokenizer's default.
    """
    if template is None:
        template = str(tokenizer.get_chat_template())
    limits = [characters + 100 * sum(len(m["content"]) for m in each.messages) for each in renders]
    requests = [
        {"messages": each.messages, "parts": each.parts, "characters": limit, "arguments": each.arguments}
        for each, limit in zip(renders, limits, strict=True)
    ]
    answered = iter(zip(renders, limits, strict=True))

    def received(reply: dict[str, Any]) -> None:
        asked, limit = next(answered)
        if "texts" in reply:
            receive(reply["texts"])
        elif "refused" in reply:
            roles = ", ".join(m["role"] for m in asked.messages[: reply["turns"]])
            problem = (
                f"the chat template refuses the turns {roles}: {reply['refused']}; "
                "change the turns or set model.chat_template"
            )
            receive(DataError(asked.where, problem, "chat template refuses the turns"))
        else:
            receive(_over(reply["over"], template, asked.where, seconds, limit))

    variables = {**tokenizer.special_tokens_map, DATE: date_of(tokenizer)}
    _worker.ask(template, variables, requests, seconds, received)


def probe(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError if a template of the tokenizer exceeds a limit with usual turns. It may refuse turns."""
    own = tokenizer.chat_template or ""
    renders = [Render(turns, [(len(turns), True)]) for turns in PROBES]
    results: list[Result] = []
    for template in own.values() if isinstance(own, dict) else [own]:
        render_all(renders, tokenizer, results.append, SECONDS, template=template)
        for result in results:
            if isinstance(result, DataError) and result.kind == OVER_LIMITS:
                raise result


@lru_cache(maxsize=16)
def literals(template: str) -> tuple[str, ...]:
    """The literal texts of a template, including those in its conditions; none if it can't be parsed."""
    replies: list[dict[str, Any]] = []
    _worker.ask(template, {}, [{}], SECONDS, replies.append)
    if "over" in replies[0]:
        raise _over(replies[0]["over"], template, "", SECONDS, 0)
    return tuple(replies[0].get("literals", ()))


def _over(what: str, template: str, where: str, seconds: float, characters: int) -> DataError:
    problem = {
        "length": f"has {len(template):,} characters, the limit is {TEMPLATE_CHARACTERS:,}",
        "seconds": f"takes more than {seconds:g} s in one render",
        "memory": f"needs more than {template_worker.MEMORY / 2**20:,.0f} MiB in one render",
        "characters": f"makes more than {characters:,} characters in one render",
    }.get(what, f"ended the process that renders it ({what})")
    return DataError(where, f"the chat template {problem}; set model.chat_template to another one", OVER_LIMITS)
