"""Chat template -> text, exactly as transformers renders it, within limits of time and size.

A chat template is a program that comes with a model. transformers runs it in a sandbox without access to Python's
internals, but with no limit of time or memory. Here another process renders (data/encode/template_worker.py), and the
kernel limits it, so the limits hold for whatever a template calls.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import IO, Any, cast

from transformers import PreTrainedTokenizerBase

from data.conversation import DataError, Message
from data.encode import template_worker

SECONDS = 10.0  # CPU time of one render
CHARACTERS = 10_000_000  # of one render, plus 100 for each character of the messages
TEMPLATE_CHARACTERS = 200_000  # the longest real templates have about 20,000

TURNS = ("system", "user", "assistant", "user")
PROBES = [
    [{"role": role, "content": "What is the capital of France?"} for role in turns]
    for turns in (TURNS, TURNS[1:], TURNS[1:2])
]

ARGUMENTS = "chat_template_kwargs"  # in a row, in a tokenizer's config and in a request to vLLM
OVER_LIMITS = "chat template over its limits"  # a DataError's kind


class _Worker:
    """The process that renders. It is started at the first render, and again after a render that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner, self.template = 0, ""
        self.lock = threading.Lock()  # one request at a time

    def ask(self, template: str, **request: Any) -> dict[str, Any]:
        """The reply, or {"over": what} if the render ended the process."""
        with self.lock:
            process = self.process
            if process is None or self.owner != os.getpid():  # a forked process needs a worker of its own
                process = self._start()
            if template != self.template:
                request["template"] = self.template = template
            try:
                with contextlib.suppress(BrokenPipeError):
                    cast(IO[bytes], process.stdin).write(json.dumps(request).encode() + b"\n")
                    cast(IO[bytes], process.stdin).flush()
                line = cast(IO[bytes], process.stdout).readline()
            except BaseException:  # Ctrl-C: the next request must not get this one's reply
                self.stop()
                raise
            if line:
                return dict(json.loads(line))
            self.process = None
            process.communicate()  # waits for its end
            ended = process.returncode
            return {"over": "seconds" if ended == -signal.SIGPROF else f"exit code {ended}"}

    def _start(self) -> "subprocess.Popen[bytes]":
        self.process = subprocess.Popen(
            [sys.executable, "-P", template_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process only
        )
        self.owner, self.template = os.getpid(), ""
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


def row_arguments(tokenizer: PreTrainedTokenizerBase, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The tokenizer's arguments with a row's own."""
    return {**(arguments_of(tokenizer) or {}), **(own or {})}


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    generation: bool,
    where: str = "",
    seconds: float = SECONDS,
    characters: int = CHARACTERS,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Text of the messages; `generation` appends the beginning of the assistant's turn. arguments: for the template, in
    place of the tokenizer's.

    Raises DataError, naming model.chat_template, if the template refuses the messages, fails or exceeds a limit.
    """
    parts = [(len(messages), generation)]
    return render_parts(messages, tokenizer, parts, where, seconds, characters, arguments)[0]


def render_parts(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[tuple[int, bool]],
    where: str = "",
    seconds: float = SECONDS,
    characters: int = CHARACTERS,
    arguments: Mapping[str, Any] | None = None,
) -> list[str]:
    """The text of each part (n, generation), the first n messages, by one request. See `render`."""
    limit = characters + 100 * sum(len(m["content"]) for m in messages)
    variables = {**tokenizer.special_tokens_map, **(row_arguments(tokenizer) if arguments is None else arguments)}
    request = {"messages": list(messages), "parts": list(parts), "variables": variables}
    reply = _ask(str(tokenizer.get_chat_template()), where, seconds, characters=limit, **request)
    if "refused" in reply:
        roles = ", ".join(m["role"] for m in messages[: reply["turns"]])
        raise DataError(
            where,
            f"the chat template refuses the turns {roles}: {reply['refused']}; "
            "change the turns or set model.chat_template",
            "chat template refuses the turns",
        )
    return list(reply["texts"])


def probe(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError if a template of the tokenizer exceeds a limit with usual turns. It may refuse turns."""
    own = tokenizer.chat_template or ""
    for template in own.values() if isinstance(own, dict) else [own]:
        for turns in PROBES:
            request = {"messages": turns, "parts": [(len(turns), True)], "variables": tokenizer.special_tokens_map}
            _ask(template, "", SECONDS, characters=CHARACTERS, **request)


@lru_cache(maxsize=16)
def literals(template: str) -> tuple[str, ...]:
    """The literal texts of a template, including those in its conditions; none if it can't be parsed."""
    return tuple(_ask(template, "", SECONDS).get("literals", ()))


def _ask(template: str, where: str, seconds: float, **request: Any) -> dict[str, Any]:
    """The worker's reply. Raises DataError if a limit is exceeded."""
    if len(template) > TEMPLATE_CHARACTERS:
        problem = f"has {len(template):,} characters, the limit is {TEMPLATE_CHARACTERS:,}"
    else:
        reply = _worker.ask(template, seconds=seconds, **request)
        if "over" not in reply:
            return reply
        problem = {
            "seconds": f"takes more than {seconds:g} s in one render",
            "memory": f"needs more than {template_worker.MEMORY / 2**20:,.0f} MiB in one render",
            "characters": f"makes more than {request.get('characters', 0):,} characters in one render",
        }.get(reply["over"], f"ended the process that renders it ({reply['over']})")
    raise DataError(where, f"the chat template {problem}; set model.chat_template to another one", OVER_LIMITS)
