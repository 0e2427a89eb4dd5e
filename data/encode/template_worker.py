"""Render chat templates in a process of its own, which the kernel limits; started by data/encode/template.py.

python -P data/encode/template_worker.py

A line of JSON asks for several renders, and each has a line of JSON as its reply and limits of its own. The next line
is written once all replies are read, so neither process waits for the other to read. The process ends with its stdin.
Standard library and Jinja only, so that it starts in a tenth of a second.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1_500 * 2**20  # bytes of address space; rendering takes about 50 MiB
REASON = 500  # characters of an error's text


class Generation(Extension):
    """{% generation %}...{% endgeneration %} renders what it encloses, as a call block: it is a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body, lineno=line)

    def _enclosed(self, caller: Callable[[], str]) -> str:
        return caller()


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str, day: str | None = None) -> str:
    return (datetime.fromisoformat(day) if day else datetime.now()).strftime(format)


@lru_cache(maxsize=1)
def environment() -> ImmutableSandboxedEnvironment:
    """transformers' environment without `lipsum`, random text; a test compares what both render."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    del env.globals["lipsum"]
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env


@lru_cache(maxsize=16)
def compiled(template: str) -> Template:
    return environment().from_string(template)


def literals(template: str) -> list[str]:
    tree = environment().parse(template)
    data = [str(node.data) for node in tree.find_all(nodes.TemplateData)]
    return data + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


def texts(
    template: str,
    messages: list[Any],
    parts: list[tuple[int, bool]],
    variables: dict[str, Any],
    characters: int,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The text of each part, the first n messages with or without the generation prompt, or why there is none."""
    done: list[str] = []
    if day := variables.get("template_date"):  # a run's: tomorrow it must render the same
        variables = {**variables, "strftime_now": partial(strftime_now, day=day)}
    for turns, generation in parts:
        given = {"messages": messages[:turns], "add_generation_prompt": generation}
        pieces, left = [], characters
        try:
            for piece in compiled(template).generate(
                **{"tools": None, "documents": None, **variables, **arguments, **given}
            ):
                left -= len(piece)
                if left < 0:
                    return {"over": "characters"}
                pieces.append(piece)
        except MemoryError:
            raise
        except Exception as error:  # whatever foreign code raises
            return {"refused": str(error)[:REASON] or type(error).__name__, "turns": turns}
        done.append("".join(pieces))
    return {"texts": done}


def reply(template: str, variables: dict[str, Any], render: dict[str, Any]) -> dict[str, Any]:
    """The texts of the render's parts, or the template's literals if it names none; or the limit that is exceeded."""
    try:
        if "parts" in render:
            return texts(template, variables=variables, **render)
        return {"literals": literals(template)}
    except MemoryError:
        return {"over": "memory"}
    except Exception as error:
        return {"refused": str(error)[:REASON]}


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    given: dict[str, Any] = {}  # template and variables; a request names them if they change
    for line in sys.stdin.buffer:
        request = json.loads(line)
        given = request.get("given", given)
        for render in request["renders"]:
            # SIGPROF ends the process, also within a call in C
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            try:
                answer = json.dumps(reply(**given, render=render))
            except MemoryError:
                answer = '{"over": "memory"}'
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.buffer.write(answer.encode() + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
