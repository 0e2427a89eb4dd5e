"""What a chat template writes around an answer, found by rendering: no loss falls on it, and no score counts it.

Templates of thinking models write an empty thought before an answer that has none (Qwen3's <think></think>), or name
its channel (gpt-oss' <|channel|>final<|message|>).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from data.conversation import THOUGHT, TOOLS, DataError, Message
from data.encode.template import Render, Result, arguments_of, render_all

QUESTION, ANSWER, IDEA = "Where does the ferry go?", "To the island.", "The map shows an island."
FIELDS = (THOUGHT, "thinking")  # names of a thought in templates
SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch for thoughts


@dataclass(frozen=True)
class Frame:
    """opening: between the generation prompt and an answer without a thought, "" if it is only white space, which is a
    part of the answer's first token; None if the prompt is no prefix then.
    before, closing: before a thought, and between it and the answer; closing is empty if none is rendered.
    thoughts: whether the template takes them as a field of the turn, as tags in its content, or not at all.
    system: whether it renders a system turn; None if that is not known."""

    opening: str | None = ""
    before: str | None = ""
    closing: str = ""
    thoughts: Literal["field", "tags", ""] = ""
    system: bool | None = True

    def answer_start(self, text: str) -> int | None:
        """Where the answer begins in what a model wrote; None if it ended within its thought."""
        closing, opening, before = (part.strip() for part in (self.closing, self.opening or "", self.before or ""))
        if closing and (at := text.rfind(closing)) >= 0:
            return at + len(closing)
        leading = len(text) - len(text.lstrip())
        if opening and text.startswith(opening, leading):
            return leading + len(opening)
        # the prompt opens the thought, or the model did
        unfinished = closing and (self.before == "" or (before and text.startswith(before, leading)))
        return None if unfinished else 0


SERVED = Frame("<think>\n\n</think>", None, "</think>", "tags", None)  # of a server whose template is not known


def frame_of(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> Frame:
    """The frame of the tokenizer's template with the arguments (None: the tokenizer's own)."""
    own = arguments_of(tokenizer) or {} if arguments is None else arguments
    own = {key: value for key, value in own.items() if key != TOOLS}
    return _frame(tokenizer, str(tokenizer.get_chat_template()), json.dumps(own, sort_keys=True))


def quiet_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Template arguments by which the prompt already holds what the template writes before an answer without a thought;
    none if the template has no such switch, or needs none."""
    tried: list[dict[str, Any]] = [{}, *({switch: False} for switch in SWITCHES)]
    return next((own for own in tried if frame_of(tokenizer, own).opening == ""), {})


def thinking_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Template arguments by which a thought follows the prompt; none if the template needs none or renders none."""
    tried: list[dict[str, Any]] = [{}, *({switch: True} for switch in SWITCHES)]
    frames = ((own, frame_of(tokenizer, own)) for own in tried)
    return next((own for own, frame in frames if frame.thoughts and frame.before is not None), {})


def with_thought(message: Message, frame: Frame) -> Message:
    """The turn with its thought where the template looks for it."""
    thought = message.get(THOUGHT)
    if not thought:
        return message
    if frame.thoughts == "field":
        return {**message, **dict.fromkeys(FIELDS, thought)}
    rest = {key: value for key, value in message.items() if key != THOUGHT}
    return {**rest, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages, the text of the system turn before that of the first user."""
    system, *turns = messages
    if system["role"] != "system" or not turns:
        return list(messages)
    return [{**turns[0], "content": f"{system['content']}\n\n{turns[0]['content']}"}, *turns[1:]]


def without_markers(frame: Frame, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame as it is in a server's text, which holds no special tokens."""

    def plain(part: str | None) -> str | None:
        for token in tokenizer.all_special_tokens if part else ():
            part = str(part).replace(token, "")
        return part

    return replace(frame, opening=plain(frame.opening), before=plain(frame.before), closing=plain(frame.closing) or "")


def spoken(text: str, frame: Frame) -> str:
    """The answer in what a model wrote, without its thought."""
    start = frame.answer_start(text)
    return "" if start is None else text[start:].strip()


def spoken_tokens(
    tokens: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    decoded: Callable[[Sequence[int], PreTrainedTokenizerBase], str] | None = None,
) -> str:
    """The same for ids, whose control tokens count for the frame. decoded: the text of an answer's ids, by default
    without any control token."""
    start = frame.answer_start(str(tokenizer.decode(list(tokens), skip_special_tokens=False)))
    if start is None:
        return ""
    first = 0
    while start and first < len(tokens) and len(str(tokenizer.decode(list(tokens[:first])))) < start:
        first += 1
    rest = list(tokens[first:])
    return (decoded(rest, tokenizer) if decoded else str(tokenizer.decode(rest, skip_special_tokens=True))).strip()


@lru_cache(maxsize=16)
def _frame(tokenizer: PreTrainedTokenizerBase, template: str, arguments: str) -> Frame:
    question, own = {"role": "user", "content": QUESTION}, json.loads(arguments)
    answers: tuple[Message, ...] = (
        {"content": ANSWER},
        {"content": ANSWER, **dict.fromkeys(FIELDS, IDEA)},
        {"content": f"<think>\n{IDEA}\n</think>\n\n{ANSWER}"},
    )
    renders = [Render([question], [(1, True)], arguments=own)]
    renders += [Render([question, {"role": "assistant", **a}], [(2, False)], arguments=own) for a in answers]
    renders += [Render([{"role": "system", "content": IDEA}, question], [(2, True)], arguments=own)]
    results: list[Result] = []
    render_all(renders, tokenizer, results.append)
    # a template may refuse such turns; a row's own are refused with their place
    texts = ["" if isinstance(r, DataError) else r[0] for r in (*results, *[[""]] * len(renders))]
    prompt, plain, field, tags, instructed = texts[: len(renders)]
    system = IDEA in instructed and QUESTION in instructed

    def after_prompt(text: str, part: str) -> str | None:
        return text[len(prompt) : text.index(part)] if text.startswith(prompt) and part in text else None

    if not prompt or not plain:
        return Frame(system=system or not prompt)
    opening = after_prompt(plain, ANSWER)
    opening = "" if opening is not None and not opening.strip() else opening
    kinds: tuple[tuple[Literal["field", "tags"], str], ...] = (("field", field), ("tags", tags))
    for kind, text in kinds:
        if IDEA in text and ANSWER in text and (kind == "field" or "</think>" in template):
            closing = text[text.index(IDEA) + len(IDEA) : text.rindex(ANSWER)]
            return Frame(opening, after_prompt(text, IDEA), closing, kind, system)
    return Frame(opening, system=system)
