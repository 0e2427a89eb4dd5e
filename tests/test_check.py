"""The account of the data: which rows are trained, which are left out, and why."""

import dataclasses

import pytest

from data.chat import DataError
from data.check import data_report, draw_contexts, encode_all


def test_defects_stop_the_run_named_and_counted(questions, tokenizer):
    with pytest.raises(
        DataError, match=r"max_length 64 .*; 7 more rows have defects: .*squad_dev\.json, .* \.\.\."
    ) as caught:
        encode_all(questions[:8], tokenizer, max_length=64)
    assert "\n" not in str(caught.value)


def test_rows_that_are_too_long_are_left_out_only_where_asked_and_then_named(questions, tokenizer):
    long = dataclasses.replace(
        questions[0],
        messages=({"role": "user", "content": "word " * 900}, questions[0].messages[-1]),
        where="f.jsonl:9",
    )
    examples, left_out = encode_all([*questions[:5], long], tokenizer, 512, too_long="skip")
    assert len(examples) == 5
    assert left_out[0].startswith("f.jsonl:9: ")
    report = data_report(6, examples, left_out, examples_per_step=4, seed=0)
    assert (report["rows_read"], report["examples"], report["rows_left_out"]) == (6, 5, 1)


def test_other_defects_stop_the_run_even_where_long_rows_are_skipped(questions, tokenizer):
    empty = dataclasses.replace(
        questions[0], messages=(*questions[0].prompt, {"role": "assistant", "content": " "}), where="f.jsonl:3"
    )
    with pytest.raises(DataError, match=r"f\.jsonl:3: the answer is empty"):
        encode_all([*questions[:5], empty], tokenizer, 512, too_long="skip")


def test_report_counts_what_sharing_saves(questions, tokenizer):
    examples, _ = encode_all(questions, tokenizer, 512)
    report = data_report(len(questions), examples, [], examples_per_step=12, seed=0)
    assert report["tokens"] == sum(len(e.ids) for e in examples)
    assert report["trained_tokens"] == sum(sum(e.loss_mask) for e in examples)
    assert report["contexts"] == 16
    assert report["flat_tokens_per_executed_token"] > 3


def test_contexts_are_drawn_whole_by_seed(questions):
    drawn = draw_contexts(questions, 5, seed=1)
    assert len({q.context for q in drawn}) == 5
    assert len(drawn) == 30
    assert drawn == draw_contexts(questions, 5, seed=1)
    assert drawn != draw_contexts(questions, 5, seed=2)
    assert draw_contexts(questions, None, seed=1) == questions


def test_drawn_questions_have_the_wanted_share_of_unanswerable_ones(questions):
    # a third of each sample passage is unanswerable; take it from half of them
    half = {q.context for q in questions[:48]}
    rows = [q for q in questions if q.answers or q.context in half]
    for share in (0.0, 0.15, 0.3):
        drawn = draw_contexts(rows, 8, seed=0, unanswerable_share=share)
        assert len({q.context for q in drawn}) == 8
        assert sum(not q.answers for q in drawn) / len(drawn) == pytest.approx(share, abs=0.04)
    with pytest.raises(DataError, match=r"unanswerable_share 0\.9: the nearest that 8 contexts allow is 0\.33"):
        draw_contexts(rows, 8, seed=0, unanswerable_share=0.9)
