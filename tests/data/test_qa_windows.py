"""Windows show a whole passage, know where the answer is, and are made once."""

import dataclasses
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data.encode.qa_windows
from data.conversation import Conversation, DataError
from data.encode.qa_windows import NO_PASSAGE, Windows, load_windows, make_windows, windows_key
from data.errors import UserError
from tests.helpers.builders import read_squad
from tests.helpers.places import REAL_DATA, needs_real
from tests.helpers.qa import ask, bert_tokenizer, roberta_tokenizer

SETTINGS = (384, 128, 64)


def rows_of(windows: Windows, conversation: int = 0) -> list[data.encode.qa_windows.Window]:
    return [row for row in map(windows.row, range(len(windows))) if row.conversation == conversation]


def quote(conversation: Conversation, row: data.encode.qa_windows.Window) -> str:
    """The characters from the first to the last gold token."""
    return conversation.context[row.offsets[row.start, 0] : row.offsets[row.end, 1]]


def shortest(conversation: Conversation) -> str:
    return min(conversation.answers, key=len)


def inexact(conversations: list[Conversation], windows: Windows) -> int:
    """How many answers are shorter than their tokens; every answer must stand in a window, and in no other text."""
    held, longer = {}, 0
    for row in map(windows.row, range(len(windows))):
        if row.start:
            text = quote(conversations[row.conversation], row)
            assert shortest(conversations[row.conversation]) in text
            held[row.conversation] = text
    for i, conversation in enumerate(conversations):
        if not conversation.answers:
            assert i not in held
        else:
            longer += held[i] != shortest(conversation)
    return longer


@pytest.mark.parametrize("settings", [SETTINGS, (80, 20, 24)])
def test_every_answer_of_the_samples_is_whole_in_a_window(questions, settings):
    assert inexact(questions, windows := make_windows(questions, bert_tokenizer(), *settings)) <= 2
    assert windows.lost_answers == windows.cut_questions == 0
    assert len(windows) > len(questions) or settings == SETTINGS


@needs_real("squad_v2/dev.json.gz")
def test_every_answer_of_real_data_is_whole_in_a_window():
    conversations = read_squad(REAL_DATA / "squad_v2" / "dev.json.gz")[:3000]
    assert inexact(conversations, make_windows(conversations, bert_tokenizer())) <= 0.01 * len(conversations)


def test_row_is_what_the_tokenizer_makes_of_question_and_passage(questions):
    tokenizer = bert_tokenizer()
    windows = make_windows(questions, tokenizer)
    for i in range(len(windows)):
        row = windows.row(i)
        c = questions[row.conversation]
        expected = tokenizer(c.question, c.context, truncation=False, padding=False, return_offsets_mapping=True)
        assert row.input_ids.tolist() == expected["input_ids"]
        assert row.token_type_ids.tolist() == expected["token_type_ids"]
        of_passage = [s == 1 for s in expected.sequence_ids()]
        pairs = zip(expected["offset_mapping"], of_passage, strict=True)
        assert row.offsets.tolist() == [list(o) if inside else [NO_PASSAGE] * 2 for o, inside in pairs]
        assert row.max_context.tolist() == of_passage
        assert len(row.input_ids) == windows.lengths[i]
        assert of_passage.index(True) == windows.passage_at[i]


def test_tokenizer_without_token_types_frames_its_own_way(questions):
    tokenizer = roberta_tokenizer()
    windows = make_windows(questions, tokenizer, 512)
    for row in map(windows.row, range(12)):
        c = questions[row.conversation]
        whole = tokenizer(c.question, c.context)["input_ids"]
        assert row.input_ids.tolist() == whole or len(whole) > 512
        assert not row.token_type_ids.any()
    assert inexact(questions, windows) < len(questions) / 2  # a small vocabulary: its tokens run over words' ends


def test_a_tokenizers_own_limits_and_state_do_not_matter_and_stay(questions):
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer().name_or_path)
    before = tokenizer.backend_tokenizer.to_str()
    assert '"max_length":128' in before
    assert make_windows(questions, tokenizer).lengths.max() > 128
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


@pytest.mark.parametrize("tokens", [0, 1, 5, 17, 60, 61, 400, 5000])
@pytest.mark.parametrize("question", ["Who?", "Who then was it, and why did they not say so at once?"])
def test_windows_cover_the_passage_and_each_token_has_one_max_context(tokens, question):
    context = " ".join(random.Random(tokens).choices(["cat", "dog", "sun"], k=tokens)) or "\u200b"  # dropped by BERT
    windows = make_windows([ask(context, question)], bert_tokenizer(), 80, 31, 16)
    seen, owned = [], []
    for row in rows_of(windows):
        assert len(row.input_ids) <= 80
        seen += row.offsets[row.offsets[:, 0] >= 0].tolist()
        owned += row.offsets[row.max_context].tolist()
    every = [[4 * i, 4 * i + 3] for i in range(tokens)]
    assert sorted(owned) == every
    assert sorted({tuple(o) for o in seen}) == [tuple(o) for o in every]
    assert len(windows) >= 1


def test_window_moves_on_by_the_stride_and_max_context_is_run_squads():
    windows = make_windows([ask("cat " * 300)], bert_tokenizer(), 80, 31, 16)
    room = 80 - 3 - 4
    assert windows.first.tolist() == list(range(0, 300 - room + 31, 31))
    for token in range(300):
        scores = [
            min(token - first, first + length - 1 - token) + 0.01 * length if first <= token < first + length else -1
            for first, length in zip(windows.first, windows.length, strict=True)
        ]
        (owner,) = (i for i, (low, high) in enumerate(windows.core) if low <= token < high)
        assert owner == scores.index(max(scores))


def test_stride_longer_than_a_window_leaves_no_gap():
    windows = make_windows([ask("cat " * 300)], bert_tokenizer(), 40, 128, 16)
    assert (np.diff(windows.first) == windows.length[:-1]).all()


def test_answer_over_the_border_of_windows_is_no_answer_there_and_found_elsewhere():
    context = "cat " * 70 + "the long answer here " + "dog " * 200
    windows = make_windows([ask(context, answer="the long answer here")], bert_tokenizer(), 80, 31, 16)
    rows = rows_of(windows)
    held = [row for row in rows if row.start]
    assert 0 < len(held) < len(rows)
    assert {quote(ask(context), row) for row in held} == {"the long answer here"}
    assert all((row.start, row.end) == (0, 0) for row in rows if not row.start)
    assert windows.lost_answers == 0


def test_answer_longer_than_a_window_is_counted():
    context = "cat " * 100
    assert make_windows([ask(context, answer=context.strip())], bert_tokenizer(), 40, 16, 16).lost_answers == 1


@pytest.mark.parametrize("tokenizer", [bert_tokenizer, roberta_tokenizer])
def test_control_tokens_in_texts_stay_text(tokenizer):
    tokenizer = tokenizer()
    text = "one [SEP] two [CLS] [MASK] [PAD] </s> <mask> <s> <think> Paris end"
    (row,) = rows_of(make_windows([ask(text, "Is [SEP] or </s> or <think> meant?", "Paris")], tokenizer, 200))
    frame = tokenizer("a", "b")["input_ids"]
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | {tokenizer.convert_tokens_to_ids("<think>")}
    assert [i for i in row.input_ids if i in control] == [i for i in frame if i in control]
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
    (row,) = rows_of(make_windows([ask(context, answer=answer)], tokenizer()))
    assert quote(ask(context), row).strip() == answer


def test_overlong_question_is_cut_and_counted():
    conversations = [ask("A cat sat.", "why " * 70 + "?"), ask("A cat sat.", "why " * 64)]
    windows = make_windows(conversations, bert_tokenizer(), 128)
    assert windows.cut_questions == 1
    assert windows.cut.tolist() == [True, False]
    assert [row.input_ids.tolist() for row in rows_of(windows, 0)] == [
        row.input_ids.tolist() for row in rows_of(windows, 1)
    ]


def test_shortest_answer_is_trained():
    c = replace(ask("She lives in Paris, France."), answers=("in Paris", "Paris", "Paris, France"), starts=(10, 13, 13))
    (row,) = rows_of(make_windows([c], bert_tokenizer()))
    assert quote(c, row) == "Paris"


def test_saved_windows_load_equal(questions, tmp_path):
    windows = make_windows(questions, bert_tokenizer())
    windows.save(tmp_path / "w")
    assert_equal(Windows.load(tmp_path / "w"), windows)


def assert_equal(one: Windows, other: Windows) -> None:
    for field in dataclasses.fields(Windows):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_windows_without_any_passage_token_load_too(tmp_path):
    windows = make_windows([ask("\u200b")], bert_tokenizer())
    windows.save(tmp_path)
    assert Windows.load(tmp_path).row(0).input_ids.tolist() == windows.row(0).input_ids.tolist()


def test_second_start_takes_the_windows_of_the_first(questions, tmp_path, monkeypatch):
    fresh = load_windows(questions, bert_tokenizer(), tmp_path, *SETTINGS)
    assert_equal(fresh, make_windows(questions, bert_tokenizer(), *SETTINGS))
    monkeypatch.setattr(data.encode.qa_windows, "make_windows", None)
    assert_equal(load_windows(questions, bert_tokenizer(), tmp_path, *SETTINGS), fresh)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-40]), lambda path: path.write_bytes(b"")]
)
def test_damaged_windows_are_made_anew(damage, questions, tmp_path, capsys):
    fresh = load_windows(questions, bert_tokenizer(), tmp_path, *SETTINGS)
    wanted = {field.name: np.array(getattr(fresh, field.name)) for field in dataclasses.fields(fresh)}
    damage(next(tmp_path.glob("*/passage_ids.npy")))
    again = load_windows(questions, bert_tokenizer(), tmp_path, *SETTINGS)
    assert "is damaged" in capsys.readouterr().out
    assert all(np.array_equal(getattr(again, name), value) for name, value in wanted.items())


def test_whatever_changes_windows_changes_the_key(questions):
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
        (
            (67, 16, 64),
            "max_query_length 64 and 3 control tokens leave no room for a passage in max_seq_length 67; raise",
        ),
        ((384, 0, 64), "doc_stride 0 and max_query_length 64 must be 1 or more"),
        ((384, 128, 0), "doc_stride 128 and max_query_length 0 must be 1 or more"),
    ],
)
def test_impossible_settings_name_value_and_remedy(questions, settings, message):
    with pytest.raises(UserError, match=message):
        make_windows(questions, bert_tokenizer(), *settings)


def test_rows_that_are_not_squads_are_told():
    with pytest.raises(DataError, match=r"f: 1: row without question; .* SQuAD's format"):
        make_windows([ask("x", "")], bert_tokenizer())
    with pytest.raises(DataError, match="row without offsets of its answers"):
        make_windows([replace(ask("x"), answers=("x",))], bert_tokenizer())
    with pytest.raises(DataError, match="no question to make windows of"):
        make_windows([], bert_tokenizer())
    with pytest.raises(UserError, match=r"no token such as \[CLS\]"):
        make_windows([ask("x")], PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))))
