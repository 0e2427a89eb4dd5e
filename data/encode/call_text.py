"""The form of a call in a model's answer, learnt from calls that its chat template renders.

Three forms cover the families: a JSON object of name and arguments (Hermes, Qwen, Llama 3, Mistral), a name and then
the arguments as JSON (gpt-oss, DeepSeek), or each argument by itself (Qwen3-Coder, GLM, Gemma, LFM2).
"""

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from data.tool_calls import Call, is_call, json_value

NAME, KEY, VALUE, COUNT, OTHER = "look_up_ferry", "harbour", "Aldern", 7093, "tide"
ARGUMENTS = re.compile(rf'\{{\s*"{KEY}"\s*:\s*"{VALUE}"\s*\}}')
NAMED = re.compile(r"[\w.\-/]+")
BARE_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w-]*)(?=\s*:)")


PARSER = "tool_call_parser"  # in a tokenizer's config: vLLM's name of the form
# vLLM's parsers by what is in a form; the first that fits
PARSERS = {
    "<atem:function_calls>": "muse_glimmer",
    "to=functions.": "openai",
    "<function=": "qwen3_coder",
    "<arg_key>": "glm45",
    "<|tool_call>call:": "gemma4",
    "<|tool_call_start|>": "lfm2",
    "[TOOL_CALLS]": "mistral",
    "function<｜tool▁sep｜>": "deepseek_v3",
    "<｜tool▁sep｜>": "deepseek_v31",
    "<|tool_call_argument_begin|>": "kimi_k2",
    "<|tool_call|>": "granite",
    "'opening': '<tool_call>', 'name': 'name', 'arguments': 'arguments'": "hermes",
    "'opening': '', 'name': 'name', 'arguments': 'parameters'": "llama3_json",
}


@dataclass(frozen=True)
class Probes:
    """Answers that call NAME with {KEY: VALUE}, {KEY: VALUE, OTHER: ...}, {KEY: COUNT}, {KEY: COUNT, OTHER: COUNT} and
    nothing, and one that calls it twice; without what precedes the answer."""

    one: str
    pair: str
    number: str
    numbers: str
    none: str
    twice: str


@dataclass(frozen=True)
class CallText(ABC):
    """The texts around the parts of a call. opening: before it, "" if the whole answer is the call."""

    opening: str

    def read(self, text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[Call]] | None:
        """The text before the calls, and the calls; None if it holds none or one that is cut off."""
        at = text.find(self.opening) if self.opening else len(text) - len(text.lstrip())
        calls, place = list[Call](), at
        while place >= 0 and (read := self.one(text, place, tools)):
            call, place = read
            calls.append(call)
            place = self.next(text, place)
        return (text[:at].strip(), calls) if calls and place < 0 else None

    @abstractmethod
    def one(self, text: str, at: int, tools: Sequence[dict[str, Any]]) -> tuple[Call, int] | None:
        """The call that begins at `at`, and its end."""

    def next(self, text: str, end: int) -> int:
        """Where the next call begins; -1 after the last."""
        return text.find(self.opening, end) if self.opening else -1


@dataclass(frozen=True)
class ObjectText(CallText):
    """A JSON object with these keys."""

    name: str = "name"
    arguments: str = "arguments"

    def one(self, text: str, at: int, tools: Sequence[dict[str, Any]]) -> tuple[Call, int] | None:
        brace = text.find("{", at)
        if brace < 0 or text[at + len(self.opening) : brace].strip(" \n[,;"):
            return None
        value, end = json_value(text, brace)
        call = (
            {"name": value.get(self.name), "arguments": value.get(self.arguments)} if isinstance(value, dict) else None
        )
        return (call, end) if call and is_call(call) else None

    def next(self, text: str, end: int) -> int:
        rest = text[end:].lstrip(" \n,;")
        if rest.startswith("{"):  # of a list
            return len(text) - len(rest) - len(self.opening)
        return super().next(text, end)


@dataclass(frozen=True)
class NameText(CallText):
    """The name, a text between, and the arguments as JSON."""

    between: str = ""

    def one(self, text: str, at: int, tools: Sequence[dict[str, Any]]) -> tuple[Call, int] | None:
        start = at + len(self.opening)
        middle = text.find(self.between, start)
        if middle < 0 or not NAMED.fullmatch(name := text[start:middle].strip()):
            return None
        arguments, end = json_value(text, middle + len(self.between))
        return ({"name": name, "arguments": arguments}, end) if isinstance(arguments, dict) else None


@dataclass(frozen=True)
class ParameterText(CallText):
    """Each argument by itself. first: before the first key; assign: between key and value; separator: between a value
    and the next key; end: after the last value; empty: after the name of a call without arguments. Each of assign,
    separator and end is there for a text and for other values."""

    first: str = ""
    assign: tuple[str, str] = ("", "")
    separator: tuple[str, str] = ("", "")
    end: tuple[str, str] = ("", "")
    empty: str = ""

    def one(self, text: str, at: int, tools: Sequence[dict[str, Any]]) -> tuple[Call, int] | None:
        start = at + (len(self.opening) if text.startswith(self.opening, at) else 0)
        named = NAMED.match(text, start)
        if not named:
            return None
        name, place, arguments = named[0], named.end(), dict[str, Any]()
        if self.empty and text.startswith(self.empty, place):
            return {"name": name, "arguments": {}}, place + len(self.empty)
        if not text.startswith(self.first, place):
            return None
        place += len(self.first)
        types = _types(tools, name)
        while True:
            middle = text.find(self.assign[1], place)
            if middle < 0:
                return None
            key = text[place:middle]
            quoted = int(not text.startswith(self.assign[0], middle))  # 0: a text
            place = middle + len(self.assign[quoted])
            stop = self._stop(text, place, quoted)
            if stop < 0:
                return None
            last = text.startswith(self.end[quoted], stop)
            arguments[key] = self._value(text[place:stop], types.get(key), quoted)
            place = stop + len((self.end if last else self.separator)[quoted])
            if last:
                return {"name": name, "arguments": arguments}, place

    def next(self, text: str, end: int) -> int:
        rest = text[end:].lstrip(" \n,")
        if rest.startswith(self.opening):
            return len(text) - len(rest)
        return len(text) - len(rest) if text[end:].startswith(",") else super().next(text, end)

    def _stop(self, text: str, place: int, quoted: int) -> int:
        """Where the value that begins at `place` ends; -1 if it does not. A comma in a list or a quote is no end."""
        marks = (self.separator[quoted], self.end[quoted])
        if not quoted or self.assign[0] == self.assign[1]:
            return min((at for mark in marks if (at := text.find(mark, place)) >= 0), default=-1)
        quotes, depth = (self.assign[0][len(self.assign[1]) :], *(['"'] if self.assign[0].endswith("'") else [])), 0
        while place < len(text):
            if depth == 0 and text.startswith(marks, place):
                return place
            if quote := next((quote for quote in quotes if quote and text.startswith(quote, place)), ""):
                closing = text.find(quote, place + len(quote))
                if closing < 0:
                    return -1
                place = closing + len(quote)
                continue
            depth += (text[place] in "[{(") - (text[place] in "]})")
            place += 1
        return -1

    def _value(self, raw: str, declared: str | None, quoted: int) -> Any:
        alike = self.assign[0] == self.assign[1]
        if (not alike and not quoted) or (alike and declared == "string"):
            return raw
        delimiter = self.assign[0][len(self.assign[1]) :]
        quotes = raw.replace(delimiter, '"') if delimiter else raw
        for text, decode in ((raw, json.loads), (raw, ast.literal_eval), (BARE_KEY.sub(r'\1"\2"', quotes), json.loads)):
            try:
                return decode(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
        return raw


def parser_of(form: CallText | None) -> str | None:
    """vLLM's parser of the form; None if none is known."""
    text = str(vars(form)) if form else ""
    return next((name for mark, name in PARSERS.items() if mark in text), None)


def learn_call_text(probes: Probes) -> CallText | None:
    """The form of the probes' calls; None if it is none of the three."""
    if match := ARGUMENTS.search(probes.one):
        return _learn_object(probes.one) or _learn_name(probes.one, match.start())
    return _learn_parameters(probes)


def _learn_object(text: str) -> ObjectText | None:
    for match in re.finditer(r"\{", text[: text.find(NAME)]):
        value, _ = json_value(text, match.start())
        if isinstance(value, dict) and NAME in value.values():
            keys = {json.dumps(v): key for key, v in value.items()}
            arguments = keys.get(json.dumps({KEY: VALUE}))
            if arguments:
                return ObjectText(text[: match.start()].strip(" \n["), keys[json.dumps(NAME)], arguments)
    return None


def _learn_name(text: str, arguments: int) -> NameText | None:
    at = text.rfind(NAME, 0, arguments)
    return NameText(text[:at].strip(), text[at + len(NAME) : arguments]) if at >= 0 else None


def _learn_parameters(probes: Probes) -> ParameterText | None:
    one, pair, number, numbers = (
        _around(text, value)
        for text, value in (
            (probes.one, VALUE), (probes.pair, VALUE), (probes.number, str(COUNT)), (probes.numbers, str(COUNT)),
        )
    )  # fmt: skip
    if not (one and pair and number and numbers):
        return None
    opening, first, assign, tail = one
    twice = _around(probes.twice, VALUE)
    end = common_start(tail, twice[3]) if twice else tail
    end = end[: max(end.rfind(mark) for mark in ">)]}") + 1]
    plain = next((end[i:] for i in range(len(end)) if number[3].startswith(end[i:])), "")
    separator, plain_separator = (part[3].partition(OTHER)[0] for part in (pair, numbers))
    rest = probes.none[probes.none.rfind(NAME) + len(NAME) :] if NAME in probes.none else ""
    closing = next((end[i:] for i in range(len(end)) if end[i:] in rest), "")
    empty = rest[: rest.index(closing) + len(closing)] if closing else ""
    if not end or not separator:
        return None
    return ParameterText(
        opening.rpartition(NAME)[2].strip(),
        first,
        (assign, number[2]),
        (separator, plain_separator),
        (end, plain),
        empty,
    )


def _around(text: str, value: str) -> tuple[str, str, str, str] | None:
    """The texts before the name, between name and KEY, between KEY and value, and after the value."""
    key = text.find(KEY)
    name = text.rfind(NAME, 0, max(key, 0))
    at = text.find(value, key)
    if min(key, name, at) < 0:
        return None
    return text[:name], text[name + len(NAME) : key], text[key + len(KEY) : at], text[at + len(value) :]


def common_start(a: str, b: str) -> str:
    """The text that both begin with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(character for character, _ in same)


def _types(tools: Sequence[dict[str, Any]], name: str) -> dict[str, str]:
    """The declared type of each of the tool's parameters."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name and isinstance(function.get("parameters"), dict):
            properties = function["parameters"].get("properties")
            if isinstance(properties, dict):
                return {key: str(of.get("type")) for key, of in properties.items() if isinstance(of, dict)}
    return {}
