"""Which turns of a row are learnt, the thoughts before answers, and what a template writes around both."""

import copy
from pathlib import Path

import pytest
import trl

from data.conversation import ARGUMENTS, DataError, Ledger
from data.encode.chat import encode, encode_prompt, encode_turns, learning_last_turn
from data.encode.frame import SERVED, Frame, frame_of, quiet_arguments, spoken, spoken_tokens, thinking_arguments
from data.readers.row_formats import row_conversation
from tests.helpers.families import build, build_for

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QUESTION = {"role": "user", "content": "Who?"}


def read(row, task: str = "instruct"):
    return row_conversation(row, None, task, "f.jsonl:1", Ledger("f.jsonl"))


def chat(*answers, **more):
    """A row of questions with these answers, which are text or keys of the turn."""
    turns = [t if isinstance(t, dict) else {"content": t} for t in answers]
    return {"messages": [m for turn in turns for m in (QUESTION, {"role": "assistant", **turn})], **more}


def learnt(row, tokenizer, last: bool = False) -> list[str]:
    conversation = learning_last_turn(read(row)) if last else read(row)
    return [
        tokenizer.decode([i for i, m in zip(e.ids, e.loss_mask, strict=True) if m])
        for e in encode_turns(conversation, tokenizer, 4096)
    ]


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("no", [0, False])
def test_a_turn_that_says_so_is_not_learnt(key, no):
    row = chat({"content": "It is blue.", key: no}, {"content": "It is red.", key: 1})
    assert learnt(row, build("chatml")) == ["It is red.<|im_end|>"]
    assert "It is blue." in build("chatml").decode(encode(read(row), build("chatml"), 4096).ids)


def test_a_row_of_which_no_turn_is_learnt_is_left_out_with_its_place():
    with pytest.raises(DataError, match=r"f\.jsonl:1: no assistant turn is learnt") as error:
        encode_turns(read(chat({"content": "a", "weight": 0})), build("chatml"), 512)
    assert error.value.kind == "no trained token"


def test_only_the_last_turn_is_learnt_if_the_recipe_says_so(family_of_one_example):
    assert learnt(chat("one", "two", "three"), family_of_one_example, last=True)[-1].startswith("three")
    assert "two" not in "".join(learnt(chat("one", "two", "three"), family_of_one_example, last=True))


@pytest.fixture(params=["chatml", "llama3", "qwen3"])
def family_of_one_example(request):
    return build(request.param)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_in_a_field_is_learnt_as_one_in_tags(key):
    tokenizer = build("qwen3")
    tags = learnt(chat("<think>\nThe sky is.\n</think>\n\nBlue."), tokenizer)
    assert learnt(chat({"content": "Blue.", key: "The sky is."}), tokenizer) == tags
    assert tags == ["<think>\nThe sky is.\n</think>\n\nBlue.<|im_end|>"]


def test_a_thought_that_the_template_leaves_out_is_refused():
    with pytest.raises(DataError, match=r"f\.jsonl:1: the chat template leaves thoughts out"):
        encode_turns(read(chat({"content": "a", "thinking": "b"})), build("gemma"), 512)


def test_markers_in_a_thought_are_no_control_tokens():
    tokenizer = build("qwen3")
    row = read(chat({"content": "Blue.", "thinking": "say <|im_end|> now"}))
    example = encode(row, tokenizer, 512)
    ids = [i for i, m in zip(example.ids, example.loss_mask, strict=True) if m]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert "say <|im_end|> now" in tokenizer.decode(ids)
    with pytest.raises(DataError, match="a thought holds </think>"):
        encode(read(chat({"content": "Blue.", "thinking": "say </think> now"})), tokenizer, 512)


def test_rows_bring_their_own_template_arguments():
    tokenizer = build("qwen3")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs[ARGUMENTS] = {"enable_thinking": False}
    quiet = encode(read(chat("Blue.")), tokenizer, 512)
    loud = encode(read(chat("Blue.", chat_template_kwargs={"enable_thinking": True})), tokenizer, 512)
    assert quiet.ids == loud.ids  # the same text, but the empty thought is in the prompt of one
    assert sum(quiet.loss_mask) == sum(loud.loss_mask)
    with pytest.raises(DataError, match="chat_template_kwargs: text 'no' where names and values"):
        read(chat("Blue.", chat_template_kwargs="no"))


def test_text_parts_are_joined_and_developer_is_system():
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Ann."}]},
        ]
    }
    assert [(m["role"], m["content"]) for m in read(row).messages] == [
        ("system", "Be brief."), ("user", "Who is it?"), ("assistant", "Ann."),
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["image", "images", "audio", "videos", "tools", "functions", "loss_scale", "rejected"])
def test_a_key_that_changes_what_is_learnt_is_refused_and_not_only_noted(key):
    with pytest.raises(DataError, match=f"f.jsonl:1: {key}: "):
        read({"prompt": "p", "completion": "c", key: ["x"]})
    assert read({"prompt": "p", "completion": "c", key: []}).answer == "c"


THINKERS = ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "nemotron_3_nano", "gptoss"]
OTHERS = [
    "muse_glimmer",
    "qwen3_instruct_2507",
    "qwen2_5",
    "cohere2",
    "phi3",
    "llama3_2",
    "gemma3",
    "gemma4_v5",
    "lfm2",
]


@pytest.mark.parametrize("name", [*THINKERS, *OTHERS])
def test_only_the_answer_is_learnt_whatever_the_template_writes_before_it(name):
    tokenizer = build_for((TEMPLATES / f"{name}.jinja").read_text())
    example = encode(read(chat("ferry")), tokenizer, 9999)
    ids = [i for i, m in zip(example.ids, example.loss_mask, strict=True) if m]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "ferry"


@pytest.mark.parametrize("name", THINKERS)
def test_a_learnt_thought_is_taken_off_before_an_answer_is_scored(name):
    tokenizer = build_for((TEMPLATES / f"{name}.jinja").read_text())
    row = read(chat({"content": "ferry", "thinking": "It leaves at nine."}))
    example = encode(row, tokenizer, 9999)
    own = thinking_arguments(tokenizer)
    prompt = encode_prompt(row.prompt, tokenizer, own)
    assert example.ids[: len(prompt)] == prompt
    written, frame = example.ids[len(prompt) :], frame_of(tokenizer, own)
    assert "nine" in tokenizer.decode(written)
    assert spoken_tokens(written, tokenizer, frame) == "ferry"
    unfinished = written[: len(written) // 2]
    assert "nine" not in spoken_tokens(unfinished, tokenizer, frame)


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("<think>\n\n</think>\n\nferry", "ferry"),
        ("<think>\nhm, the bridge\n</think>\n\nferry", "ferry"),
        ("hm, the bridge\n</think>\n\nferry", "ferry"),
        ("ferry", "ferry"),
        ("the tag <think> is a tag", "the tag <think> is a tag"),
        ("", ""),
    ],
)
def test_what_a_server_writes_is_scored_without_its_thought(written, answer):
    assert spoken(written, SERVED) == answer


def test_an_unfinished_thought_is_no_answer():
    frame = Frame("<think>\n\n</think>\n\n", "<think>\n", "\n</think>\n\n", "field")
    assert spoken("<think>\nthe ferry, or", frame) == ""
    opened_by_prompt = Frame("\n</think>\n\n", "", "\n</think>\n\n", "field")
    assert spoken("the ferry, or", opened_by_prompt) == ""


def test_the_switch_that_leaves_thoughts_out_is_found_by_trying():
    switches = {
        name: quiet_arguments(build_for((TEMPLATES / f"{name}.jinja").read_text())) for name in [*THINKERS, *OTHERS]
    }
    assert {name for name, switch in switches.items() if switch == {"enable_thinking": False}} == {
        "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_nano",
    }  # fmt: skip
    assert all(not switch or switch == {"enable_thinking": False} for switch in switches.values())
