"""Rows with tools, and the chat templates that TRL ships for them."""

import copy
from pathlib import Path

import trl

from data.conversation import CALLS, Conversation, Ledger
from data.readers.row_formats import row_conversation
from tests.helpers.families import build_for

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# keys in no usual order, a null, numbers and non-ASCII text, which must all stay
FERRY = {
    "type": "function",
    "function": {
        "name": "ferry_times",
        "description": "When ferries leave — “daily”",
        "parameters": {
            "type": "object",
            "required": ["harbour"],
            "properties": {
                "harbour": {"type": "string", "description": "A town", "default": None},
                "days": {"type": "integer", "minimum": 1.0},
                "fast": {"type": "boolean"},
                "via": {"type": "array", "items": {"type": "string"}},
            },
        },
    },
}
ARGUMENTS = {"harbour": "Lund", "days": 3}
USER = {"role": "user", "content": "Which ferry?"}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "ferry_times", "content": "nine o'clock"}
ANSWER = {"role": "assistant", "content": "The one at nine."}


def call(arguments=ARGUMENTS, id: str | None = "call00001", name: str = "ferry_times"):
    return {**({"id": id} if id else {}), "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, content: str = "", **more):
    return {"role": "assistant", "content": content, CALLS: list(calls or [call()]), **more}


def row(*messages, tools=(FERRY,), **more):
    return {"messages": list(messages), **({"tools": list(tools)} if tools else {}), **more}


def template(name: str):
    return copy.deepcopy(build_for((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")))


def read(row, task: str = "instruct") -> Conversation:
    return row_conversation(row, None, task, "f.jsonl:1", Ledger("f.jsonl"))


WITH_TOOLS = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_nothink", "qwen3_5_think", "qwen3_8", "qwen3_vl",
              "llama3_1", "llama3_2", "gemma4_v5", "gptoss", "glm4moe_training", "lfm2_2_5", "muse_glimmer",
              "nemotron_3_nano", "diffusion_gemma"]  # fmt: skip
ROWS = {
    "a call": row(USER, calling()),
    "an answer after it": row(USER, calling(), RESULT, ANSWER),
    "another question": row(USER, calling(), RESULT, ANSWER, USER, ANSWER),
    "values": row(USER, calling(call({"harbour": 'Å "b" \\ <c>', "days": -2, "fast": True, "via": ["a", "b"]}))),
    "no values": row(USER, calling(call({}))),
    "no call": row(USER, ANSWER),
}
