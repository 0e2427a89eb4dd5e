"""`eval.metrics` of a recipe reaches results, comparison and model card; mistakes in it are named before a run."""

import json
import re
from pathlib import Path

import pytest

from data.errors import UserError
from eval.compare import CompareError, compare
from sft.recipe.load import load_recipe
from sft.runs.model_card import export_card
from sft.scoring.evaluate import evaluate, print_scores
from tests.helpers.builders import write_recipe
from tests.helpers.fake_server import completion, serving
from tests.helpers.pages import Page

METRICS = ["rouge_l", "number", "json", "json_equal", "regex"]
PATTERN = r"####\s*(\d+)"
TITLES = ["EM", "F1", "ROUGE-L", "number", "valid JSON", "equal JSON", "regex"]


def instruct_recipe(folder: Path, name: str, **settings: object) -> Path:
    """A run folder that holds a recipe only, for the questions of a server."""
    data = folder / "sums.jsonl"
    rows = [{"prompt": f"{i} and 1 make?", "completion": f"They make {i + 1}.\n#### {i + 1}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = folder / "train.jsonl"
    train.write_text(json.dumps({"prompt": "Hello", "completion": "Good day"}) + "\n")
    run = folder / name
    run.mkdir()
    evaluation = json.dumps({"data": str(data), **settings})
    return write_recipe(
        run / "recipe.yaml", "owner/name", task="instruct", data=f"{{train: {train}}}", eval=evaluation
    ).parent


def answer(wrong: int):
    """Every question right but each `wrong`-th one."""

    def reply(request):
        i = int(re.match(r"\d+", request["messages"][-1]["content"])[0])
        return completion(f"So it is\n#### {i + 1 if i % wrong else 0}")

    return reply


def evaluated(run: Path, wrong: int, **options: str) -> dict:
    with serving(answer(wrong), "served") as url:
        return evaluate(url, run / "eval", run=run, **options)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    runs = [instruct_recipe(tmp_path, name, metrics=METRICS, pattern=PATTERN) for name in ("good", "bad")]
    for run, wrong in zip(runs, (20, 3), strict=True):
        evaluated(run, wrong)
    return runs


def test_results_hold_the_chosen_metrics_with_intervals(runs: list[Path], capsys):
    results = json.loads((runs[0] / "eval" / "results.json").read_text())
    total = results["scores"]["total"]
    assert total["number"] == total["regex"] == 95.0
    assert total["json"] == total["json_equal"] == total["exact"] == 0.0
    assert 20 < total["rouge_l"] < 30
    assert all(len(total[f"{name}_95"]) == 2 for name in ("exact", "f1", *METRICS))
    rows = [json.loads(line) for line in (runs[0] / "eval" / "samples.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [float(i % 20 > 0) for i in range(40)]
    print_scores(results)
    printed = " ".join(capsys.readouterr().out.split())
    assert all(title in printed for title in TITLES)


def test_comparison_shows_and_tests_every_metric(runs: list[Path], tmp_path: Path):
    report = compare(runs, tmp_path / "out")
    assert report["metrics"] == ["exact", "f1", *METRICS]
    (pair,) = [pair for pair in report["pairs"] if pair["metric"] == "number"]
    assert pair["difference"]["score"] == pytest.approx(95 - 65)
    assert pair["p_holm"] < 0.05
    assert {pair["metric"] for pair in report["pairs"]} == {"exact", "f1", *METRICS}
    html, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert Page(html)
    for title in TITLES:
        assert title in html
        assert title in text


def test_only_shared_metrics_are_compared(runs: list[Path], tmp_path: Path):
    evaluated(runs[1], 3, metrics="rouge_l,f1")
    assert compare(runs, tmp_path / "out")["metrics"] == ["exact", "f1", "rouge_l"]


def test_other_patterns_and_changed_samples_are_not_compared(runs: list[Path], tmp_path: Path):
    file = runs[1] / "eval" / "results.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"pattern": "x"}))
    with pytest.raises(CompareError, match="pattern"):
        compare(runs, tmp_path / "out")
    results["scores"]["total"]["json"] = 50.0
    file.write_text(json.dumps(results))
    with pytest.raises(CompareError, match=r"scores\.total\.json is 50"):
        compare(runs, tmp_path / "out")


def test_model_card_shows_every_metric(runs: list[Path], tmp_path: Path):
    (runs[0] / "manifest.json").write_text(json.dumps({"data_sha256": {}}))
    recipe = load_recipe(runs[0] / "recipe.yaml", check_files=False)
    card = export_card(runs[0], recipe, tmp_path, {"measured": False, "base": "original", "dtype": "float32"})
    assert re.search(r"number 95\.0.*regex 95\.0", card)


def test_command_line_chooses_instead_of_the_recipe(runs: list[Path]):
    total = evaluated(runs[0], 20, metrics="regex,number")["scores"]["total"]
    assert "rouge_l" not in total
    assert total["regex"] == 95.0


@pytest.mark.parametrize(
    ("metrics", "options", "named"),
    [
        ("rogue_l", {}, "rouge_l"),
        ("bleu", {}, "chrf"),
        ("regex", {"recipe": {"metrics": []}}, "eval.pattern"),
        ("number", {"task": "squad_v2"}, "task instruct"),
    ],
)
def test_mistakes_on_the_command_line_are_named(metrics, options, named, tmp_path: Path):
    run = instruct_recipe(tmp_path, "run", **options.pop("recipe", {}))
    data = {"data": "data/samples/squad_dev.json"} if "task" in options else {}
    with pytest.raises(UserError, match=named):
        evaluated(run, 3, metrics=metrics, **options, **data)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["eval.metrics=[bleu]"], ("eval.metrics[0]", "bleu", "rouge_l", "chrf", "number", "json", "regex")),
        (["eval.metrics=[regex]"], ("eval.pattern",)),
        (["eval.pattern=x"], ("eval.metrics",)),
        (["eval.metrics=[regex]", "eval.pattern='(x'"], ("eval.pattern", "(x")),
        (["task=squad_v2", "eval.metrics=[number]"], ("eval.metrics", "squad_v2", "instruct")),
        (["eval.metrics=number"], ("eval.metrics",)),
    ],
)
def test_mistakes_in_the_recipe_are_named(changes, named, tmp_path: Path):
    run = instruct_recipe(tmp_path, "run")
    with pytest.raises(UserError) as error:
        load_recipe(run / "recipe.yaml", changes, check_files=False)
    assert all(name in str(error.value) for name in named)
