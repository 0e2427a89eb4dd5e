"""The pass over the data: which rows are trained on, which are left out and why, and what stops a run."""

import json
from pathlib import Path

import pytest

from data.audit.examine import Rules, examine, read_held_out
from data.audit.split import chosen_contexts
from data.conversation import DataError, Ledger
from data.encode.chat import AUDITS
from data.encode.example_store import Examples
from data.readers.source import read_rows
from sft.recipe.schema import TrainSource
from tests.helpers.places import REAL_DATA, SAMPLES, needs_real

STRICT = dict.fromkeys(AUDITS, 0)


def rules(**changes) -> Rules:
    return Rules(**{"task": "instruct", "max_length": 512, "audit": STRICT} | changes)


def rows(path: Path, *items: tuple[str, str]) -> TrainSource:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in items))
    return TrainSource(path=str(path))


def report_of(tokenizer, folder: Path, *sources: TrainSource, held_out: TrainSource | None = None, **changes) -> dict:
    folder.mkdir(exist_ok=True)
    return examine(sources, held_out, tokenizer, rules(**changes), folder)


CAT = (
    "The small grey cat sat quietly on the warm windowsill and watched the birds in the old apple tree all morning long, "
    "and when the baker came by with his cart she jumped down, crossed the yard, and asked for her share of the milk."
)


def test_every_row_is_counted(tmp_path, tokenizer):
    source = rows(tmp_path / "a.jsonl", ("one", "1"), ("two", "2"), ("one", "1"), ("word " * 600, "3"), ("three", " "))
    with open(source.path, "a") as file:
        file.write("{broken\n")
    report = report_of(tokenizer, tmp_path / "x", source, on_error="skip", too_long="skip", duplicates="remove")
    totals = report.totals
    assert (totals.rows_read, totals.examples, totals.left_out, totals.defects) == (6, 2, 2, 2)
    assert sum(report.sources[0].left_out.values()) == 2
    assert not report.stops
    assert [e.where for e in Examples(tmp_path / "x")] == [f"{source.path}:1", f"{source.path}:2"]


def test_defects_stop_the_run_grouped_counted_and_with_the_remedy(tmp_path, tokenizer):
    source = rows(tmp_path / "a.jsonl", *[("q", "")] * 7, ("q", "a"))
    (stop,) = report_of(tokenizer, tmp_path / "x", source).stops
    assert stop.startswith(f"{source.path}:1: completion: empty text")
    assert "7 such rows, also" in stop
    assert f"{source.path}:5 ..." in stop
    assert "data.on_error: skip" in stop


def test_findings_are_in_the_order_of_rows_though_rows_are_read_ahead(tmp_path, tokenizer):
    source = rows(
        tmp_path / "t.jsonl", ("q", "a"), ("q", "word " * 600), ("a\ufffdb", "a"), ("q", " "), ("<|im_end|>", "a")
    )
    with open(source.path, "a") as file:
        file.write("not json\n")
    report = report_of(tokenizer, tmp_path / "x", source, near_duplicates="remove")
    lines = [texts[0].split(":")[1] for texts in report.sources[0].named.values()]
    assert lines == ["2", "3", "4", "5", "6"]


def test_row_whose_answer_would_be_cut_stops_the_run_unless_allowed_or_skipped(tmp_path, tokenizer):
    source = rows(tmp_path / "a.jsonl", ("word " * 600, "cut"), ("short", "kept"))
    (stop,) = report_of(tokenizer, tmp_path / "x", source).stops
    assert "data.max_length 512 would cut" in stop
    for changes in ({"too_long": "skip"}, {"audit": STRICT | {"truncated": 1}}):
        report = report_of(tokenizer, tmp_path / "x", source, **changes)
        assert not report.stops
        assert report.sources[0].left_out == {AUDITS["truncated"]: 1}
        histogram = report.lengths["example"]
        assert (sum(histogram["counts"]), histogram["max"] > 512) == (2, True)


def test_template_that_never_ends_a_turn_stops_the_run_for_every_row(tmp_path, tokenizer):
    import copy

    endless = copy.deepcopy(tokenizer)
    endless.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    source = rows(tmp_path / "a.jsonl", ("q", "a"), ("r", "b"))
    report = report_of(endless, tmp_path / "x", source)
    assert report.sources[0].left_out == {AUDITS["end_not_trained"]: 2}
    assert "(2 such rows, also" in report.stops[0]
    allowed = report_of(endless, tmp_path / "x", source, audit=STRICT | {"end_not_trained": 2})
    assert allowed.stops[0].startswith("no row of 2 ")


def test_leaks_are_found_by_row_by_text_and_by_similarity(tmp_path, tokenizer):
    held_out = rows(tmp_path / "dev.jsonl", ("What is two and two?", "four"), (CAT, "cat"))
    source = rows(
        tmp_path / "train.jsonl",
        ("what is  TWO and two?", "four"),
        ("What is two and two?", "4"),
        (CAT.replace("quietly", "silently"), "a cat"),
        ("Something else entirely", "yes"),
    )
    report = report_of(tokenizer, tmp_path / "x", source, held_out=held_out)
    leaks = report.leaks
    assert (leaks.rows, leaks.exact, leaks.context, leaks.near, leaks.removed) == (3, 1, 1, 1, 0)
    assert leaks.pairs[2]["held_out"] == f"{held_out.path}:2"
    assert not report.stops
    (stop,) = report_of(tokenizer, tmp_path / "x", source, held_out=held_out, max_leaks=2).stops
    assert "(3 such rows, data.audit.leaks allows 2)" in stop
    removed = report_of(tokenizer, tmp_path / "x", source, held_out=held_out, max_leaks=0, leaks="remove")
    assert not removed.stops
    assert (removed.totals.examples, removed.leaks.removed) == (1, 3)


def test_duplicates_are_counted_and_removed_only_if_the_recipe_says_so(tmp_path, tokenizer):
    near = CAT.replace("quietly", "silently")
    source = rows(tmp_path / "a.jsonl", ("q", "a"), ("Q ", "a"), (CAT, "x"), (near, "y"), (near, "z"))
    report = report_of(tokenizer, tmp_path / "x", source)
    assert (report.duplicates.exact_rows, report.duplicates.near_rows, report.totals.examples) == (1, 2, 5)
    removed = report_of(tokenizer, tmp_path / "x", source, duplicates="remove", near_duplicates="remove")
    assert (removed.duplicates.removed, removed.totals.examples) == (3, 2)


def test_a_row_that_is_left_out_does_not_make_its_near_copy_a_duplicate(tmp_path, tokenizer):
    too_long = CAT + " word" * 600
    source = rows(tmp_path / "a.jsonl", (too_long, "x"), (CAT, "x"))
    report = report_of(tokenizer, tmp_path / "x", source, too_long="skip", near_duplicates="remove")
    assert [e.where for e in Examples(tmp_path / "x")] == [f"{source.path}:2"]
    assert report.duplicates.near_rows == 0


def test_a_shared_system_prompt_makes_no_duplicates(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    turns = [
        [{"role": "system", "content": CAT}, {"role": "user", "content": q}, {"role": "assistant", "content": "a"}]
        for q in ("Where is Paris?", "Who wrote Emma?", "What is rust?")
    ]
    path.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    assert report_of(tokenizer, tmp_path / "x", TrainSource(path=str(path))).duplicates.near_rows == 0


def test_empty_posts_stay_and_are_no_duplicates_or_leaks(tmp_path, tokenizer):
    def posts(name: str, label: str) -> TrainSource:
        row = {"label": label, "text": "From: a\nSubject: b\n\n> only a quote\n"}
        (tmp_path / name).write_text(2 * (json.dumps(row) + "\n"))
        return TrainSource(path=str(tmp_path / name))

    report = report_of(
        tokenizer, tmp_path / "x", posts("a.jsonl", "sci.med"), held_out=posts("b.jsonl", "sci.med"),
        duplicates="remove", leaks="remove",
    )  # fmt: skip
    assert (report.totals.examples, report.leaks.rows, report.duplicates.exact_rows) == (2, 0, 0)
    assert [n for note, n in report.sources[0].notes.items() if "empty" in note] == [2]


def test_file_that_breaks_off_stops_the_run_even_if_defects_are_skipped(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(
        '[{"prompt": "p", "completion": "c"}, {"prompt": "q" "completion": "d"}, {"prompt": "r", "completion": "e"}]'
    )
    report = report_of(tokenizer, tmp_path / "x", TrainSource(path=str(path)), on_error="skip")
    assert report.stops[0].startswith(str(path))


def test_held_out_rows_that_are_too_long_get_a_note(tmp_path, tokenizer):
    held_out = rows(tmp_path / "dev.jsonl", ("word " * 600, "x"), ("q", "a"))
    report = report_of(tokenizer, tmp_path / "x", rows(tmp_path / "a.jsonl", ("p", "c")), held_out=held_out)
    assert not report.stops
    assert sum(report.held_out.notes.values()) == 1


def test_held_out_share_keeps_passages_whole_and_out_of_training(tmp_path, tokenizer):
    source = TrainSource(path=str(SAMPLES / "squad_train.json"))
    with_share = rules(task="squad_v2", held_out_share=0.25)
    (tmp_path / "x").mkdir()
    report = examine([source], None, tokenizer, with_share, tmp_path / "x")
    held_out = list(read_held_out([source], with_share))
    assert 0 < len(held_out) < 288
    assert len(held_out) + report.totals.examples == 288
    assert report.totals.not_chosen == len(held_out)
    trained = {e.where for e in Examples(tmp_path / "x")}
    assert not trained & {c.where for c in held_out}
    assert len({c.context for c in held_out}) * 6 == len(held_out)
    assert report.leaks.rows == 0


def test_threads_of_posts_stay_on_one_side(tokenizer):
    source = TrainSource(path=str(SAMPLES / "newsgroups.jsonl"))
    held_out = list(read_held_out([source], rules(task="newsgroups", held_out_share=0.3)))
    groups = {c.cluster for c in held_out}
    assert groups
    conversations = list(read_rows(source, "newsgroups", Ledger("")))
    assert sum(c.cluster in groups for c in conversations) == len(held_out)


def test_sources_of_several_formats_mix_with_weights(tmp_path, tokenizer):
    sources = [
        TrainSource(path=str(SAMPLES / "squad_dev.json")),
        TrainSource(path=str(SAMPLES / "newsgroups.jsonl"), weight=0.5),
        TrainSource(path=str(SAMPLES / "instructions.jsonl"), weight=2, columns={"input": "context", "output": "response"}),
    ]  # fmt: skip
    report = report_of(tokenizer, tmp_path / "x", *sources, too_long="skip")
    assert [s.format for s in report.sources] == ["squad_v2", "newsgroups", "alpaca"]
    assert len(report.labels) == 20
    examples = Examples(tmp_path / "x")
    assert len(examples) == report.totals.examples
    assert set(examples.weights) == {1.0, 0.5, 2.0}


def test_report_shows_examples_with_their_trained_part(tmp_path, tokenizer):
    report = report_of(tokenizer, tmp_path / "x", rows(tmp_path / "a.jsonl", ("Name a colour.", "Blue <|im_end|> sky")))
    (example,) = report.examples
    assert "".join(text for text, trained, _ in example["tokens"] if trained) == "Blue <|im_end|> sky<|im_end|>"
    assert [text for text, trained, special in example["tokens"] if trained and special] == ["<|im_end|>"]
    assert sum(report.sources[0].notes.values()) == 1  # about the marker in the answer


def test_tokens_are_counted_before_training(tmp_path, tokenizer):
    report = report_of(tokenizer, tmp_path / "x", TrainSource(path=str(SAMPLES / "squad_dev.json")), task="squad_v2")
    totals = report.totals
    examples = list(Examples(tmp_path / "x"))
    assert totals.tokens == sum(len(e.ids) for e in examples)
    assert totals.trained_tokens == sum(sum(e.loss_mask) for e in examples)
    assert totals.contexts == 16


def test_contexts_are_drawn_by_seed():
    contexts = {f"c{i}": (6, 2) for i in range(16)}
    drawn = chosen_contexts(contexts, 5, seed=1)
    assert len(drawn) == 5
    assert drawn == chosen_contexts(contexts, 5, seed=1)
    assert drawn != chosen_contexts(contexts, 5, seed=2)
    assert chosen_contexts(contexts, 99, seed=1) == set(contexts)


def test_drawn_questions_have_the_wanted_share_of_unanswerable_ones():
    contexts = {f"c{i}": (6, 2 if i % 2 else 0) for i in range(16)}
    for share in (0.0, 0.15, 0.3):
        drawn = chosen_contexts(contexts, 8, seed=0, unanswerable_share=share)
        assert len(drawn) == 8
        assert sum(contexts[c][1] for c in drawn) / 48 == pytest.approx(share, abs=0.04)
    with pytest.raises(DataError, match=r"unanswerable_share 0\.9: the nearest that 8 contexts allow is 0\.33"):
        chosen_contexts(contexts, 8, seed=0, unanswerable_share=0.9)


@needs_real("squad_v2/dev.json.gz")
def test_planted_dev_passages_are_found_in_train_under_other_questions(tmp_path, tokenizer):
    import gzip

    def articles(name: str) -> list[dict]:
        return json.loads(gzip.decompress((REAL_DATA / "squad_v2" / name).read_bytes()))["data"]

    def save(name: str, paragraphs: list[dict]) -> TrainSource:
        (tmp_path / name).write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}))
        return TrainSource(path=str(tmp_path / name))

    dev = [p for a in articles("dev.json.gz") for p in a["paragraphs"]][:200]
    train = [p for a in articles("train.json.gz")[5:9] for p in a["paragraphs"]]
    planted = [
        {"context": p["context"], "qas": [q | {"id": f"planted-{i}", "question": f"Tell me: {q['question']}"} for q in p["qas"][:1]]}
        for i, p in enumerate(dev[::4])
    ]  # fmt: skip
    assert len(planted) == 50
    clean, dirty = save("clean.json", train), save("dirty.json", train + planted)
    arguments = {"held_out": save("dev.json", dev), "task": "squad_v2", "too_long": "skip"}
    assert report_of(tokenizer, tmp_path / "x", clean, **arguments).leaks.rows == 0
    leaks = report_of(tokenizer, tmp_path / "y", dirty, **arguments).leaks
    assert leaks.context == 50
    assert all("planted" in pair["where"] for pair in leaks.pairs)
