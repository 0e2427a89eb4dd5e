"""Chat template -> text, exactly as transformers renders it, within limits of time and size.

A chat template is a program that comes with a model. transformers runs it in a sandbox without access to Python's
internals, but with no limit of time or memory. Here each loop step and each new value draws on a budget first, in any
thread, and a call in C with too large a result is refused before it starts. A list that holds the same list twice,
nested sixty times, takes no memory and is exponentially long; so a new value is measured with all its contents, and no
later read, comparison, hash or output of it takes long.

A separate process with limits would take half the lines, but encoding would take one and a half times as long.
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

SECONDS = 10.0  # of one render; real templates take about 20 microseconds
CHARACTERS = 10_000_000  # in all values of one render, plus 100 for each character of the messages
TEMPLATE_CHARACTERS = 1_000_000  # the longest real templates have about 20,000
BITS = 10_000  # of a whole number

OVER_LIMITS = "chat template over its limits"  # a DataError's kind

# methods of str, bytes and int, and filters, whose result can be longer than their arguments together
GROWING = {
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "pprint", "replace", "rjust",
    "slice", "to_bytes", "tojson", "translate", "urlize", "wordwrap", "xmlattr", "zfill",
}  # fmt: skip
# "%*d" and "{:{}}" take a width from an argument; these patterns find it, by kind of format
FORMATS = {
    "%": re.compile(r"%[^%a-zA-Z]*\*"),
    "format": re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{"),
    "format_map": re.compile(r"\{[^{}]*:[^{}]*\{"),
}

# raised by the operators, filters and raise_exception of a template, which is foreign code; deep recursion is a
# RuntimeError
FAILURES = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)


class _OverLimit(Exception):
    """The render would exceed its budget; the text names the limit."""


class _Budget:
    """The time and characters that one render may still use."""

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
        """Approximate number of characters of a value's text; its contents draw on the budget."""
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list | tuple | dict | MappingView):
            return 1
        self.spend(len(value))
        items: Any = [*value, *value.values()] if isinstance(value, dict) else value
        return 1 + sum(len(item) if isinstance(item, str) else self.size(item) for item in items)

    def measured(self, value: Any) -> Any:
        """The new value, after it has drawn on the budget: the length of a text, else the number of values in it."""
        size = self.size(value)
        self.spend(size if isinstance(value, str | bytes) else 0)
        return value

    def allow(self, name: str, subject: Any, others: Sequence[Any]) -> None:
        """Refuse a call if subject x largest argument, the longest possible result, exceeds the rest of the budget."""
        if name in FORMATS and isinstance(subject, str):
            if FORMATS[name].search(subject.replace("{{", "")):
                raise _OverLimit("formats with a width that is an argument of any size,")
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
    """Text of the messages; `generation` appends the beginning of the assistant's turn.

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
            f"model.chat_template {error} in one render; set model.chat_template to a smaller one",
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
    """The literal texts of a template, including those in its conditions."""
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
    # names with a space, which no template can use
    environment.filters |= {"counted items": _counted, "joined text": _joined, "measured value": _measured}
    return environment


class _Namespace(Namespace):
    """A namespace whose text does not show its attributes: they change, so their size is unknown when it is created."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment with a budget. It uses Jinja's hooks: the sandbox's calls and operators, `concat` for
    blocks and macros, `finalize` for output. Loops, `~` and literals get a filter."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget, owner = _budget.get(), _owner(__obj)
        if not isinstance(owner, str | bytes | int):
            budget.size((*args, *kwargs.values()))  # a macro gets them as a tuple and a dict
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
    """Makes loops draw on the budget at each step, `~` before it joins, literals and slices when they are created."""

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
    """The filter, drawing on the budget; functools.wraps keeps the mark that makes Jinja pass the context first."""
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
    """The object that a method is bound to; the sandbox wraps str.format in a function with __wrapped__."""
    if hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__self__ if hasattr(function, "__self__") else None
