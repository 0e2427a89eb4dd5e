"""A context that is encoded once has the same ids as in each row."""

import copy
import json
import random

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizer

from data.conversation import Conversation
from data.encode.chat import encode
from data.encode.tokens import Encoder, encoder_of, paragraph_cut
from tests.helpers.families import FAMILIES, build
from tests.helpers.places import SAMPLES

CUTS = {"chatml": 1, "llama3": 2, "qwen3": 2, "mistral_v7": 2, "gemma": None, "mistral_v1": None}

PARTS = [
    "\n", "\n\n", "\n\nA", "\n\nQuestion: ", "\r\n", " ", "  ", "\t", "\n \n", "word", "Word", "I'm", "1984", ".", "...",
    "?!", "\"", "(b)", "%", "é", "e\u0301", "日本", "🙂", "\u00a0", "\u2028", "\x00", "\x1c", "\ufdd0", "x" * 120, "A b. " * 30,
]  # fmt: skip


def texts(markers, count: int) -> list[str]:
    dice = random.Random(0)
    return ["".join(dice.choices([*PARTS, *markers], k=dice.randint(1, 25))) for _ in range(count)]


def test_cut_is_found_for_each_family():
    assert {name: paragraph_cut(build(name)) for name in CUTS} == CUTS


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_tokenizer(family):
    tokenizer = build(family)
    for text in texts(FAMILIES[family].markers, 800):
        assert encoder_of(tokenizer).ids(text) == tokenizer.encode(text, add_special_tokens=False), repr(text)


def test_ids_of_a_real_tokenizer(tokenizer):
    articles = json.loads((SAMPLES / "squad_dev.json").read_text())["data"]
    prompts = [
        f"Passage: {p['context']}\n\nQuestion: {q['question']}"
        for a in articles
        for p in a["paragraphs"]
        for q in p["qas"]
    ]
    for text in [*texts(["<|im_end|>", "<|im_start|>"], 2000), *prompts]:
        assert encoder_of(tokenizer).ids(text) == tokenizer.encode(text, add_special_tokens=False), repr(text)


def test_a_passage_is_encoded_once(tokenizer):
    encoder = Encoder(tokenizer)
    for question in range(5):
        encoder.ids(f"Passage: {'It is so.' * 30}\n\nQuestion: {question}?")
    assert (encoder._cached.cache_info().misses, encoder._cached.cache_info().hits) == (1, 4)


@pytest.mark.parametrize(
    "token",
    [AddedToken("<x>", rstrip=True), AddedToken("<x>", lstrip=True), AddedToken("\n\n", special=False)],
    ids=["strips the text after it", "strips the text before it", "holds newlines"],
)
def test_text_is_not_cut_if_an_added_token_touches_newlines(token):
    tokenizer = copy.deepcopy(build("chatml"))
    tokenizer.add_tokens([token])
    assert paragraph_cut(tokenizer) is None
    for text in texts(["<x>"], 200):
        assert encoder_of(tokenizer).ids(text) == tokenizer.encode(text, add_special_tokens=False), repr(text)


def test_truncation_left_by_another_call_cuts_nothing():
    tokenizer = copy.deepcopy(build("chatml"))
    tokenizer.pad_token = tokenizer.eos_token
    whole = encoder_of(tokenizer).ids("so it is " * 20)
    tokenizer("so it is " * 20, truncation=True, max_length=4, padding="max_length")
    assert encoder_of(tokenizer).ids("so it is " * 20) == whole


def test_tokens_added_later_are_control_tokens(tokenizer):
    grown = copy.deepcopy(tokenizer)
    assert "<new>" not in encoder_of(grown).control
    grown.add_tokens(["<new>"])
    assert "<new>" in encoder_of(grown).control


@pytest.mark.parametrize("text", ["<loc_1>", "<extra_id_12>", "[ENT3]", "zyntrix"])
def test_token_added_for_a_task_is_encoded_as_a_token_in_all_turns(text, tokenizer):
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([text])
    turns = ({"role": "user", "content": f"At {text}?"}, {"role": "assistant", "content": f"{text} it is"})
    example = encode(Conversation(turns, "", "f:1"), grown, 100)
    new = grown.convert_tokens_to_ids(text)
    assert example.ids == grown.apply_chat_template(list(turns), return_dict=False)[: len(example.ids)]
    assert [mask for i, mask in zip(example.ids, example.loss_mask, strict=True) if i == new] == [0, 1]
    grown.chat_template += "{{ '" + text + "' if false }}"
    assert text.isalnum() or text in encoder_of(grown).control


@pytest.mark.parametrize("text", ["<think>", "</tool_call>", "<tool_response>", "<|file_1|>", "<user>", "[/INST]"])
def test_token_that_marks_turns_or_thoughts_elsewhere_stays_control(text, tokenizer):
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([text])
    assert text in encoder_of(grown).control


class Letters(PreTrainedTokenizer):
    """One of the tokenizers that are written in Python: a character is a token."""

    def __init__(self, **kwargs):
        self.letters = {chr(c): c for c in range(32, 127)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return 127

    def get_vocab(self):
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def test_tokenizer_written_in_python_is_encoded_whole():
    tokenizer = Letters(eos_token="<end>")
    encoder = encoder_of(tokenizer)
    assert (encoder.cut, encoder.prepends) == (None, False)
    assert encoder.ids("ab<end>") == [97, 98, tokenizer.eos_token_id]
