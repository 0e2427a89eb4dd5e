"""Ways to ask a system: few-shot, by likelihood of labels, with a no-answer threshold."""

import json
from pathlib import Path

import pytest

from data.errors import UserError
from data.readers.squad import UNANSWERABLE
from eval.answer_log import NAME
from eval.predict import generate
from eval.prediction import Prediction
from sft.recipe.load import load_recipe
from sft.scoring.answerers import AnswerOptions, training_questions
from sft.scoring.evaluate import evaluate
from sft.training.finetune import finetune
from tests.helpers.builders import write_recipe
from tests.helpers.places import SAMPLES

pytestmark = pytest.mark.heavy


def run_of(base: Path, folder: Path, **changes: str) -> Path:
    path = write_recipe(folder / "recipe.yaml", base, **changes)
    run = finetune(load_recipe(path, ["train.max_steps=1", "train.save_strategy=no"]), path)
    assert run is not None
    return run


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def squad_run(tiny, tmp_path_factory):
    return run_of(tiny, tmp_path_factory.mktemp("squad"))


@pytest.fixture(scope="module")
def news_run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("news")
    return run_of(
        tiny, folder, task="newsgroups", data=f"{{train: {SAMPLES / 'newsgroups.jsonl'}, max_length: 2048, max_contexts: 8}}",
        eval="{share: 0.2, limit: 6, max_new_tokens: 3}",
    )  # fmt: skip


def test_labels_by_likelihood_are_always_valid_and_have_probabilities(news_run, tmp_path):
    results = evaluate(str(news_run), tmp_path / "a", options=AnswerOptions(labels=True))
    assert results["scorer"] == "labels"
    assert results["scores"]["total"]["valid"] == 100
    assert all(0 < row["probability"] <= 1 for row in rows_of(tmp_path / "a"))
    cost = results["system"]
    assert cost["trainable_parameters"] < cost["parameters"]
    assert cost["train_cpu_seconds"] > 0


def test_untuned_base_costs_no_training(news_run, tmp_path):
    results = evaluate(str(news_run), tmp_path / "a", base=True)
    assert results["name"].endswith("base zero-shot")
    assert results["system"]["train_seconds"] == results["system"]["trainable_parameters"] == 0


def test_shots_come_before_each_question_and_change_nothing_else(news_run, tmp_path):
    plain = evaluate(str(news_run), tmp_path / "a")
    shots = evaluate(str(news_run), tmp_path / "b", options=AnswerOptions(shots=2))
    assert shots["name"] == f"{plain['name']} 2-shot"
    assert shots["evaluation_sha256"] == plain["evaluation_sha256"]
    assert [row["id"] for row in rows_of(tmp_path / "a")] == [row["id"] for row in rows_of(tmp_path / "b")]


@pytest.mark.slow
def test_interrupted_evaluation_resumes_from_its_answers(news_run, tmp_path, monkeypatch, capsys):
    evaluate(str(news_run), tmp_path / "whole")

    def two_answers(*arguments):
        *others, note = arguments

        def note_and_stop(number: int, answer: Prediction) -> None:
            note(number, answer)
            if len((tmp_path / "a" / NAME).read_text().splitlines()) == 3:  # the first line identifies the questions
                raise KeyboardInterrupt

        return generate(*others, note_and_stop)

    with monkeypatch.context() as patch:
        patch.setattr("sft.scoring.answerers.generate", two_answers)
        with pytest.raises(KeyboardInterrupt):
            evaluate(str(news_run), tmp_path / "a")
    assert not (tmp_path / "a" / "results.json").exists()
    evaluate(str(news_run), tmp_path / "a")
    assert "2 answers are read" in capsys.readouterr().err
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "whole")
    assert not (tmp_path / "a" / NAME).exists()
    (tmp_path / "a" / NAME).write_text("[1]\n\0\n")
    evaluate(str(news_run), tmp_path / "a")
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "whole")


def test_threshold_comes_from_training_questions(squad_run, tmp_path, capsys):
    evaluate(str(squad_run), tmp_path / "a", options=AnswerOptions(threshold_from=8))
    assert "on 8 training questions" in capsys.readouterr().out
    # a random model gives no right quote, and a quarter of the questions have no answer: never answering is best
    assert {row["predicted"] for row in rows_of(tmp_path / "a")} <= {UNANSWERABLE, ""}


def test_training_questions_leave_out_scored_ones(questions, tmp_path, tiny):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["data.train=data/samples/squad_dev.json", "eval={}"])
    scored = questions[:7]
    known = training_questions(recipe, scored)
    assert 0 < len(known) < len(questions)
    assert not {c.cluster for c in known} & {c.cluster for c in scored}
    with pytest.raises(UserError, match="--shots, --threshold-from: .* also scored"):
        training_questions(recipe, questions)


def test_training_questions_follow_the_recipe_past_rows_with_defects(tmp_path, tiny, capsys):
    data = tmp_path / "posts.jsonl"
    data.write_text('{"label": "sci.med", "text": "A cure."}\n{"label": "sci.med"}\n')
    sections = {"task": "newsgroups", "data": f"{{train: '{data}', on_error: skip}}", "eval": "{share: 0.5}"}
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny, **sections))
    assert [c.label for c in training_questions(recipe, [])] == ["sci.med"]
    assert f"1 rows of {data} have defects" in capsys.readouterr().out
    with pytest.raises(UserError, match="posts.jsonl:2: text: missing"):
        training_questions(recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_error": "stop"})}), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (AnswerOptions(labels=True), "--labels: task squad_v2 has no labels"),
        (AnswerOptions(shots=10_000), "shots"),
        (AnswerOptions(shots=2, threshold_from=8), "--threshold-from, --shots: .* keep one"),
    ],
)
def test_options_that_do_not_suit_the_task_are_refused(options, message, squad_run, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate(str(squad_run), tmp_path / "a", options=options)
