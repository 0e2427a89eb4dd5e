"""Windows cover the whole passage, mark the answer, and are built once."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data.encode.qa_windows
from data.conversation import Conversation, DataError
from data.encode.qa_windows import NO_PASSAGE, load_windows, make_windows, windows_key
from data.errors import UserError
from tests.helpers.builders import read_squad
from tests.helpers.places import REAL_DATA, needs_real
from tests.helpers.qa import ask, bert_tokenizer, roberta_tokenizer

SETTINGS = (384, 128, 64)


def quote(conversation: Conversation, row: dict[str, Any]) -> str:
    """The characters from the first to the last gold token."""
    return conversation.context[row["char_starts"][row["start_positions"]] : row["char_ends"][row["end_positions"]]]


def offsets(row: dict[str, Any], places: slice = slice(None)) -> list[list[int]]:
    return [list(o) for o in zip(row["char_starts"][places], row["char_ends"][places], strict=True)]


def core(row: dict[str, Any]) -> slice:
    return slice(row["core_start"], row["core_end"])


def shortest(conversation: Conversation) -> str:
    return min(conversation.answers, key=len)


def inexact(conversations: list[Conversation], windows: Dataset) -> int:
    """Number of answers that are shorter than their tokens. Asserts that a window holds every answer, and nothing else."""
    quotes, longer = {}, 0
    for row in windows:
        if row["start_positions"]:
            text = quote(conversations[row["conversation"]], row)
            assert shortest(conversations[row["conversation"]]) in text
            quotes[row["conversation"]] = text
    for i, conversation in enumerate(conversations):
        if not conversation.answers:
            assert i not in quotes
        else:
            longer += quotes[i] != shortest(conversation)
    return longer


@pytest.mark.parametrize("settings", [SETTINGS, (80, 20, 24)])
def test_every_answer_of_the_samples_is_whole_in_a_window(questions, settings):
    assert inexact(questions, windows := make_windows(questions, bert_tokenizer(), *settings)) <= 2
    assert not any(windows["lost_answer"])
    assert not any(windows["cut_question"])
    assert len(windows) > len(questions) or settings == SETTINGS


@needs_real("squad_v2/dev.json.gz")
def test_every_answer_of_real_data_is_whole_in_a_window():
    conversations = read_squad(REAL_DATA / "squad_v2" / "dev.json.gz")[:3000]
    assert inexact(conversations, make_windows(conversations, bert_tokenizer())) <= 0.01 * len(conversations)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("length", "doc_stride"),
    [(512, 128), (80, 20), *(pytest.param(80, stride, marks=pytest.mark.slow) for stride in (31, 500))],
)
@pytest.mark.parametrize("tokenizer", [bert_tokenizer, roberta_tokenizer, lambda: roberta_tokenizer(False)])
def test_rows_are_what_the_tokenizer_makes_of_question_and_passage(tokenizer, length, doc_stride, questions):
    tokenizer = tokenizer()
    for c in questions[:24]:
        room = length - tokenizer.num_special_tokens_to_add(pair=True) - len(tokenizer.tokenize(c.question))
        overlap = max(0, room - doc_stride)  # transformers' stride
        expected = tokenizer(
            c.question, c.context, truncation="only_second", max_length=length, stride=overlap, padding=False,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
        )  # fmt: skip
        rows = make_windows([c], tokenizer, length, doc_stride, 40)
        assert rows["input_ids"][:] == expected["input_ids"]
        assert rows["token_type_ids"][:] == expected["token_type_ids"]
        for i, row in enumerate(rows):
            of_passage = [part == 1 for part in expected.sequence_ids(i)]
            pairs = zip(expected["offset_mapping"][i], of_passage, strict=True)
            assert offsets(row) == [list(o) if inside else [NO_PASSAGE] * 2 for o, inside in pairs]
            if len(rows) == 1:
                assert np.flatnonzero(of_passage).tolist() == list(range(row["core_start"], row["core_end"]))


def test_answers_are_marked_without_token_types_and_with_tokens_across_words(questions):
    windows = make_windows(questions, roberta_tokenizer(), 512)
    assert inexact(questions, windows) < len(questions) / 2  # a small vocabulary with tokens across words


def test_a_tokenizers_own_limits_and_state_do_not_matter_and_stay(questions):
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer().name_or_path)
    before = tokenizer.backend_tokenizer.to_str()
    assert '"max_length":128' in before
    assert max(map(len, make_windows(questions, tokenizer)["input_ids"])) > 128
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


@pytest.mark.parametrize("tokens", [0, 1, 5, 17, 60, 61, 400, 5000])
@pytest.mark.parametrize("doc_stride", [31, 128])  # longer than a window: no gap
@pytest.mark.parametrize("question", ["Who?", "Who then was it, and why did they not say so at once?"])
def test_windows_cover_the_passage_and_each_token_has_one_max_context(tokens, question, doc_stride):
    context = " ".join(random.Random(tokens).choices(["cat", "dog", "sun"], k=tokens)) or "\u200b"  # dropped by BERT
    windows = make_windows([ask(context, question)], bert_tokenizer(), 80, doc_stride, 16)
    covered, owned = [], []
    for row in windows:
        assert len(row["input_ids"]) <= 80
        covered += [o for o in offsets(row) if o[0] >= 0]
        owned += offsets(row, core(row))
    every = [[4 * i, 4 * i + 3] for i in range(tokens)]
    assert sorted(owned) == every
    assert sorted({tuple(o) for o in covered}) == [tuple(o) for o in every]
    assert len(windows) >= 1


def test_window_moves_on_by_the_stride_and_max_context_is_run_squads():
    windows = make_windows([ask("cat " * 300)], bert_tokenizer(), 80, 31, 16)
    shown = [[start // 4 for start in row["char_starts"] if start >= 0] for row in windows]
    room = 80 - 3 - 4
    assert [tokens[0] for tokens in shown] == list(range(0, 300 - room + 31, 31))
    cores = [[start // 4 for start in row["char_starts"][core(row)]] for row in windows]
    for token in range(300):
        scores = [
            min(token - tokens[0], tokens[-1] - token) + 0.01 * len(tokens) if token in tokens else -1
            for tokens in shown
        ]
        (owner,) = (i for i, tokens in enumerate(cores) if token in tokens)
        assert owner == scores.index(max(scores))


def test_answer_across_the_border_of_windows_is_marked_only_in_a_window_that_holds_it_whole():
    context = "cat " * 70 + "the long answer here " + "dog " * 200
    windows = make_windows([ask(context, answer="the long answer here")], bert_tokenizer(), 80, 31, 16)
    held = [row for row in windows if row["start_positions"]]
    assert 0 < len(held) < len(windows)
    assert {quote(ask(context), row) for row in held} == {"the long answer here"}
    assert all(row["end_positions"] == 0 for row in windows if not row["start_positions"])
    assert not any(windows["lost_answer"])


def test_answer_longer_than_a_window_is_counted():
    context = "cat " * 100
    windows = make_windows([ask(context, answer=context.strip()), ask(context)], bert_tokenizer(), 40, 16, 16)
    assert windows["lost_answer"][:] == [True] + [False] * (len(windows) - 1)


@pytest.mark.parametrize("tokenizer", [bert_tokenizer, roberta_tokenizer])
def test_control_tokens_in_texts_stay_text(tokenizer):
    tokenizer = tokenizer()
    text = "one [SEP] two [CLS] [MASK] [PAD] </s> <mask> <s> <think> Paris end"
    (row,) = make_windows([ask(text, "Is [SEP] or </s> or <think> meant?", "Paris")], tokenizer, 200)
    frame = tokenizer("a", "b")["input_ids"]
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | {tokenizer.convert_tokens_to_ids("<think>")}
    assert [i for i in row["input_ids"] if i in control] == [i for i in frame if i in control]
    assert quote(ask(text), row).strip() == "Paris"


@pytest.mark.parametrize("tokenizer", [bert_tokenizer, roberta_tokenizer, lambda: roberta_tokenizer(False)])
@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("Das Café naïve Ångström liegt in München.", "München"),
        ("東京は日本の首都です。人口は多い。", "日本"),
        ("We met 👩‍👩‍👧 and 🙂 in Kyōto 🙂 today", "Kyōto"),
        ("e\u0301te\u0301 a\u0300 Orle\u0301ans hier", "Orle\u0301ans"),
        ("İstanbul ve İzmir güzel", "İzmir"),
        ("a\u00a0b\u200b\r\n\t Paris\u2028x", "Paris"),
    ],
)
def test_offsets_are_characters_of_the_context(tokenizer, context, answer):
    (row,) = make_windows([ask(context, answer=answer)], tokenizer())
    assert quote(ask(context), row).strip() == answer


def test_overlong_question_is_cut_and_counted():
    conversations = [ask("A cat sat.", "why " * 70 + "?"), ask("A cat sat.", "why " * 64)]
    cut, whole = make_windows(conversations, bert_tokenizer(), 128)
    assert (cut["cut_question"], whole["cut_question"]) == (True, False)
    assert cut["input_ids"] == whole["input_ids"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_cut_question_is_never_longer_than_asked(trim_offsets):
    tokenizer = roberta_tokenizer(trim_offsets)
    for question in ("who did 🙂 " * 9, "  ".join(["why"] * 30), "東京は日本の首都です" * 3):
        for length in range(1, 12):
            (row,) = make_windows([ask("A cat sat.", question)], tokenizer, 64, 64, length)
            room = row["char_starts"].index(0) - 3  # </s></s> and <s> are before the passage
            assert length - 4 <= room <= length  # a character of several tokens is not cut
            assert row["cut_question"]


def test_shortest_answer_is_trained():
    c = replace(ask("She lives in Paris, France."), answers=("in Paris", "Paris", "Paris, France"), starts=(10, 13, 13))
    (row,) = make_windows([c], bert_tokenizer())
    assert quote(c, row) == "Paris"


def test_second_start_reads_the_windows_of_the_first(questions, tmp_path, monkeypatch):
    asked = [*questions, ask("\u200b")]
    first = load_windows(asked, bert_tokenizer(), tmp_path, *SETTINGS)
    assert first.to_list() == make_windows(asked, bert_tokenizer(), *SETTINGS).to_list()
    monkeypatch.setattr(data.encode.qa_windows, "window_rows", None)
    assert load_windows(asked, bert_tokenizer(), tmp_path, *SETTINGS).to_list() == first.to_list()


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-40]), lambda path: path.write_bytes(b"")]
)
def test_damaged_windows_are_rebuilt(damage, questions, tmp_path, capsys):
    rows = load_windows(questions, bert_tokenizer(), tmp_path, *SETTINGS).to_list()
    (file,) = (path for path in tmp_path.glob("*/*.arrow"))
    damage(file)
    assert load_windows(questions, bert_tokenizer(), tmp_path, *SETTINGS).to_list() == rows
    assert "is damaged" in capsys.readouterr().err


def test_everything_that_changes_windows_changes_the_key(questions):
    key = windows_key(questions, bert_tokenizer(), *SETTINGS)
    assert key == windows_key(list(questions), bert_tokenizer(), *SETTINGS)
    others = [
        windows_key(questions, bert_tokenizer(), *changed)
        for changed in [(383, 128, 64), (384, 127, 64), (384, 128, 63)]
    ]
    others.append(windows_key(questions, roberta_tokenizer(), *SETTINGS))
    others.append(windows_key(questions[1:], bert_tokenizer(), *SETTINGS))
    others.append(windows_key(questions[::-1], bert_tokenizer(), *SETTINGS))
    first = questions[0]
    changes = [{"question": "?"}, {"context": first.context + "."}, {"answers": ("x",)}, {"starts": (7,)}]
    others += [windows_key([replace(first, **c), *questions[1:]], bert_tokenizer(), *SETTINGS) for c in changes]
    assert len({key, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((67, 16, 64), "max_query_length 64 and 3 control tokens .* max_seq_length 67; raise max_seq_length"),
        ((384, 0, 64), "doc_stride 0 and max_query_length 64 must be 1 or more"),
        ((384, 128, 0), "doc_stride 128 and max_query_length 0 must be 1 or more"),
    ],
)
def test_impossible_settings_name_value_and_remedy(questions, settings, message):
    with pytest.raises(UserError, match=message):
        make_windows(questions, bert_tokenizer(), *settings)


def test_rows_that_are_not_squads_are_an_error():
    with pytest.raises(DataError, match=r"f: 1: row without question; .* SQuAD's format"):
        make_windows([ask("x", "")], bert_tokenizer())
    with pytest.raises(DataError, match="row without offsets .* SQuAD's format"):
        make_windows([replace(ask("x"), answers=("x",))], bert_tokenizer())
    with pytest.raises(DataError, match="no question .*windows"):
        make_windows([], bert_tokenizer())
    with pytest.raises(UserError, match=r"no token .*\[CLS\]"):
        make_windows([ask("x")], PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))))


@pytest.mark.parametrize("punctuation", [False, True])
def test_tokenizer_that_cuts_off_white_space_and_adds_a_space_keeps_the_first_letter(punctuation):
    """RobBERT's parts: offsets began one character into each word, and every gold answer lost a letter."""
    answers = ["ferry", "the mayor's piano", "4,310", "$5.50", "naïve", "Lund", "“Pier”"]
    context = "The ferry  carries the mayor's piano and 4,310 naïve tourists to Lund; it costs $5.50 at “Pier”."
    whole = roberta_tokenizer()
    backend = Tokenizer.from_str(whole.backend_tokenizer.to_str())
    parts = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts + [pre_tokenizers.Punctuation()] * punctuation)
    sep, cls = (("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>")))
    backend.post_processor = processors.RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **whole.special_tokens_map)
    rows = make_windows([ask(context, answer=answer) for answer in answers], tokenizer, 160, 50, 16)
    for row in rows:
        first, last = row["start_positions"], row["end_positions"]
        assert context[row["char_starts"][first] : row["char_ends"][last]].strip() == answers[row["conversation"]]
