"""Made-up evaluations of two tasks, as `graft eval` writes them, for the tests of `graft compare`."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.readers.newsgroups import NEWSGROUPS
from eval.metrics import label_scores, squad_scores

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
            asked = {"id": f"p{i}", "cluster": f"t{i}", "prompt": "post " * 200, "question": ""}
            rows.append(asked | {"label": label, "gold": [label]})
        else:
            words = ["red", "old", "town", "hall", "tower", "clock", "face"][: 1 + i % 7]
            question = f"{rng.choice(['Who', 'In which year', 'How', 'Name'])} {i}?"
            asked = {"id": f"q{i}", "cluster": f"c{i // 4}", "prompt": f"text\n\n{question}", "question": question}
            rows.append(asked | {"label": "", "gold": [" ".join(words)] if i % 3 else []})
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


def squad_runs(tmp_path: Path) -> list[Path]:
    rows = questions("squad_v2")
    return [
        write(tmp_path / f"s{i}", "squad_v2", answered("squad_v2", rows, right, i))
        for i, right in enumerate((0.3, 0.7, 0.72))
    ]
