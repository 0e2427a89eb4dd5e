"""graft compare: every number equals the one that the samples give."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from data.readers.newsgroups import NEWSGROUPS
from eval.breakdown import question_word
from eval.compare import compare
from eval.metrics import normalize_label
from eval.stats import approximate_randomisation, brier, expected_calibration_error, mcnemar_exact
from tests.helpers.comparisons import SYSTEM, Row, answered, mean_interval, questions, samples, squad_runs, write


@pytest.fixture
def squad(tmp_path: Path) -> list[Path]:
    return squad_runs(tmp_path)


def percent(values: list[float], clusters: list[str]) -> Row:
    shown = sum(values) / len(values), *mean_interval(values, clusters)
    return {key: round(100 * value, 2) for key, value in zip(("score", "low", "high"), shown, strict=True)}


def same(cell: Row, wanted: Row) -> bool:
    """Equal up to the last digit, which may differ because sums are rounded in another order."""
    return cell == pytest.approx(wanted, abs=0.011)


def test_every_number_of_squad_comes_from_the_samples(squad: list[Path], tmp_path: Path):
    compare(squad, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    all_rows = [samples(folder) for folder in squad]
    clusters = [row["cluster"] for row in all_rows[0]]
    assert (report["questions"], report["clusters"]) == (120, 30)
    parts = {"total": lambda r: True, "HasAns": lambda r: r["gold"], "NoAns": lambda r: not r["gold"]}
    for system, rows in zip(report["systems"], all_rows, strict=True):
        for part, belongs in parts.items():
            chosen = [r for r in rows if belongs(r)]
            assert report["parts"][part] == len(chosen)
            for metric in ("exact", "f1"):
                wanted = percent([r[metric] for r in chosen], [r["cluster"] for r in chosen])
                assert same(system["scores"][part][metric], wanted)
        assert system["cost"] == {key: SYSTEM[key] for key in SYSTEM if key not in ("method", "seed", "recipe_sha256")} | {
            "questions_per_s": 12.5, "peak_memory_gib": 1.5, "latency_p50_ms": 10.5, "latency_p95_ms": 20.5,
        }  # fmt: skip
        assert system["calibration"] is system["classes"] is None
    names = [folder.name for folder in squad]
    assert len(report["pairs"]) == 6
    for metric in ("exact", "f1"):
        pairs = [pair for pair in report["pairs"] if pair["metric"] == metric]
        for pair in pairs:
            a, b = ([r[metric] for r in all_rows[names.index(pair[key])]] for key in ("a", "b"))
            assert same(pair["difference"], percent(np.subtract(a, b).tolist(), clusters))
            assert (pair["p"], pair["test"]) == (approximate_randomisation(a, b, clusters), "cluster randomisation")
            if metric == "exact":
                assert (pair["mcnemar_p"], pair["only_a"], pair["only_b"]) == mcnemar_exact(a, b)
        ranked = sorted(pairs, key=lambda pair: pair["p"])
        for rank, pair in enumerate(ranked):
            assert pair["p_holm"] == max(min(1, (3 - i) * ranked[i]["p"]) for i in range(rank + 1))
    assert sum(s["questions"] for s in report["slices"] if s["by"] == "question word") == 120
    for part in report["slices"]:
        for cells, rows in zip(part["systems"], all_rows, strict=True):
            kinds = [length(r) if part["by"] == "answer length" else question_word(r["question"]) for r in rows]
            chosen = [r for r, kind in zip(rows, kinds, strict=True) if kind == part["value"]]
            assert part["questions"] == len(chosen)
            for metric in ("exact", "f1"):
                assert same(cells[metric], percent([r[metric] for r in chosen], [r["cluster"] for r in chosen]))


def length(row: Row) -> str:
    words = len(row["gold"][0].split()) if row["gold"] else 0
    return next(name for name, most in (("0", 0), ("1", 1), ("2", 2), ("3-5", 5), ("6+", 99)) if words <= most)


def test_verdicts_say_who_wins_or_what_would_settle_it(squad: list[Path], tmp_path: Path):
    verdicts = {(p["a"], p["b"]): p for p in compare(squad, tmp_path / "out")["pairs"] if p["metric"] == "exact"}
    sure, unsure = verdicts["s0", "s1"], verdicts["s1", "s2"]
    sureness = "p < 0.001" if sure["p_holm"] < 0.001 else f"p = {sure['p_holm']:.3f}"
    assert sure["verdict"] == f"s1 beats s0 by {-sure['difference']['score']:.1f} points ({sureness} after Holm)"
    assert sure["p_holm"] < 0.05
    assert unsure["p_holm"] > 0.05
    assert unsure["verdict"].startswith("not significant (p = ")
    assert f"about {unsure['questions_to_settle'] - 120:,} more questions" in unsure["verdict"]


def test_every_number_of_a_classification_comes_from_the_samples(tmp_path: Path):
    rows = questions("newsgroups", 200)
    folders = []
    for i, right in enumerate((0.4, 0.8)):
        answers = answered("newsgroups", rows, right, i)
        rng = random.Random(i)
        if i:
            for row in answers:
                row["probability"] = rng.random()
        folders.append(write(tmp_path / f"s{i}", "newsgroups", answers))
    report = compare(folders, tmp_path / "out")
    labels = sorted(NEWSGROUPS[:5])
    assert report["labels"] == labels
    for system, folder in zip(report["systems"], folders, strict=True):
        rows = samples(folder)
        gold = [row["label"] for row in rows]
        predicted = [normalize_label(row["predicted"]) for row in rows]
        scores = system["scores"]["total"]
        macro = f1_score(gold, predicted, labels=labels, average="macro", zero_division=0)
        assert scores["macro_f1"]["score"] == round(100 * macro, 2)
        assert scores["macro_f1"]["low"] < 100 * macro < scores["macro_f1"]["high"]
        for metric in ("exact", "valid"):
            assert same(scores[metric], percent([r[metric] for r in rows], [r["cluster"] for r in rows]))
        columns = precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
        for i, row in enumerate(system["classes"]["table"]):
            assert [row[key] for key in ("precision", "recall", "f1")] == [round(100 * c[i], 2) for c in columns[:3]]
            assert row["questions"] == columns[3][i]
        known = [s if s in labels else "other" for s in predicted]
        assert system["classes"]["confusion"] == confusion_matrix(gold, known, labels=[*labels, "other"])[:5].tolist()
    calibration, rows = report["systems"][1]["calibration"], samples(folders[1])
    p, right = [r["probability"] for r in rows], [r["exact"] for r in rows]
    assert report["systems"][0]["calibration"] is None
    assert calibration["ece"] == round(expected_calibration_error(p, right), 4)
    assert calibration["brier"] == round(brier(p, right), 4)
    for i, row in enumerate(calibration["bins"]):
        inside = [r for r in rows if i / 10 < r["probability"] <= (i + 1) / 10]
        assert row["questions"] == len(inside)
        assert row["correct"] == round(float(np.mean([r["exact"] for r in inside])), 4)
    exact, macro_pair = report["pairs"]
    assert exact["test"] == "exact McNemar"
    assert exact["p"] == exact["p_holm"] == mcnemar_exact(*([r["exact"] for r in samples(f)] for f in folders))[0]
    assert macro_pair["metric"] == "macro_f1"
    assert macro_pair["p"] < 0.01
    page = (tmp_path / "out" / "report.html").read_text()
    for word in ("macro-F1", "no such label", "Brier score", "Ten bins"):
        assert word in page


def test_a_system_against_itself_is_certainly_no_better(squad: list[Path], tmp_path: Path):
    report = compare([squad[0], squad[0] / "eval"], tmp_path / "out")
    assert [s["name"] for s in report["systems"]] == ["s0", "s0 (2)"]
    assert [(p["p"], p["p_holm"], p["difference"]["score"]) for p in report["pairs"]] == [(1.0, 1.0, 0.0)] * 2
    assert report["examples"] == []
    assert report["pairs"][0]["verdict"].startswith("not significant (p = 1.000 after Holm): no difference")
    assert report["seeds"] == []  # one seed twice is no second seed


def test_seeds_of_a_recipe_are_summarized(tmp_path: Path):
    rows = questions("squad_v1")
    folders = [
        write(tmp_path / f"s{i}", "squad_v1", answered("squad_v1", rows, 0.5, i), system=SYSTEM | {"seed": i})
        for i in range(3)
    ]
    other = write(tmp_path / "other", "squad_v1", answered("squad_v1", rows, 0.5, 9), system=None, latency_ms=None)
    report = compare([*folders, other], tmp_path / "out")
    (group,) = report["seeds"]
    scores = [100 * np.mean([r["exact"] for r in samples(folder)]) for folder in folders]
    assert group["systems"] == ["s0", "s1", "s2"]
    assert group["exact"] == pytest.approx({"mean": np.mean(scores), "sd": np.std(scores, ddof=1)}, abs=0.01)
    unknown = [key for key, value in report["systems"][3]["cost"].items() if value is None]
    assert len(unknown) == 8  # known of it are questions_per_s and peak_memory_gib
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert "| other |" + " – |" * 8 + " 12.50 | 1.50 |" in lines


def test_examples_go_both_ways_and_are_the_same_each_time(squad: list[Path], tmp_path: Path):
    first, again = (compare(squad, tmp_path / out)["examples"] for out in ("one", "two"))
    assert first == again
    assert len(first) == 20
    pairs = [p for p in compare(squad, tmp_path / "one")["pairs"] if p["metric"] == "exact"]
    widest = max(pairs, key=lambda p: abs(p["difference"]["score"]))
    assert {(e["right"], e["wrong"]) for e in first} == {(widest["a"], widest["b"]), (widest["b"], widest["a"])}
    exact = {folder.name: {r["id"]: r["exact"] for r in samples(folder)} for folder in squad}
    assert all(exact[e["right"]][e["id"]] == 1 and exact[e["wrong"]][e["id"]] == 0 for e in first)


def test_a_long_prompt_is_cut_and_says_so(tmp_path: Path):
    rows = questions("newsgroups")
    folders = [
        write(tmp_path / f"s{i}", "newsgroups", answered("newsgroups", rows, 0.2 + 0.6 * i, i)) for i in range(2)
    ]
    example = compare(folders, tmp_path / "out")["examples"][0]
    assert (len(example["prompt_tail"]), example["characters_cut"]) == (600, 400)
    assert "(the first 400 characters are cut)" in (tmp_path / "out" / "report.html").read_text()
