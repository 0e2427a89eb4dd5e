"""Prompts from columns: `system`, `prompt` and `completion` of a source, in which {name} is a column of the row."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Protocol

from data.conversation import Conversation, DataError
from data.readers.fields import shown, shown_names, text, type_name
from data.readers.files import Row

FORMAT = "prompt_completion"  # of rows whose prompt or completion is written from columns
BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class PromptLike(Protocol):
    @property
    def system(self) -> str | None: ...
    @property
    def prompt(self) -> str | None: ...
    @property
    def completion(self) -> str | None: ...


def check_prompt(template: str) -> str:
    """The template. Raises ValueError if it is blank or if a brace in it names no column and is not doubled."""
    if not template.strip():
        raise ValueError("it is blank; write the text, or leave the key out")
    for match in BRACES.finditer(template):
        if match[0] in "{}":
            around = template[max(0, match.start() - 10) : match.end() + 10]
            raise ValueError(
                f"{around!r}: a brace alone; name a column {{name}}, or write {{{{ and }}}} for the braces"
            )
    return template


def templates_of(source: PromptLike) -> dict[str, str]:
    """The source's keys that write a text from columns."""
    keys = {"system": source.system, "prompt": source.prompt, "completion": source.completion}
    return {key: template for key, template in keys.items() if template is not None}


def columns_in(template: str) -> list[str]:
    return [match[1] for match in BRACES.finditer(template) if match[1]]


def written_row(row: Row, source: PromptLike, where: str) -> Row:
    """The row with its prompt and completion as the source writes them, instead of the columns in them. Raises
    DataError."""
    templates = {key: t for key, t in templates_of(source).items() if key != "system"}
    if not templates:
        return row
    used = {column for template in templates.values() for column in columns_in(template)}
    written = {key: "".join(_pieces(key, template, row, where)) for key, template in templates.items()}
    return {key: value for key, value in row.items() if key not in used} | written


def with_prompt(conversation: Conversation, row: Row, source: PromptLike, where: str) -> Conversation:
    """The conversation with the source's system turn, unless the row has one; and as its context what several rows of
    a prompt may share: the text before the last column. Raises DataError if the task has a system turn of its own."""
    if source.prompt is not None and len(columns_in(source.prompt)) > 1:
        before = "".join([*_pieces("prompt", source.prompt, row, where, before_last=True)])
        conversation = replace(conversation, context=before.strip() or conversation.context)
    if source.system is None:
        return conversation
    if conversation.question or conversation.label:
        problem = "system: rows of this format have an instruction of their own as system turn; leave system out"
        raise DataError(where, problem, "system: two instructions")
    if conversation.messages[0]["role"] == "system":
        return conversation
    system = {"role": "system", "content": text("".join(_pieces("system", source.system, row, where)), "system", where)}
    not_learnt = tuple(i + 1 for i in conversation.not_learnt)
    return replace(conversation, messages=(system, *conversation.messages), not_learnt=not_learnt)


def _pieces(key: str, template: str, row: Mapping[str, object], where: str, before_last: bool = False) -> Iterator[str]:
    """The template's literal texts and the row's values, in order. before_last: up to the last value."""
    matches = list(BRACES.finditer(template))
    last = max((i for i, match in enumerate(matches) if match[1]), default=-1)
    start = 0
    for i, match in enumerate(matches):
        yield template[start : match.start()]
        start = match.end()
        if before_last and i == last:
            return
        yield _value(key, match[1], row, where) if match[1] else match[0][0]
    yield template[start:]


def _value(key: str, column: str, row: Mapping[str, object], where: str) -> str:
    if column not in row:
        near = get_close_matches(column, row, n=1)
        remedy = f"did you mean {shown_names(near)}?" if near else f"its columns are {shown_names(row)}"
        raise DataError(where, f"{key}: the row has no column {column!r}; {remedy}", f"{key}: no column")
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    problem = f"{key}: column {column}: {type_name(value)} {shown(value)} where text or a number is expected"
    raise DataError(where, f"{problem}; fill it in or leave the row out", f"{key}: {type_name(value)}")
