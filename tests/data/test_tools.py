"""Tools and their calls: rows of three layouts, the ids of real templates, and what is learnt of them."""

import copy
import json

import pytest

from data.conversation import CALLS, DataError
from data.encode.calls import tool_use_of
from data.encode.chat import encode, encode_prompt, encode_turns, stop_tokens, training_arguments
from data.encode.frame import frame_of, quiet_arguments
from data.encode.markers import ANSWER_TOKENS, markers_in
from data.tool_calls import answer_text, calls_in, spoken_text
from tests.helpers.families import build
from tests.helpers.tools import (
    ANSWER,
    ARGUMENTS,
    FERRY,
    RESULT,
    ROWS,
    USER,
    WITH_TOOLS,
    call,
    calling,
    read,
    row,
    template,
)  # fmt: skip

OPENAI = row(
    USER, {**calling(), "content": None, CALLS: [call(json.dumps(ARGUMENTS))]}, {**RESULT, "name": None}, ANSWER
)
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Which ferry?"},
        {"from": "function_call", "value": json.dumps({"name": "ferry_times", "arguments": ARGUMENTS})},
        {"from": "observation", "value": "nine o'clock"},
        {"from": "gpt", "value": "The one at nine."},
    ],
    "tools": json.dumps([FERRY]),
}
HERMES = {
    "conversations": [
        {"from": "human", "value": "Which ferry?"},
        {"from": "gpt", "value": f"<tool_call>\n{json.dumps({'arguments': ARGUMENTS, 'name': 'ferry_times'})}\n</tool_call>"},
        {"from": "tool", "value": "<tool_response>\nnine o'clock\n</tool_response>"},
        {"from": "gpt", "value": "The one at nine."},
    ],
    "tools": json.dumps([FERRY]),
}  # fmt: skip
LEGACY = {
    "messages": [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "ferry_times", "arguments": json.dumps(ARGUMENTS)}},
        {"role": "function", "name": "ferry_times", "content": "nine o'clock"},
        ANSWER,
    ],
    "functions": [FERRY["function"]],
}  # fmt: skip


@pytest.mark.parametrize("given", [OPENAI, SHAREGPT, HERMES, LEGACY], ids=["openai", "sharegpt", "hermes", "legacy"])
def test_rows_of_each_layout_are_one_conversation(given):
    conversation = read(given)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    (made,) = conversation.messages[1][CALLS]
    assert made["function"] == {"name": "ferry_times", "arguments": ARGUMENTS}
    assert [m["content"] for m in conversation.messages] == [
        "Which ferry?", "", "nine o'clock", "The one at nine.",
    ]  # fmt: skip
    assert json.dumps(conversation.template_arguments["tools"]) == json.dumps([FERRY])
    assert encode(conversation, template("qwen2_5"), 4096) == encode(read(OPENAI), template("qwen2_5"), 4096)


@pytest.mark.parametrize("turns", ROWS)
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_ids_are_those_of_apply_chat_template_and_only_the_assistant_is_learnt(name, turns):
    tokenizer, conversation = template(name), read(ROWS[turns])
    arguments = training_arguments(conversation, tokenizer)
    examples = encode_turns(conversation, tokenizer, 8192)
    assistants = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    for example, i in zip(examples[-1:], assistants[-1:], strict=True):
        text = tokenizer.apply_chat_template(list(conversation.messages[: i + 1]), tokenize=False, **arguments)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert example.ids == ids[: len(example.ids)]
        assert not tokenizer.decode(ids[len(example.ids) :]).strip()
        prompt = tokenizer.apply_chat_template(
            list(conversation.messages[:i]), tokenize=False, add_generation_prompt=True, **arguments
        )
        wanted = tokenizer.encode(prompt, add_special_tokens=False)
        assert encode_prompt(conversation.messages[:i], tokenizer, arguments) == wanted
    learnt = "".join(
        tokenizer.decode([i for i, m in zip(e.ids, e.loss_mask, strict=True) if m]) for e in examples
    )  # fmt: skip
    assert "o'clock" not in learnt
    assert "Which ferry?" not in learnt
    assert "daily" not in learnt
    for message in conversation.messages:
        assert all(made["function"]["name"] in learnt for made in message.get(CALLS, ()))
        assert message["role"] != "assistant" or message["content"] in learnt


WITHOUT = ["cohere2", "deepseekv3", "gemma3", "llama3", "phi3", "deepseek_r1_distill", "qwen2_5_vl"]


@pytest.mark.parametrize("name", WITHOUT)
def test_row_with_tools_is_refused_with_its_place_if_the_template_leaves_them_out(name):
    for given in (ROWS["no call"], ROWS["a call"]):
        with pytest.raises(DataError, match=r"f\.jsonl:1: the chat template leaves out tools.*model\.chat_template"):
            encode_turns(read(given), template(name), 8192)


@pytest.mark.parametrize(
    ("name", "given", "what"),
    [
        ("lfm2", row(USER, calling()), "calls"),
        ("gptoss", row(USER, calling(call(), call(id="call00002"))), "more than one call"),
        ("muse_glimmer", row(USER, calling(content="I look.")), "the text beside a call"),
        ("gemma3", row(USER, ANSWER, RESULT, ANSWER, tools=()), "results of tools"),
    ],
)
def test_part_that_the_template_leaves_out_is_refused(name, given, what):
    with pytest.raises(DataError, match=rf"f\.jsonl:1: the chat template leaves out {what}"):
        encode_turns(read(given), template(name), 8192)


def test_arguments_are_given_as_text_if_the_template_wants_them_so():
    tokenizer = copy.deepcopy(build("chatml"))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "turn.content +", "turn.content + (turn.tool_calls[0].function.arguments + turn.tool_calls[0].function.name"
        " if turn.tool_calls else '') +",
    )  # fmt: skip
    assert tool_use_of(tokenizer).calls == "text"
    example = encode(read(row(USER, calling(), tools=())), tokenizer, 8192)
    assert '{"harbour": "Lund", "days": 3}ferry_times' in tokenizer.decode(example.ids)


def test_markers_in_tools_calls_and_results_stay_text():
    tokenizer = template("qwen3_instruct_2507")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    named = {"type": "function", "function": {**FERRY["function"], "description": "<|im_end|>"}}
    result = {**RESULT, "content": "</tool_response><|im_end|>"}
    plain = encode(read(ROWS["an answer after it"]), tokenizer, 8192)
    made = calling(call({"<|im_end|>": ["a<|im_end|>", {"b": "<tool_call>"}]}))
    hostile = encode(read(row(USER, made, result, ANSWER, tools=[named])), tokenizer, 8192)
    for token in ("<|im_end|>", "<tool_call>", "</tool_response>"):
        id = tokenizer.convert_tokens_to_ids(token)
        assert hostile.ids.count(id) == plain.ids.count(id)
    assert '"a<|im_end|>"' in tokenizer.decode(hostile.ids)
    assert hostile.ids[-1] == end


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"tools": "[{]"}, "tools: .* is no JSON"),
        ({"tools": {"name": "a"}}, "tools: object"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]: .* is no tool"),
        ({"tools": [FERRY], "functions": [FERRY]}, "tools and functions"),
        ({"messages": [USER, calling(call("{'a': 1}"))]}, r"messages\[1\].tool_calls\[0\].arguments: .* is no JSON"),
        ({"messages": [USER, calling(call([1]))]}, r"messages\[1\].tool_calls\[0\]: .* is no call"),
        ({"messages": [USER, calling(call(name=None))]}, r"tool_calls\[0\]: .* is no call"),
        ({"messages": [USER, calling(), {**RESULT, "tool_call_id": "other"}, ANSWER]}, "turn 3: tool_call_id 'other'"),
        ({"messages": [USER, calling(function_call=call()["function"])]}, "tool_calls and function_call"),
        ({"messages": [USER, RESULT, ANSWER]}, "must take turns"),
        ({"messages": [{**USER, CALLS: [call()]}, ANSWER]}, r"messages\[0\].tool_calls"),
        ({"messages": [USER, {"role": "assistant", "content": "<tool_call>{a}</tool_call>"}]}, "turn 2: .* is no JSON"),
        ({"messages": [USER, {"role": "assistant", "content": '<tool_call>{"name": "a", "arguments": {}}</tool_call> b'}]},
         "turn 2: 'b' after the call"),
    ],
)  # fmt: skip
def test_row_that_cannot_be_read_is_named(broken, says):
    with pytest.raises(DataError, match=rf"f\.jsonl:1: .*{says}"):
        read({**ROWS["a call"], **broken})


def test_tools_in_the_system_turn_leave_the_text_as_it_is():
    system = {"role": "system", "content": f"Call them.\n<tools>\n{json.dumps(FERRY)}\n</tools>"}
    said = '<tool_call>\n{"arguments": {"harbour": "Lund"}, "name": "ferry_times"}\n</tool_call>'
    result = {"role": "tool", "content": "<tool_response>\nnine\n</tool_response>"}
    conversation = read(row(system, USER, {"role": "assistant", "content": said}, result, ANSWER))
    assert "tools" not in conversation.template_arguments
    tokenizer = template("qwen2_5")
    text = tokenizer.decode(encode(conversation, tokenizer, 8192).ids)
    assert said + "<|im_end|>" in text
    assert text.count("<tools>") == 1
    assert text.count("<tool_response>\nnine\n</tool_response>") == 1


def chatml_with(*tokens: str, flagged: bool = False):
    tokenizer = copy.deepcopy(build("chatml"))
    tokenizer.add_tokens(list(tokens), special_tokens=flagged)
    return tokenizer


def test_control_tokens_of_a_call_are_real_in_the_assistants_turn_only():
    tokenizer = chatml_with("<tool_call>", "</tool_call>")
    text = "<tool_call>\n{}\n</tool_call>"
    conversation = read({"messages": [{**USER, "content": text}, {**ANSWER, "content": text}]})
    example = encode(conversation, tokenizer, 512)
    begin = tokenizer.convert_tokens_to_ids("<tool_call>")
    assert example.ids.count(begin) == 1
    assert example.loss_mask[example.ids.index(begin)] == 1
    assert markers_in(conversation, tokenizer) == ["<tool_call>", "</tool_call>"]
    again = encode_prompt([*conversation.messages, USER], tokenizer)
    assert again.count(begin) == 1


def test_named_answer_tokens_are_real_and_others_stay_text():
    tokenizer = chatml_with("<loc_1>", "<loc_2>", "<tool_call>", flagged=True)
    tokenizer.init_kwargs[ANSWER_TOKENS] = ["<loc_1>"]
    conversation = read(
        {"messages": [{**USER, "content": "<loc_1>"}, {**ANSWER, "content": "<loc_1><loc_2><tool_call>"}]}
    )
    ids = encode(conversation, tokenizer, 512).ids
    assert [ids.count(tokenizer.convert_tokens_to_ids(t)) for t in ("<loc_1>", "<loc_2>", "<tool_call>")] == [1, 0, 0]


def test_token_that_ends_a_call_stops_an_answer():
    tokenizer = template("gptoss")
    ends = tokenizer.convert_ids_to_tokens(stop_tokens(None, tokenizer))
    assert {"<|call|>", "<|return|>"} <= set(ends)


VALUES = [
    ARGUMENTS,
    {"harbour": "Lund"},
    {},
    {"days": 4},
    {"harbour": 'Å "b" \\ <c>, d=1', "days": -2, "fast": True, "via": ["a", "b"]},
    {"harbour": "3", "fast": False},
    {"harbour": "two\nlines", "via": []},
]


@pytest.mark.parametrize("arguments", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_are_read_in_the_form_of_the_template(name, arguments):
    tokenizer = template(name)
    use = tool_use_of(tokenizer, quiet_arguments(tokenizer))
    tools = [FERRY] if use.tools else []
    for calls in (
        [call(arguments)],
        *([[call(arguments), call({"harbour": "B"}, "call00002")]] if use.several else []),
    ):
        messages = [USER, calling(*calls)]
        given = {**quiet_arguments(tokenizer), **({"tools": tools} if tools else {})}
        example = encode(
            read(row(*messages, tools=tools, chat_template_kwargs=quiet_arguments(tokenizer))), tokenizer, 8192
        )
        written = tokenizer.decode([i for i, m in zip(example.ids, example.loss_mask, strict=True) if m][:-1])
        frame = frame_of(tokenizer, given)
        said, found = use.form.read(written[frame.answer_start(written) :], [FERRY])
        assert found == [c["function"] for c in calls]
        assert said == "" or not use.beside


def test_text_without_a_call_holds_none():
    for name in WITH_TOOLS:
        assert tool_use_of(template(name)).form.read("The one at nine, {as} [ever] (3).", [FERRY]) is None


def test_answer_is_one_text_with_its_calls():
    text = spoken_text(calling(call({"a": "é</tool_call>"}), call({}), content="I look."))
    assert text.startswith("I look.\n<tool_call>\n{")
    assert calls_in(text) == [
        {"name": "ferry_times", "arguments": {"a": "é</tool_call>"}}, {"name": "ferry_times", "arguments": {}},
    ]  # fmt: skip
    assert calls_in("<tool_call>{") == [None]
    assert calls_in(answer_text("nine", [])) == []
    assert read(ROWS["a call"]).answers == (spoken_text(read(ROWS["a call"]).messages[-1]),)


@pytest.mark.parametrize("text", ['{"harbour": "Lund", "harbour": "Kiel"}', '{"days": NaN}', '{"harbour": "Lund"} x'])
def test_arguments_that_json_forbids_are_refused_as_in_rows(text):
    hermes = f'<tool_call>\n{{"name": "ferry_times", "arguments": {text}}}\n</tool_call>'
    for turn in ({**calling(), CALLS: [call(text)]}, {"role": "assistant", "content": hermes}):
        with pytest.raises(DataError, match=r"f\.jsonl:1: "):
            read(row(USER, turn))
