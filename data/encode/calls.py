"""What a chat template makes of tools and calls, found by rendering: what it leaves out is refused, and calls that a
model writes are read in its form."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from data.conversation import CALLS, THOUGHT, TOOLS, DataError, Message
from data.encode.call_text import COUNT, KEY, NAME, OTHER, VALUE, CallText, Probes, common_start, learn_call_text
from data.encode.frame import frame_of
from data.encode.template import Render, Result, arguments_of, render_all
from data.tool_calls import answer_text

QUESTION, TEXT, RESULT = "Where does the ferry go?", "I look it up.", "to the island"
SECOND = "Nether"
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Find a ferry.",
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": "A town."}, "days": {"type": "integer"}},
        },
    },
}
CALL_TURN: Message = {
    "role": "assistant",
    "content": "",
    CALLS: [{"id": "call00001", "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}],
}
ID = "call00001"  # nine letters and digits, as Mistral's templates want them


@dataclass(frozen=True)
class ToolUse:
    """Which of tools, several calls of a turn, text beside calls and results of tools a template renders.

    calls: how it takes the arguments of a call, as an object or as JSON text; "" if it leaves calls out. wraps: it puts
    a result between <tool_response> tags. form: of the calls that a model writes; None if it is not known."""

    tools: bool = False
    calls: Literal["object", "text", ""] = ""
    several: bool = False
    beside: bool = False
    results: bool = False
    wraps: bool = False
    form: CallText | None = None


def tool_use_of(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> ToolUse:
    """The tool use of the tokenizer's template with the arguments (None: the tokenizer's own)."""
    own = arguments_of(tokenizer) or {} if arguments is None else arguments
    own = {key: value for key, value in own.items() if key != TOOLS}
    return _tool_use(tokenizer, str(tokenizer.get_chat_template()), json.dumps(own, sort_keys=True))


def uses_tools(messages: Sequence[Message], arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get(TOOLS)) or any(CALLS in m or m["role"] == "tool" for m in messages)


def with_tools(
    messages: Sequence[Message], arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> Sequence[Message]:
    """The messages as the template takes them. Raises DataError for what it would leave out."""
    if not uses_tools(messages, arguments):
        return messages
    use = tool_use_of(tokenizer, arguments)
    called = [m for m in messages if CALLS in m]
    left_out = {
        "tools": bool(arguments.get(TOOLS)) and not use.tools,
        "calls": bool(called) and not use.calls,
        "more than one call of a turn": any(len(m[CALLS]) > 1 for m in called) and not use.several,
        "the text beside a call": any(m["content"].strip() for m in called) and not use.beside,
        "results of tools": any(m["role"] == "tool" for m in messages) and not use.results,
    }
    if what := next((what for what, left in left_out.items() if left), ""):
        problem = f"the chat template leaves out {what}; leave the row out, or set model.chat_template to one that"
        raise DataError(where, f"{problem} renders it", f"{what}: left out by the chat template")
    return [_as_taken(message, use) for message in messages]


def _as_taken(message: Message, use: ToolUse) -> Message:
    if message["role"] == "tool" and use.wraps:
        text = message["content"].strip()
        if text.startswith("<tool_response>") and text.endswith("</tool_response>"):
            return {**message, "content": text[len("<tool_response>") : -len("</tool_response>")].strip("\n")}
    if CALLS in message and use.calls == "text":
        return {**message, CALLS: [_with_text(call) for call in message[CALLS]]}
    return message


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def check_thought(message: Message, answer: str, where: str) -> None:
    """Raise DataError if the template leaves out the thought of a turn that calls a tool."""
    thought = message.get(THOUGHT, "").strip()
    if CALLS in message and thought and thought not in answer:
        problem = "the chat template leaves out the thought before a call; remove it, or set model.chat_template"
        raise DataError(where, problem, "thought before a call")


def spoken_calls(
    written: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
) -> str | None:
    """The answer with its calls in the form of `answer_text`; None if the row has tools in its text only or none, or if
    the answer calls none.

    written: what the model wrote, control tokens included. messages, arguments: of the row."""
    if not (arguments.get(TOOLS) or any(CALLS in m for m in messages)):
        return None
    use, frame = tool_use_of(tokenizer, arguments), frame_of(tokenizer, arguments)
    start = frame.answer_start(written)
    read = use.form.read(written[start:], arguments.get(TOOLS) or []) if use.form and start is not None else None
    if not read:
        return None
    before = (frame.before or "").strip()  # gpt-oss calls tools without an end of its thought
    said = "" if not use.beside or (before and read[0].startswith(before)) else read[0]
    return answer_text(said, read[1])


@lru_cache(maxsize=16)
def _tool_use(tokenizer: PreTrainedTokenizerBase, template: str, arguments: str) -> ToolUse:
    own = json.loads(arguments)
    question: Message = {"role": "user", "content": QUESTION}

    def turn(*calls: Any, content: str = "") -> Message:
        named = [
            {"id": f"{ID[:-1]}{i + 1}", "type": "function", "function": {"name": NAME, "arguments": call}}
            for i, call in enumerate(calls)
        ]
        return {"role": "assistant", "content": content, CALLS: named}

    def texts(*rows: list[Message], generation: bool = False) -> list[str]:
        renders = [Render(row, [(len(row), generation)], arguments={**own, TOOLS: [TOOL]}) for row in rows]
        results: list[Result] = []
        render_all(renders, tokenizer, results.append)
        return ["" if isinstance(r, DataError) else r[0] for r in (*results, *[[""]] * len(rows))][: len(rows)]

    (prompt,) = texts([question], generation=True)
    frame, one = frame_of(tokenizer, own), {KEY: VALUE}

    def answer(text: str) -> str:
        """The text after the prompt and what the template writes before an answer."""
        rest = text[len(common_start(prompt, text)) :]
        return rest[frame.answer_start(rest) or 0 :]

    use = ToolUse(tools=NAME in prompt and KEY in prompt)
    forms: tuple[Literal["object", "text"], ...] = ("object", "text")
    for form in forms:

        def given(call: dict[str, Any], form: str = form) -> Any:
            return json.dumps(call) if form == "text" else call

        (called,) = map(answer, texts([question, turn(given(one))]))
        if NAME in called and VALUE in called and '\\"' not in called:
            break
    else:
        return use
    calls: tuple[dict[str, Any], ...] = (
        {KEY: VALUE, OTHER: SECOND},
        {KEY: COUNT},
        {KEY: COUNT, OTHER: COUNT},
        {},
    )
    rows = [[question, turn(given(call))] for call in calls]
    two = [question, turn(given(one), given({KEY: SECOND}))]
    beside = [question, turn(given(one), content=TEXT)]
    result: Message = {"role": "tool", "tool_call_id": f"{ID[:-1]}1", "name": NAME, "content": RESULT}
    *probes, said, answered = texts(*rows, two, beside, [question, turn(given(one)), result])
    return replace(
        use,
        calls=form,
        several=SECOND in probes[-1],
        beside=TEXT in said,
        results=RESULT in answered,
        wraps=bool(re.search(rf"<tool_response>\s*{RESULT}\s*</tool_response>", answered)),
        form=learn_call_text(Probes(called, *map(answer, probes))),
    )
