"""Chat template -> text, exactly as transformers renders it, within limits of time and size.

A chat template is a program that comes with a model. transformers keeps it from Python's internals (a sandbox), but
lets it run for ever or write until memory is gone. Here each loop step and each value that is made draws on a budget
first, in any thread, and a call in C that would make too much is refused before it starts. A list that holds a list
twice, sixty times over, takes no memory and is exponentially long; so values are measured with all that they hold when
they are made, and nothing that later reads, compares, hashes or writes one takes long.

Not a process with limits: it takes half the lines, but encoding would take one and a half times as long.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, MappingView, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers import PreTrainedTokenizerBase

# private, but pinned: filters, globals and extensions are taken from it, so that a render is a server's render
from transformers.utils.chat_template_utils import _compile_jinja_template

from data.conversation import DataError, Message

SECONDS = 10.0  # of one render; real templates take some 20 microseconds
CHARACTERS = 10_000_000  # made in all steps of one render, beside 100 for each character of the messages
TEMPLATE_CHARACTERS = 1_000_000  # the longest real ones have some 20,000
BITS = 10_000  # of a whole number

OVER_LIMITS = "chat template over its limits"  # a DataError's kind

# what can make a text longer than its arguments together: methods of str, bytes and int, and filters
GROWING = {
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "pprint", "replace", "rjust",
    "slice", "to_bytes", "tojson", "translate", "urlize", "wordwrap", "xmlattr", "zfill",
}  # fmt: skip
# "%*d" and "{:{}}" take a width from an argument; for each way to format, what finds that
FORMATS = {
    "%": re.compile(r"%[^%a-zA-Z]*\*"),
    "format": re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{"),
    "format_map": re.compile(r"\{[^{}]*:[^{}]*\{"),
}


# a template is foreign code: this is what its operators, filters and raise_exception raise; deep recursion is a
# RuntimeError
FAILURES = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)


class _OverLimit(Exception):
    """The render would exceed its budget; the text names the limit."""


class _Budget:
    """What one render may still use."""

    def __init__(self, seconds: float, characters: int) -> None:
        self.seconds, self.characters = seconds, characters
        self.left, self.deadline = characters, time.monotonic() + seconds

    def spend(self, characters: int = 0) -> None:
        self.left -= characters + 1
        if self.left < 0:
            raise _OverLimit(f"makes more than {self.characters:,} characters")
        if time.monotonic() > self.deadline:
            raise _OverLimit(f"takes more than {self.seconds:g} s")

    def size(self, value: Any) -> int:
        """Characters of a value's text, nearly; what it holds is counted on the budget."""
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list | tuple | dict | MappingView):
            return 1
        self.spend(len(value))
        items: Any = [*value, *value.values()] if isinstance(value, dict) else value
        return 1 + sum(len(item) if isinstance(item, str) else self.size(item) for item in items)

    def measured(self, value: Any) -> Any:
        """A new value, drawn on the budget: a text by its length, anything else by the number of values in it."""
        size = self.size(value)
        self.spend(size if isinstance(value, str | bytes) else 0)
        return value

    def allow(self, name: str, subject: Any, others: Sequence[Any]) -> None:
        """Refuse a call whose result may exceed what is left: no result is longer than subject x largest argument."""
        if name in FORMATS and isinstance(subject, str):
            if FORMATS[name].search(subject.replace("{{", "")):
                raise _OverLimit("formats with a width that is an argument, of any size,")
            factors = [int(digits) for digits in re.findall(r"\d+", subject)] + [self.size(value) for value in others]
        else:
            factors = [abs(value) if isinstance(value, int) else self.size(value) for value in others]
        if self.size(subject) * max(factors, default=1) > self.left:
            raise _OverLimit(f"asks `{name}` for more than {self.characters:,} characters")


_budget: ContextVar[_Budget] = ContextVar("budget of the render")


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    generation: bool,
    where: str = "",
    seconds: float = SECONDS,
    characters: int = CHARACTERS,
) -> str:
    """Text of the messages; `generation` adds what starts the assistant's answer.

    Raises DataError, naming model.chat_template, if the template refuses the messages, fails or exceeds a limit.
    """
    text = str(tokenizer.get_chat_template())
    budget = _Budget(seconds, characters + 100 * sum(len(m["content"]) for m in messages))
    token = _budget.set(budget)
    pieces = []
    try:
        variables = {**tokenizer.special_tokens_map, "messages": messages, "tools": None, "documents": None}
        for piece in _compile(text).generate(**variables, add_generation_prompt=generation):
            budget.spend(len(piece))
            pieces.append(piece)
    except _OverLimit as error:
        raise DataError(
            where,
            f"model.chat_template {error} in one render; set model.chat_template to one that does less",
            OVER_LIMITS,
        ) from error
    except FAILURES as error:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(
            where,
            f"the chat template refuses the turns {roles}: {error or type(error).__name__}; "
            "change the turns or set model.chat_template",
            "chat template refuses the turns",
        ) from error
    finally:
        _budget.reset(token)
    return "".join(pieces)


@lru_cache(maxsize=16)
def literals(template: str) -> tuple[str, ...]:
    """The texts that are written in a template, those of its conditions too."""
    tree = _environment().parse(template)
    data = [str(node.data) for node in tree.find_all(nodes.TemplateData)]
    return (*data, *(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)))


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    if len(template) > TEMPLATE_CHARACTERS:
        raise _OverLimit(f"has {len(template):,} characters, the limit is {TEMPLATE_CHARACTERS:,}; it can't be used")
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> "_Environment":
    reference = _compile_jinja_template("").environment
    environment = _Environment(
        trim_blocks=reference.trim_blocks,
        lstrip_blocks=reference.lstrip_blocks,
        extensions=[type(extension) for extension in reference.extensions.values()],
        finalize=_finalize,
    )
    environment.globals.update(reference.globals)
    del environment.globals["lipsum"]  # random text of any length
    environment.globals["namespace"] = _Namespace
    environment.filters = {name: _bounded(name, function) for name, function in reference.filters.items()}
    # names with a space: no template can use them
    environment.filters |= {"counted items": _counted, "joined text": _joined, "measured value": _measured}
    return environment


class _Namespace(Namespace):
    """Its attributes change, so that their size is not known when it is made; so its text doesn't show them."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, with a budget. Its hooks are Jinja's own: calls and operators of a sandbox, `concat`
    for what blocks and macros collect, `finalize` for what is written; loops, `~` and literals get a filter."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget, owner = _budget.get(), _owner(__obj)
        if not isinstance(owner, str | bytes | int):
            budget.size((*args, *kwargs.values()))  # a macro sees them as a tuple and a dict
        elif __obj.__name__ in GROWING:
            args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
            budget.allow(__obj.__name__, owner, [*args, *kwargs.values()])
        return budget.measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise _OverLimit(f"computes a number of more than {BITS:,} bits")
        elif operator == "*":
            budget.allow("*", *((right, [left]) if isinstance(left, int) else (left, [right])))
        elif operator == "%":
            budget.allow("%", left, [right])
        return budget.measured(super().call_binop(context, operator, left, right))

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        texts = list(pieces)
        _budget.get().spend(sum(map(len, texts)))
        return "".join(texts)


class _Counting(NodeTransformer):
    """Loops draw on the budget at each step, `~` before it joins, literals and slices once they are made."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _filtered("counted items", node.iter)
        if isinstance(node, nodes.Concat):
            return _filtered("joined text", nodes.List(node.nodes, lineno=node.lineno))
        is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        is_value = isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        return _filtered("measured value", node) if is_slice or is_value else node


def _filtered(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _measured(value: Any) -> Any:
    return _budget.get().measured(value)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _budget.get().spend()
        yield item


def _joined(parts: list[Any]) -> str:
    budget = _budget.get()
    budget.spend(budget.size(parts))
    return "".join(map(str, parts))


def _finalize(value: Any) -> Any:
    if not isinstance(value, str):
        budget = _budget.get()
        budget.spend(budget.size(value))
    return value


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, drawing on the budget; wraps keeps the mark by which Jinja passes the context first."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        args = tuple(list(a) if name in GROWING and isinstance(a, Iterator) else a for a in args)
        size = budget.size(args[first])  # any filter may turn a nested list into text
        if size > budget.left:
            raise _OverLimit(f"asks `{name}` for more than {budget.characters:,} characters")
        if name in GROWING:
            budget.allow(name, args[first], [*args[first + 1 :], *kwargs.values()])
        return budget.measured(function(*args, **kwargs))

    return bounded


def _owner(function: Any) -> Any:
    """What a method is bound to; the sandbox wraps str.format in a function that names its original."""
    if hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__self__ if hasattr(function, "__self__") else None
