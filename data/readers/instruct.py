"""Instruction rows in four formats -> turns, and which of them are learnt.

messages:          {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}
sharegpt:          {"conversations": [{"from": "human" | "gpt", "value": ...}, ...], "system": ... (optional)}
alpaca:            {"instruction", "input" (optional), "output", "system" (optional), "history": [[user, assistant]]}
prompt_completion: {"prompt", "completion"}, both text or both lists of messages

A content is text, or a list of text parts, which are joined. An assistant's turn may have a thought (reasoning_content,
thinking or reasoning), and a key that says whether it is learnt (weight, train, training or loss: 0 or 1). Rows with
turns may call tools, see data/readers/tools.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from data.conversation import ARGUMENTS, THOUGHT, TOOLS, Conversation, DataError, Message
from data.readers.fields import shown, shown_names, text, type_name
from data.readers.files import Row
from data.readers.tools import CALL_KEYS, CALL_ROLES, call_name, in_text, structured, tools_of, turn_calls, value_calls
from data.tool_calls import spoken_text

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool", "ipython": "tool",
}  # fmt: skip
THOUGHTS = (THOUGHT, "thinking", "reasoning")
LEARNT = ("weight", "train", "training", "loss")
# of a row or a turn; a row that has them would be learnt as something else than it is
UNREADABLE = {
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text can be trained on"),
    **dict.fromkeys(
        ("tools", "functions", "tool_calls", "function_call"),
        "only rows of turns have tools, and only the assistant calls them",
    ),
    **dict.fromkeys(("weight", "weights", "loss_weight", "loss_scale"), "give the source a weight in data.train"),
    **dict.fromkeys(("chosen", "rejected"), "preferences are not supported"),
}
SHAREGPT_ROLES = ROLES | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool", "tool_response": "tool",
    **dict.fromkeys(CALL_ROLES, "assistant"),
}  # fmt: skip


def instruct_conversation(row: Row, format: str, where: str) -> Conversation:
    """The row as a conversation that ends with the assistant's answer. Raises DataError."""
    tools = tools_of(row, where) if format in TURN_LISTS else []
    messages = checked_order(structured(MESSAGES_OF[format](row, where), tools, where), where)
    not_learnt = tuple(i for i, message in enumerate(messages) if not message.pop(_LEARN, True))
    arguments = row.get(ARGUMENTS) or {}
    if not isinstance(arguments, dict):
        problem = f"{ARGUMENTS}: {type_name(arguments)} {shown(arguments)} where names and values are expected"
        raise DataError(where, f'{problem}: {{"enable_thinking": false}}', f"{ARGUMENTS}: not an object")
    if tools and not in_text(messages):
        arguments = {**arguments, TOOLS: tools}
    return Conversation(
        messages=tuple(messages),
        not_learnt=not_learnt,
        template_arguments=arguments,
        id=where,
        where=where,
        answers=(spoken_text(messages[-1]),),
        # without the system turn, which would make all rows that share it near duplicates
        context="\n".join(m["content"] for m in messages[:-1] if m["role"] != "system"),
    )


def checked_order(messages: list[Message], where: str) -> list[Message]:
    """The messages, if they are an optional system turn, then user and assistant alternating, assistant last. The
    results of tools, and an assistant's turn after them, may follow an assistant's turn."""
    roles = [m["role"] for m in messages]
    if "system" in roles[1:]:
        place = len(roles) - 1 - roles[::-1].index("system")
        if roles.count("system") > 1:
            problem, kind = f"turn {place + 1}: a second system turn; join them into one", "two system turns"
        else:
            problem, kind = f"turn {place + 1}: system; the system turn must be the first", "system turn not first"
        raise DataError(where, problem, kind)
    if roles[-1] != "assistant":
        problem = f"the last turn is {roles[-1]}'s; a row ends with the assistant's answer, add it or cut the turn"
        raise DataError(where, problem, "last turn not the assistant's")
    spoken = roles[1:] if roles[0] == "system" else roles
    pairs = zip(["", *spoken], spoken, strict=False)
    if any(before not in BEFORE[role] for before, role in pairs):
        problem = f"user and assistant must take turns, the user first; found {shown_names(spoken)}"
        raise DataError(where, problem, "order of turns")
    return messages


def _messages(row: Row, where: str) -> list[Message]:
    field = "conversations" if row.get("messages") is None and "conversations" in row else "messages"
    return _turns(row[field], field, where)


def _sharegpt(row: Row, where: str) -> list[Message]:
    turns = _turns(row["conversations"], "conversations", where, "from", "value", SHAREGPT_ROLES)
    return _system(row, where) + turns


def _alpaca(row: Row, where: str) -> list[Message]:
    prompt = text(row["instruction"], "instruction", where)
    if _has_value(row, "input"):
        prompt += "\n\n" + text(row["input"], "input", where)
    answer = text(row["output"], "output", where)
    return [*_system(row, where), *_history(row, where), _turn("user", prompt), _turn("assistant", answer)]


def _prompt_completion(row: Row, where: str) -> list[Message]:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _turns(row["prompt"], "prompt", where) + _turns(row["completion"], "completion", where)
    prompt, completion = text(row["prompt"], "prompt", where), text(row["completion"], "completion", where)
    return [_turn("user", prompt), _turn("assistant", completion)]


MESSAGES_OF = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
BEFORE = {"user": ("", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}  # role -> before it
_LEARN = "learn"  # in a message until the row is read: whether it is learnt
TURN_LISTS = {
    "messages": ("messages", "conversations"),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
}


def _turns(
    turns: Any, field: str, where: str, role: str = "role", content: str = "content", roles: Mapping[str, str] = ROLES
) -> list[Message]:
    if not isinstance(turns, list):
        problem = f"{field}: {type_name(turns)} {shown(turns)} where a list of turns is expected"
        raise DataError(where, f'{problem}: [{{"{role}": ..., "{content}": ...}}, ...]', f"{field}: not a list")
    if not turns:
        raise DataError(where, f"{field}: no turn; leave the row out", f"{field}: no turn")
    messages = []
    for i, turn in enumerate(turns):
        place = f"{field}[{i}]"
        if not isinstance(turn, dict):
            problem = f"{place}: {type_name(turn)} {shown(turn)} where a turn is expected"
            raise DataError(where, f'{problem}: {{"{role}": ..., "{content}": ...}}', f"{field}[]: not a turn")
        calls = turn_calls(turn, place, where)
        for key in (role, *(() if calls else (content,))):
            if key not in turn:
                raise DataError(where, f"{place}: no {key}, only {shown_names(turn)}", f"{field}[]: no {key}")
        speaker = turn[role]
        if not isinstance(speaker, str) or speaker not in roles:
            problem = f"{place}.{role}: {shown(speaker)}; must be one of {', '.join(roles)}"
            raise DataError(where, problem, "unknown role")
        assistant = roles[speaker] == "assistant"
        refuse_unreadable(turn, f"{place}.", where, (*LEARNT, *(CALL_KEYS if assistant else ())))
        if speaker in CALL_ROLES:
            message = {**_turn("assistant", ""), **value_calls(turn[content], f"{place}.{content}", where)}
        elif calls and not _has_value(turn, content):
            message = {**_turn("assistant", ""), **calls}
        elif roles[speaker] == "tool" and joined(turn[content]) == "":
            message = {**_turn("tool", ""), **call_name(turn)}  # a tool may return nothing
        else:
            message = {**_turn(roles[speaker], text(joined(turn[content]), f"{place}.{content}", where)), **calls}
        if assistant:
            message |= _thought(turn, place, where) | _learn(turn, place, where)
        elif message["role"] == "tool":
            message |= call_name(turn)
        messages.append(message)
    return messages


def joined(content: Any) -> Any:
    """The text of a list of text parts; anything else as it is."""
    parts = content if isinstance(content, list) else []
    texts: list[Any] = [p.get("text") if isinstance(p, dict) and p.get("type", "text") == "text" else p for p in parts]
    return "".join(texts) if texts and all(isinstance(t, str) for t in texts) else content


def _thought(turn: Mapping[str, Any], place: str, where: str) -> Message:
    """The turn's thought under the name that most templates read; nothing if it has none."""
    texts = {key: text(turn[key], f"{place}.{key}", where) for key in THOUGHTS if _has_value(turn, key)}
    if len(set(texts.values())) > 1:
        problem = f"{place}: {' and '.join(texts)} hold two thoughts; keep one"
        raise DataError(where, problem, "two thoughts")
    return {THOUGHT: next(iter(texts.values()))} if texts else {}


def _learn(turn: Mapping[str, Any], place: str, where: str) -> Message:
    """{_LEARN: False} for a turn that says that it is not to be learnt."""
    said = {key: turn[key] for key in LEARNT if turn.get(key) is not None}
    for key, value in said.items():
        if value not in (0, 1):  # False and True too
            problem = f"{place}.{key}: {shown(value)}; a turn is learnt or not, write 1 or 0"
            raise DataError(where, problem, f"{key} of a turn")
    if len({bool(value) for value in said.values()}) > 1:
        raise DataError(where, f"{place}: {' and '.join(said)} contradict each other; keep one", "weight of a turn")
    return {_LEARN: False} if said and not all(said.values()) else {}


def refuse_unreadable(values: Mapping[str, Any], place: str, where: str, read: Iterable[str] = ()) -> None:
    """Raise DataError for a key that changes what is learnt and is not read."""
    for key, reason in UNREADABLE.items():
        if key not in read and _has_value(values, key):
            raise DataError(where, f"{place}{key}: {reason}; leave the row out, or the key", f"{key}: not read")


def _history(row: Row, where: str) -> list[Message]:
    if not _has_value(row, "history"):
        return []
    pairs = row["history"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        problem = f"history: {shown(pairs)} where a list of [user, assistant] pairs is expected"
        raise DataError(where, problem, "history: not pairs")
    return [
        _turn(role, text(content, f"history[{i}][{side}]", where))
        for i, pair in enumerate(pairs)
        for side, (role, content) in enumerate(zip(("user", "assistant"), pair, strict=True))
    ]


def _system(row: Row, where: str) -> list[Message]:
    return [_turn("system", text(row["system"], "system", where))] if _has_value(row, "system") else []


def _has_value(row: Mapping[str, Any], key: str) -> bool:
    """True if an optional key has a value; null and empty count as absent, as many files fill every column."""
    return key in row and row[key] not in (None, "", [])


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def unread_keys(row: Row, format: str) -> list[str]:
    """Keys of the row's turns that have a value and are not read, such as a user's name."""
    role, content, roles = ("from", "value", SHAREGPT_ROLES) if format == "sharegpt" else ("role", "content", ROLES)
    read = {role, content, *THOUGHTS, *LEARNT, *CALL_KEYS}
    unread: set[str] = set()
    for field in TURN_LISTS.get(format, ()):
        for turn in row[field] if isinstance(row.get(field), list) else ():
            filled = {key for key in turn if turn[key] is not None} if isinstance(turn, dict) else set[str]()
            names = ("tool_call_id", "name") if filled and roles.get(turn.get(role)) == "tool" else ()
            unread.update(f"{field}[].{key}" for key in filled.difference(read, names))
    return sorted(unread)
