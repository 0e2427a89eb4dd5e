"""graft compare: every number again from the samples, what it refuses, and that data can't become markup."""

import json
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support
from test_report import Page

from data.newsgroups import NEWSGROUPS
from eval.compare import CompareError, compare
from eval.compare_plots import _question_word
from eval.metrics import label_scores, normalize_label, squad_scores
from eval.stats import brier, cluster_interval, expected_calibration_error, mcnemar_exact, paired_cluster_bootstrap

Row = dict[str, Any]
SYSTEM = {
    "method": "lora", "parameters": 134_515_008, "trainable_parameters": 4_884_480, "train_seconds": 630.5,
    "train_cpu_seconds": 1201.5, "train_peak_memory_gib": 3.25, "disk_mib": 19.5, "seed": 1, "recipe_sha256": "cd" * 32,
}  # fmt: skip


def questions(task: str, n: int = 120) -> list[Row]:
    rng = random.Random(1)
    rows = []
    for i in range(n):
        if task == "newsgroups":
            label = rng.choice(NEWSGROUPS[:5])
            rows.append(
                {
                    "id": f"p{i}",
                    "cluster": f"t{i}",
                    "prompt": "post " * 200,
                    "question": "",
                    "label": label,
                    "gold": [label],
                }
            )
        else:
            gold = (
                [] if i % 3 == 0 else [" ".join(["red", "old", "town", "hall", "tower", "clock", "face"][: 1 + i % 7])]
            )
            question = f"{rng.choice(['Who', 'In which year', 'How', 'Name'])} {i}?"
            rows.append(
                {
                    "id": f"q{i}",
                    "cluster": f"c{i // 4}",
                    "prompt": f"text\n\n{question}",
                    "question": question,
                    "label": "",
                    "gold": gold,
                }
            )
    return rows


def answered(task: str, rows: list[Row], right: float, seed: int) -> list[Row]:
    rng, out = random.Random(seed), []
    for row in rows:
        good = row["gold"][0] if row["gold"] else "unanswerable"
        if task == "newsgroups":
            predicted = good if rng.random() < right else rng.choice([*NEWSGROUPS[:7], "no idea"])
            scores = label_scores(NEWSGROUPS, row["gold"], predicted)
        else:
            predicted = good if rng.random() < right else rng.choice(["red", "a lamp", "unanswerable"])
            scores = squad_scores(row["gold"], predicted)
        out.append({**row, "predicted": predicted, "finished": True, "asked": True, "probability": None, **scores})
    return out


def write(folder: Path, task: str, rows: list[Row], **changed: Any) -> Path:
    """A run whose eval/ holds what `graft eval` writes."""
    parts = {"total": rows}
    if task == "squad_v2":
        parts |= {"HasAns": [r for r in rows if r["gold"]], "NoAns": [r for r in rows if not r["gold"]]}
    second = "valid" if task == "newsgroups" else "f1"
    scores = {
        part: {"questions": len(of), **{m: round(100 * sum(r[m] for r in of) / len(of), 2) for m in ("exact", second)}}
        for part, of in parts.items()
    }
    results = {
        "target": str(folder), "name": folder.name, "task": task, "task_version": 1, "data": "dev.json",
        "evaluation_sha256": "ab" * 32, "scorer": "", "questions": len(rows), "contexts": 1, "cut_at_max_new_tokens": 0,
        "too_long_for_model": 0, "scores": scores, "seconds": 9.5, "questions_per_s": 12.5, "peak_memory_gib": 1.5,
        "latency_ms": {"p50": 10.5, "p95": 20.5, "n": len(rows)}, "system": SYSTEM, **changed,
    }  # fmt: skip
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "results.json").write_text(json.dumps(results, indent=2))
    (folder / "eval" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def samples(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "eval" / "samples.jsonl").read_text().splitlines()]


def edit(folder: Path, change: Callable[[Row], Any]) -> None:
    file = folder / "eval" / "results.json"
    results = json.loads(file.read_text())
    change(results)
    file.write_text(json.dumps(results))


@pytest.fixture
def squad(tmp_path: Path) -> list[Path]:
    rows = questions("squad_v2")
    return [
        write(tmp_path / f"s{i}", "squad_v2", answered("squad_v2", rows, right, i))
        for i, right in enumerate((0.3, 0.7, 0.72))
    ]


def percent(values: list[float], clusters: list[str]) -> Row:
    low, high = cluster_interval(values, clusters)
    return {
        "score": round(100 * sum(values) / len(values), 2),
        "low": round(100 * low, 2),
        "high": round(100 * high, 2),
    }


def same(found: Row, wanted: Row) -> bool:
    """Equal but for the last digit, where sums of another order are rounded."""
    return found == pytest.approx(wanted, abs=0.011)


def test_every_number_of_squad_comes_from_the_samples(squad: list[Path], tmp_path: Path):
    compare(squad, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    all_rows = [samples(folder) for folder in squad]
    clusters = [row["cluster"] for row in all_rows[0]]
    assert (report["questions"], report["clusters"]) == (120, 30)
    parts = {"total": lambda r: True, "HasAns": lambda r: r["gold"], "NoAns": lambda r: not r["gold"]}
    for system, rows in zip(report["systems"], all_rows, strict=True):
        for part, held in parts.items():
            of = [r for r in rows if held(r)]
            assert report["parts"][part] == len(of)
            for metric in ("exact", "f1"):
                assert same(
                    system["scores"][part][metric], percent([r[metric] for r in of], [r["cluster"] for r in of])
                )
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
            difference, low, high, p = paired_cluster_bootstrap(a, b, clusters)
            assert same(pair["difference"], {"score": 100 * difference, "low": 100 * low, "high": 100 * high})
            assert (pair["p"], pair["test"]) == (p, "cluster randomisation")
            if metric == "exact":
                assert (pair["mcnemar_p"], pair["only_a"], pair["only_b"]) == mcnemar_exact(a, b)
        ranked = sorted(pairs, key=lambda pair: pair["p"])
        for rank, pair in enumerate(ranked):
            assert pair["p_holm"] == max(min(1, (3 - i) * ranked[i]["p"]) for i in range(rank + 1))
    assert sum(s["questions"] for s in report["slices"] if s["by"] == "question word") == 120
    for part in report["slices"]:
        for cells, rows in zip(part["systems"], all_rows, strict=True):
            of = [
                r
                for r in rows
                if part["value"] == (length(r) if part["by"] == "answer length" else _question_word(r["question"]))
            ]
            assert part["questions"] == len(of)
            for metric in ("exact", "f1"):
                assert same(cells[metric], percent([r[metric] for r in of], [r["cluster"] for r in of]))


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
    assert f"about {unsure['questions_to_settle'] - 120:,} more questions would settle it" in unsure["verdict"]


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
        said = [normalize_label(row["predicted"]) for row in rows]
        scores = system["scores"]["total"]
        macro = f1_score(gold, said, labels=labels, average="macro", zero_division=0)
        assert scores["macro_f1"]["score"] == round(100 * macro, 2)
        assert scores["macro_f1"]["low"] < 100 * macro < scores["macro_f1"]["high"]
        for metric in ("exact", "valid"):
            assert same(scores[metric], percent([r[metric] for r in rows], [r["cluster"] for r in rows]))
        columns = precision_recall_fscore_support(gold, said, labels=labels, zero_division=0)
        for i, row in enumerate(system["classes"]["table"]):
            assert [row[key] for key in ("precision", "recall", "f1")] == [round(100 * c[i], 2) for c in columns[:3]]
            assert row["questions"] == columns[3][i]
        known = [s if s in labels else "other" for s in said]
        assert system["classes"]["confusion"] == confusion_matrix(gold, known, labels=[*labels, "other"])[:5].tolist()
    calibration, rows = report["systems"][1]["calibration"], samples(folders[1])
    p, right = [r["probability"] for r in rows], [r["exact"] for r in rows]
    assert report["systems"][0]["calibration"] is None
    assert calibration["ece"] == round(expected_calibration_error(p, right), 4)
    assert calibration["brier"] == round(brier(p, right), 4)
    for i, found in enumerate(calibration["bins"]):
        inside = [r for r in rows if i / 10 < r["probability"] <= (i + 1) / 10]
        assert found["questions"] == len(inside)
        assert found["correct"] == round(float(np.mean([r["exact"] for r in inside])), 4)
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
    assert report["pairs"][0]["verdict"] == "not significant (p = 1.000 after Holm): no difference was seen"
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
    assert group["exact"] == {
        "mean": pytest.approx(np.mean(scores), abs=0.01),
        "sd": pytest.approx(np.std(scores, ddof=1), abs=0.01),
    }
    unknown = [key for key, value in report["systems"][3]["cost"].items() if value is None]
    assert len(unknown) == 8  # known of it are questions_per_s and peak_memory_gib
    line = next(
        line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if line.startswith("| other | –")
    )
    assert line == "| other |" + " – |" * 8 + " 12.50 | 1.50 |"


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


def test_text_from_data_cannot_become_markup(tmp_path: Path):
    evil = '<script>alert("x")</script><img src=x onerror=y>|`*\u202e'
    rows = questions("squad_v2")
    for row in rows:
        row |= {"id": row["id"] + evil, "prompt": evil, "gold": [evil] if row["gold"] else []}
    folders = [
        write(tmp_path / f"s{i}", "squad_v2", answered("squad_v2", rows, right, i), name=evil, data=evil, scorer=evil)
        for i, right in enumerate((0.2, 0.9))
    ]
    compare(folders, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert not {"script", "img", "link", "iframe"} & {name for name, _ in page.elements}
    assert "\u202e" not in html
    assert "&lt;script&gt;" in html
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert not any("<script" in line.replace("\\<", "") for line in lines)
    tables = [line.replace("\\|", "") for line in lines if line.startswith("| ")]
    assert len({line.count("|") for line in tables if "\\<" in line}) <= 3  # a table each, none broken


def test_page_is_well_formed_and_fetches_nothing(squad: list[Path], tmp_path: Path):
    compare(squad, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert not [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    assert "default-src 'none'" in html


class Bars(HTMLParser):
    """The widths of the bars of the main score."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.widths: list[str] = []
        self.feed(html[html.index('<table class="bars">') : html.index("<h2>Scores")])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if ("class", "within") in attrs:
            self.widths.append(str(dict(attrs)["width"]))


def test_bars_are_as_long_as_the_scores(squad: list[Path], tmp_path: Path):
    report = compare(squad, tmp_path / "out")
    widths = Bars((tmp_path / "out" / "report.html").read_text()).widths
    assert list(map(float, widths)) == [s["scores"]["total"]["exact"]["score"] for s in report["systems"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(task="squad_v1"), "task is squad_v2 in {0}/eval, but squad_v1 in {1}/eval; evaluate both"),
        (lambda r: r.update(task_version=2), "task_version is 1 in {0}/eval, but 2 in {1}/eval; evaluate both"),
        (lambda r: r.update(evaluation_sha256="ef"), "evaluation_sha256 is " + "ab" * 32 + " in {0}/eval, but ef in {1}/eval"),
        (lambda r: r.pop("evaluation_sha256"), "evaluation_sha256 is missing; evaluate it anew with `graft eval {1}`"),
        (lambda r: r["scores"]["total"].update(exact=99.0), "scores.total.exact is 99.0, but samples.jsonl gives "),
        (lambda r: r["scores"]["NoAns"].update(f1=99.0), "scores.NoAns.f1 is 99.0, but samples.jsonl gives "),
        (lambda r: r.update(questions=119), "119 questions, but 120 rows in samples.jsonl"),
        (lambda r: r.update(scores={}), "scores or scores.total are no objects"),
        (lambda r: r.update(system=[1]), "system is [1]; evaluate it anew"),
        (lambda r: r["system"].update(disk_mib="large"), "disk_mib is 'large', no number"),
    ],
)  # fmt: skip
def test_refuses_results_that_do_not_fit(squad: list[Path], tmp_path: Path, change: Callable[[Row], Any], said: str):
    edit(squad[1], change)
    with pytest.raises(CompareError) as error:
        compare(squad, tmp_path / "out")
    assert said.format(*squad) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"id": "q1"', '"id": "z1"', "samples.jsonl:2: id is 'q1' in {0}/eval, but 'z1' in {1}/eval; evaluate both"),
        ('"cluster": "c0", ', "", "samples.jsonl:1: cluster is 'missing'; evaluate it anew with `graft eval {1}`"),
        ('"exact": 1.0', '"exact": 2.0', "exact is 2.0; evaluate it anew"),
        ('"exact": 1.0', '"exact": NaN', "NaN is not JSON"),
        ('"probability": null', '"probability": 1.5', "samples.jsonl:1: probability is 1.5"),
        ('"gold": []', '"gold": null', "samples.jsonl:1: gold is None"),
        ('{"id": "q2"', '{"id": q2"', "samples.jsonl:3: "),
    ],
)
def test_refuses_damaged_samples_by_line(squad: list[Path], tmp_path: Path, old: str, new: str, said: str):
    file = squad[1] / "eval" / "samples.jsonl"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(CompareError) as error:
        compare(squad, tmp_path / "out")
    assert said.format(*squad) in str(error.value)


def test_refuses_missing_and_damaged_files(squad: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(CompareError, match="1 folders to compare where at least 2"):
        compare(squad[:1], out)
    with pytest.raises(CompareError, match=r"nowhere/results.json can't be read \(No such file"):
        compare([squad[0], tmp_path / "nowhere"], out)
    (squad[1] / "eval" / "results.json").write_text('{\n"task": }')
    with pytest.raises(CompareError, match=r"results.json:2: not JSON"):
        compare(squad[:2], out)
    (squad[2] / "eval" / "samples.jsonl").unlink()
    with pytest.raises(CompareError, match="samples.jsonl can't be read"):
        compare([squad[0], squad[2]], out)
    out.write_text("")
    with pytest.raises(CompareError, match="is a file; name a folder"):
        compare([squad[0], squad[0]], out)


def test_another_number_of_samples_is_refused(tmp_path: Path):
    folders = [
        write(tmp_path / f"s{n}", "squad_v2", answered("squad_v2", questions("squad_v2", n), 0.5, 1)) for n in (40, 44)
    ]
    with pytest.raises(CompareError, match=r"40 samples in .*s40/eval, but 44 in .*s44/eval; evaluate both"):
        compare(folders, tmp_path / "out")


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Whose idea was it?", "who"),
        ("In which year, and why?", "which"),
        ("Somehow whatever?", "other"),
        ("HOW far?", "how"),
    ],
)
def test_question_word_is_the_first_one(question: str, word: str):
    assert _question_word(question) == word
