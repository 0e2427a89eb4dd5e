"""Control markers in the data, split so that no text of a row becomes a control token.

Control tokens come from the template only. A control marker in the data ("<|im_end|>" in a passage) is split after its
first character: the template renders it with a noncharacter in between, and the halves are tokenized separately, so
neither holds a marker. Two kinds of marker can't be split. Text that a template uses as a marker but that is no single
token ("[INST]" of Mistral v1, "### Response:") has the same ids in data and template: `markers_in` lists it. A control
token of one character has no halves: a row with one is a defect.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.conversation import CALLS, THOUGHT, TOOLS, Conversation, DataError, Message
from data.encode.frame import FIELDS
from data.encode.steps import Steps
from data.encode.template import Render, literals
from data.encode.tokens import Encoder, any_of, encoder_of
from data.tool_calls import CLOSE, OPEN

ANSWER_TOKENS = "answer_tokens"  # in a recipe's data and in a tokenizer's config
NESTED = (CALLS, "name", "tool_call_id")  # keys of a message whose values may hold texts

# Unicode's noncharacters, which never occur in text that is meant for exchange
NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)] + [
    chr(p << 16 | c) for p in range(17) for c in (0xFFFE, 0xFFFF)
]

# texts that templates use as markers, of one token or several: <start_of_turn>, <<SYS>>, [/INST], ### Response:
TEXT_MARKER = re.compile(r"<{1,2}[/|]?\w[\w ]*\|?>{1,2}|\[/?[A-Z][A-Z_]+\]|#{2,} ?[A-Z]\w*:")

TAGGED_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


def markers_in(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Control markers in the contents, one entry per occurrence: control tokens, and the template's text markers."""
    template = str(tokenizer.get_chat_template())
    pattern = _all_markers(encoder_of(tokenizer), template)
    if pattern is None:
        return []
    own = answer_tokens(tokenizer)
    spans = [(m, *span) for m in conversation.messages for span in _data_spans(m, template)]
    found = ((m, marker) for m, start, end in spans for marker in pattern.findall(m["content"], start, end))
    return [marker for m, marker in found if not (m["role"] == "assistant" and marker in own)]


def answer_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Control tokens that an assistant's turn may write in its text: those of data.answer_tokens, which are saved with
    the tokenizer; by default those around a call."""
    named = tokenizer.init_kwargs.get(ANSWER_TOKENS)
    if named is not None:
        return tuple(named)
    return tuple(text for text in (OPEN, CLOSE) if text in encoder_of(tokenizer).control)


def decoded_answer(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text without control tokens, except those that an answer may hold."""
    control = encoder_of(tokenizer).control
    kept = {control[text]: text for text in answer_tokens(tokenizer) if text in control}
    runs = groupby(tokens, lambda token: kept.get(token, ""))
    return "".join(
        text * len(list(run)) if text else str(tokenizer.decode(list(run), skip_special_tokens=True))
        for text, run in runs
    )


def protect(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    generation: bool,
    arguments: dict[str, Any],
) -> Steps[tuple[Sequence[Message], dict[str, Any], str]]:
    """Messages and arguments with their control markers split by a separator, and the separator; "" without control
    tokens.

    A marker can also span the end of a content and the text after it. Contents are split at their ends too if the
    rendered text then holds fewer markers.
    """
    encoder, template = encoder_of(tokenizer), str(tokenizer.get_chat_template())
    text = "".join(m["content"] + m.get(THOUGHT, "") for m in messages)
    nested = [arguments[TOOLS]] if TOOLS in arguments else []
    nested += [m[CALLS] for m in messages if CALLS in m]
    if nested:
        text += json.dumps(nested, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"half a surrogate pair {text[error.start]!r} is not valid text; remove or repair it"
        raise DataError(where, problem, "half a surrogate pair") from error
    if encoder.markers is None:
        return messages, arguments, ""
    separator = next((c for c in NONCHARACTERS if c not in text and c not in template), "")
    if not separator:
        problem = "the row holds all 66 noncharacters of Unicode, so none is free to split control markers; remove one"
        raise DataError(where, problem, "all noncharacters")
    own = _without(encoder, answer_tokens(tokenizer))
    inside = [
        _split(m, template, encoder.markers, own if m["role"] == "assistant" else encoder.markers, separator, where)
        for m in messages
    ]
    if TOOLS in arguments:
        tools = _split_nested(arguments[TOOLS], encoder.markers, separator, where)
        arguments = {**arguments, TOOLS: tools}
    outside = [_split_ends(m, encoder, separator) for m in inside]
    if outside != inside:
        (plain,) = yield Render(inside, [(len(inside), generation)], where, arguments)
        (split,) = yield Render(outside, [(len(outside), generation)], where, arguments)
        if len(encoder.markers.findall(split)) < len(encoder.markers.findall(plain)):
            return outside, arguments, separator
    return inside, arguments, separator


def _split_text(text: str, markers: re.Pattern[str], separator: str, where: str) -> str:
    """The text with each of its markers split after the first character."""
    while match := markers.search(text):  # in a loop: the rest of a marker may hold a shorter one
        marker = match[0]
        if len(marker) == 1:
            problem = f"{marker!r} is a control token of one character and can't be split; remove it"
            raise DataError(where, problem, "control token of one character")
        text = text.replace(marker, marker[0] + separator + marker[1:])
    return text


def _split_nested(value: Any, markers: re.Pattern[str], separator: str, where: str) -> Any:
    """A JSON value, the texts and keys in it split."""
    if isinstance(value, str):
        return _split_text(value, markers, separator, where)
    if isinstance(value, list):
        return [_split_nested(each, markers, separator, where) for each in value]
    if isinstance(value, dict):
        return {
            _split_nested(key, markers, separator, where): _split_nested(each, markers, separator, where)
            for key, each in value.items()
        }
    return value


def _split(
    message: Message,
    template: str,
    markers: re.Pattern[str],
    spoken: re.Pattern[str] | None,
    separator: str,
    where: str,
) -> Message:
    """The message with each of its markers split; in its content those of `spoken`."""
    content = message["content"]
    if spoken and spoken.search(content):
        for start, end in reversed(_data_spans(message, template)):
            content = content[:start] + _split_text(content[start:end], spoken, separator, where) + content[end:]
    thoughts = {key: _split_text(message[key], markers, separator, where) for key in FIELDS if key in message}
    nested = {key: _split_nested(message[key], markers, separator, where) for key in NESTED if key in message}
    return {**message, "content": content, **thoughts, **nested}


def _split_ends(message: Message, encoder: Encoder, separator: str) -> Message:
    """The message with the beginning of a marker at its end, and the end of one at its start, split too."""
    content, control, longest = message["content"], encoder.control, encoder.longest_marker - 1
    left, right = len(content) - len(content.lstrip()), len(content.rstrip())

    def begins(part: str) -> bool:  # a whole marker is one that the turn may write
        return any(m != part and m.startswith(part) for m in control)

    def ends(part: str) -> bool:
        return any(m != part and m.endswith(part) for m in control)

    cuts = {
        at + 1
        for at in range(max(0, right - longest), right)
        if content[at] in encoder.marker_starts and begins(content[at:right])
    } | {
        at
        for at in range(left, min(len(content), left + longest))
        if content[at] in encoder.marker_ends and ends(content[left : at + 1])
    }
    for at in sorted(cuts, reverse=True):
        content = content[:at] + separator + content[at:]
    return {**message, "content": content} if cuts else message


@lru_cache(maxsize=4)
def _without(encoder: Encoder, texts: tuple[str, ...]) -> re.Pattern[str] | None:
    return any_of(set(encoder.control) - set(texts)) if texts else encoder.markers


def _data_spans(message: Message, template: str) -> list[tuple[int, int]]:
    """The spans of a content that are data. If the template handles thoughts, <think> and </think> around a thought at
    the beginning of an answer are not data: the model must learn to write them."""
    content = message["content"]
    thought = TAGGED_THOUGHT.match(content) if message["role"] == "assistant" and "</think>" in template else None
    return [thought.span(1), (thought.end(), len(content))] if thought else [(0, len(content))]


@lru_cache(maxsize=4)
def _all_markers(encoder: Encoder, template: str) -> re.Pattern[str] | None:
    texts = {marker for text in literals(template) for marker in TEXT_MARKER.findall(text)}
    return any_of(texts | set(encoder.control))
