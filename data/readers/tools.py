"""Tools and their calls in rows of OpenAI's, ShareGPT's and Hermes' layouts -> turns in OpenAI's layout.

OpenAI's:    {"messages": [..., {"role": "assistant", "tool_calls": [{"id", "function": {"name", "arguments"}}]},
             {"role": "tool", "tool_call_id", "content"}], "tools": [...]}; also `function_call` and `functions`
ShareGPT's:  {"from": "function_call", "value": "{\\"name\\", \\"arguments\\"}"}, {"from": "observation", "value"}
Hermes':     <tool_call>{"name", "arguments"}</tool_call> in the assistant's text, <tool_response> in the tool's, and
             the tools in the row or as <tools> in the system turn; with these the text stays as it is
Schemas stay as the file has them: their keys in its order, nothing added.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from data.conversation import CALLS, TOOLS, DataError, Message
from data.readers.fields import shown, shown_names, type_name
from data.readers.strict_json import decode
from data.tool_calls import CLOSE, OPEN, Call, is_call, json_value

CALL_KEYS = (CALLS, "function_call")  # of an assistant's turn
ROW_KEYS = (TOOLS, "functions")
CALL_ROLES = ("function_call", "tool_call")  # of ShareGPT, whose value is the call
RESULTS = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
IN_TEXT = re.compile(r"<tools>.*</tools>", re.DOTALL)  # in a system turn


def tools_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The row's tools, none if it has none. Raises DataError."""
    if row.get(TOOLS) and row.get("functions"):
        raise DataError(where, "tools and functions are two lists of tools; keep one", "two lists of tools")
    key = TOOLS if row.get(TOOLS) else "functions"
    tools = _decoded(row.get(key) or [], key, where)
    if not isinstance(tools, list):
        problem = f"{key}: {type_name(tools)} {shown(tools)} where a list of tools is expected"
        raise DataError(where, f'{problem}: [{{"type": "function", "function": {{...}}}}]', f"{key}: not a list")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            problem = f"{key}[{i}]: {shown(tool)} is no tool"
            raise DataError(where, f"{problem}; a tool is an object with a name and parameters", f"{key}[]: no name")
    if key == "functions":
        return [{"type": "function", "function": function} for function in tools]
    return tools


def turn_calls(turn: Mapping[str, Any], place: str, where: str) -> Message:
    """{CALLS: ...} of an assistant's turn; nothing if it calls no tool."""
    keys = [key for key in CALL_KEYS if turn.get(key)]
    if len(keys) > 1:
        raise DataError(where, f"{place}: {' and '.join(keys)} say the same; keep one", "two lists of calls")
    if not keys:
        return {}
    place, value = f"{place}.{keys[0]}", turn[keys[0]]
    return made_calls(value if isinstance(value, list) else [value], place, where)


def made_calls(calls: list[Any], place: str, where: str) -> Message:
    return {CALLS: [_call(call, f"{place}[{i}]", where) for i, call in enumerate(calls)]}


def value_calls(value: Any, place: str, where: str) -> Message:
    """The calls of a ShareGPT turn, whose value is one call or a list of them."""
    calls = _decoded(value, place, where)
    return made_calls(calls if isinstance(calls, list) else [calls], place, where)


def call_name(turn: Mapping[str, Any]) -> Message:
    """What names the call that a tool's turn answers."""
    return {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}


def structured(messages: list[Message], tools: list[dict[str, Any]], where: str) -> list[Message]:
    """The turns, Hermes' calls in a text as CALLS if the row has tools, and each result without its tags and with the
    name of its call. Raises DataError for a text that is no call."""
    if in_text(messages):
        return messages
    result: list[Message] = []
    waiting: list[dict[str, Any]] = []  # calls without a result so far
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant":
            if tools and OPEN in content and CALLS not in message:
                message = {**message, **_from_text(content, f"turn {i + 1}", where)}
            waiting = list(message.get(CALLS, ()))
        elif message["role"] == "tool" and (parts := RESULTS.findall(content)) and not RESULTS.sub("", content).strip():
            result += [_result({**message, "content": part}, waiting, i, where) for part in parts]
            continue
        elif message["role"] == "tool":
            message = _result(message, waiting, i, where)
        result.append(message)
    return result


def in_text(messages: list[Message]) -> bool:
    """Whether the system turn holds the tools."""
    return any(m["role"] == "system" and IN_TEXT.search(m["content"]) for m in messages)


def _result(message: Message, waiting: list[dict[str, Any]], i: int, where: str) -> Message:
    """The tool's turn with the name of the call that it answers, if it has neither name nor id."""
    id, ids = message.get("tool_call_id"), [call.get("id") for call in waiting]
    if id and any(ids) and id not in ids:
        problem = f"turn {i + 1}: tool_call_id {shown(id)} is of no call of the turn before; correct it"
        raise DataError(where, problem, "tool_call_id of no call")
    if waiting:
        call = waiting.pop(ids.index(id) if id in ids else 0)
        if not id and "name" not in message:
            message = {**message, "name": call["function"]["name"]}
    return message


def _from_text(content: str, place: str, where: str) -> Message:
    """The text before the first <tool_call>, and the calls."""
    at = content.index(OPEN)
    before, calls = content[:at].strip(), list[Any]()
    while content.startswith(OPEN, at):
        call, end = json_value(content, at + len(OPEN))
        rest = content[end:].lstrip()
        if call is None or not rest.startswith(CLOSE):
            problem = f"{place}: {shown(content[at:])} is no JSON between {OPEN} and {CLOSE}; correct it"
            raise DataError(where, problem, "call is not JSON")
        calls.append(_decoded(content[at + len(OPEN) : end], place, where))  # refuses what json_value lets pass
        at = len(content) - len(rest) + len(CLOSE)
        at += len(content[at:]) - len(content[at:].lstrip())
    if content[at:].strip():
        problem = f"{place}: {shown(content[at:])} after the call; write text before the calls, or in a turn of its own"
        raise DataError(where, problem, "text after a call")
    return {"content": before, **made_calls(calls, place, where)}


def _call(call: Any, place: str, where: str) -> dict[str, Any]:
    own: dict[str, Any] = call if isinstance(call, dict) else {}
    function: dict[str, Any] = own["function"] if isinstance(own.get("function"), dict) else own
    arguments = function.get("arguments", function.get("parameters"))
    arguments = _decoded(arguments, f"{place}.arguments", where) if arguments not in (None, "") else {}
    named: Call = {"name": function.get("name"), "arguments": arguments}
    if not is_call(named):
        problem = f"{place}: {shown(call)} is no call; write its name, and its arguments as an object"
        raise DataError(where, problem + (f" (keys: {shown_names(function)})" if function else ""), "no call")
    return {**({"id": own["id"]} if isinstance(own.get("id"), str) else {}), "type": "function", "function": named}


def _decoded(value: Any, place: str, where: str) -> Any:
    """The value of a text of JSON, as many files have tools and arguments; another value as it is."""
    if not isinstance(value, str):
        return value
    kind = f"{re.sub(r'[0-9]+', '', place)}: not JSON"
    text = value.strip(" \t\r\n")
    try:
        decoded, end, flaw = decode(text, 0, where)
    except json.JSONDecodeError as error:
        problem = f"{place}: {shown(value)} is no JSON: {error.msg}; write it with json.dumps"
        raise DataError(where, problem, kind) from error
    if flaw:
        raise DataError(where, f"{place}: {flaw.problem}", flaw.kind)
    if rest := text[end:]:
        problem = f"{place}: {shown(rest)} after the value; write it with json.dumps"
        raise DataError(where, problem, kind)
    return decoded
