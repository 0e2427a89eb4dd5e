"""Systems on the same questions -> who beats whom, how surely and at what cost: `graft compare RUN... --out DIR`.

Writes compare.json (all numbers), report.md and report.html. Every score is computed anew from samples.jsonl.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any

import numpy as np

from data.conversation import DataError
from data.errors import UserError
from data.readers.strict_json import parse_object
from eval.compare_report import breakdown, examples, markdown, over_seeds, page, slices
from eval.metrics import gold_label, label_counts
from eval.stats import approximate_randomisation, bootstrap_sums, cell, holm, items_to_settle, macro_f1, mcnemar_exact

Found = dict[str, Any]

SEED, RESAMPLES, ALPHA = 0, 10_000, 0.05
ROUNDING = 0.0051  # results.json has two decimals of a percentage
COSTS = (
    "trainable_parameters", "parameters", "train_seconds", "train_cpu_seconds", "train_peak_memory_gib", "disk_mib",
    "questions_per_s", "peak_memory_gib",
)  # fmt: skip
STATED = ("target", "scorer", "seconds", "cut_at_max_new_tokens", "too_long_for_model", "machine")  # of results.json
FIELDS = {
    "task": str, "task_version": int, "questions": int, "scores": dict, "evaluation_sha256": str,
    "name": str | None, "data": str | None, "scorer": str | None, "system": dict | None, "latency_ms": dict | None,
}  # fmt: skip
TEXTS = ("id", "cluster", "prompt", "question", "label", "predicted")


class CompareError(UserError):
    """Folders that can't be compared: which values differ or what is damaged, where, and what to do."""


@dataclass(frozen=True)
class System:
    """One evaluation folder: results.json, and the rows of samples.jsonl in order."""

    name: str
    folder: Path
    results: Found
    rows: list[Found]

    @property
    def second(self) -> str:
        return "valid" if "valid" in self.results["scores"]["total"] else "f1"

    def scores(self, metric: str) -> np.ndarray:
        return np.array([row[metric] for row in self.rows], dtype=float)

    def parts(self) -> dict[str, list[int]]:
        """The rows of each part that is scored."""
        parts = {"total": list(range(len(self.rows)))}
        if self.results["task"] == "squad_v2":
            parts["HasAns"] = [i for i, row in enumerate(self.rows) if row["gold"]]
            parts["NoAns"] = [i for i, row in enumerate(self.rows) if not row["gold"]]
        return {name: part for name, part in parts.items() if part}


def compare(folders: Sequence[Path], out: Path) -> Found:
    """What compare.json holds, written to `out` with report.md and report.html. Scores and differences are in percent,
    p and calibration from 0 to 1; what is not known is None.

    Each folder is an evaluation's or a run's. Raises CompareError where fewer than two are given, where they were not
    evaluated on the same questions, and where a file is missing, damaged or contradicts the one beside it.
    """
    if len(folders) < 2:
        raise CompareError(f"{len(folders)} folders to compare where at least 2 are needed; name another run")
    if out.exists() and not out.is_dir():
        raise CompareError(f"--out {out} is a file; name a folder")
    systems = [read_system(folder) for folder in folders]
    for system in systems:
        if seen := system.results.get("trained_on"):
            told = f"{system.folder}: the run was trained on {', '.join(map(str, seen))}, which it was scored on"
            raise CompareError(f"{told}; score it on held-out data: `graft eval RUN --data FILE`")
    for system in systems[1:]:
        _refuse_unlike(systems[0], system)
    report = build_report(_named_apart(systems))
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    (out / "report.html").write_text(page(report), encoding="utf-8")
    return report


def read_system(folder: Path) -> System:
    """The evaluation in the folder, or in its eval/. Raises CompareError with file and line."""
    at = folder if (folder / "results.json").is_file() or not (folder / "eval").is_dir() else folder / "eval"
    results = _read_results(at / "results.json")
    again = f"evaluate it anew with `graft eval {results.get('target', at)}`"
    for key, kind in FIELDS.items():
        if not isinstance(results.get(key), kind):
            raise CompareError(f"{at / 'results.json'}: {key} is {results.get(key, 'missing')!s:.60}; {again}")
    name = results.get("name") or (at.parent.resolve() if at.name == "eval" else at.resolve()).name
    system = System(str(name), at, results, [])
    if not all(isinstance(results["scores"].get(part), dict) for part in ("total", *results["scores"])):
        raise CompareError(f"{at / 'results.json'}: scores or scores.total are no objects; {again}")
    try:
        lines = (at / "samples.jsonl").read_bytes().splitlines()
    except OSError as error:
        raise CompareError(f"{at / 'samples.jsonl'} can't be read ({error.strerror}); {again}") from error
    for i, line in enumerate(lines, 1):
        where = f"{at / 'samples.jsonl'}:{i}"
        try:
            system.rows.append(_checked(parse_object(line, where), system.second, where))
        except DataError as error:
            raise CompareError(f"{error}; {again}") from error
    _refuse_edited(system, again)
    return system


def _read_results(path: Path) -> Found:
    again = f"score it first: `graft eval {path.parent.parent if path.parent.name == 'eval' else path.parent}`"
    try:
        results = json.loads(path.read_bytes())
    except OSError as error:
        raise CompareError(f"{path} can't be read ({error.strerror}); {again}") from error
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise CompareError(f"{path}:{line}: not JSON: {error}; {again}") from error
    if not isinstance(results, dict):
        raise CompareError(f"{path}:1: no JSON object; {again}")
    return results


def _checked(row: Found, second: str, where: str) -> Found:
    """The row, if a comparison can read it. Raises DataError that names the key."""
    wrong = [key for key in TEXTS if not isinstance(row.get(key), str)]
    wrong += [key for key in ("exact", second) if not _is_share(row.get(key))]
    gold = row.get("gold")
    wrong += ["gold"] * (not isinstance(gold, list) or not all(isinstance(answer, str) for answer in gold))
    wrong += ["asked"] * (not isinstance(row.get("asked"), bool))
    wrong += ["probability"] * (row.get("probability") is not None and not _is_share(row["probability"]))
    if wrong:
        raise DataError(where, f"{wrong[0]} is {row.get(wrong[0], 'missing')!r:.60}")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _refuse_edited(system: System, again: str) -> None:
    """Raise CompareError where results.json says other scores than the samples beside it give."""
    stated, file = system.results, system.folder / "results.json"
    if not system.rows or stated["questions"] != len(system.rows):
        counts = f"{stated['questions']} questions, but {len(system.rows)} rows in samples.jsonl"
        raise CompareError(f"{file}: {counts}; {again}")
    for part, indices in system.parts().items():
        for metric in ("exact", system.second):
            says, are = stated["scores"].get(part, {}).get(metric), 100 * system.scores(metric)[indices].mean()
            if not _is_number(says) or abs(says - are) > ROUNDING:
                values = f"scores.{part}.{metric} is {says}, but samples.jsonl gives {are:.2f}"
                raise CompareError(f"{file}: {values}: one of the files was changed; {again}")


def _refuse_unlike(first: System, other: System) -> None:
    """Raise CompareError unless both answered the same questions under the same task."""
    remedy = "evaluate both with `graft eval` on the same --task, --limit and held-out --data"
    for key in ("task", "task_version", "evaluation_sha256"):
        mine, theirs = first.results[key], other.results[key]
        if mine != theirs:
            raise CompareError(f"{key} is {mine} in {first.folder}, but {theirs} in {other.folder}; {remedy}")
    if len(first.rows) != len(other.rows):
        counts = f"{len(first.rows)} samples in {first.folder}, but {len(other.rows)} in {other.folder}"
        raise CompareError(f"{counts}; {remedy}")
    for i, (mine, theirs) in enumerate(zip(first.rows, other.rows, strict=True), 1):
        for key in ("id", "gold", "label", "cluster"):
            if mine[key] != theirs[key]:
                values = f"{mine[key]!r:.60} in {first.folder}, but {theirs[key]!r:.60} in {other.folder}"
                raise CompareError(f"samples.jsonl:{i}: {key} is {values}; {remedy}")


def _named_apart(systems: Sequence[System]) -> list[System]:
    """The same systems, those of equal name numbered."""
    names: list[str] = []
    for system in systems:
        numbered = (f"{system.name} ({n})" for n in count(2))
        names.append(next(name for name in chain([system.name], numbered) if name not in names))
    return [replace(system, name=name) for system, name in zip(systems, names, strict=True)]


def build_report(systems: Sequence[System]) -> Found:
    """All numbers, of systems that answered the same questions."""
    first = systems[0]
    clusters = [row["cluster"] for row in first.rows]
    labels = sorted({gold_label(row) for row in first.rows}) if first.second == "valid" else []
    resampled = {part: _resample(systems, indices, labels) for part, indices in first.parts().items()}
    counts = {part: len({clusters[i] for i in indices}) for part, indices in first.parts().items()}
    scores = {metric: np.column_stack([s.scores(metric) for s in systems]) for metric in ("exact", first.second)}
    pairs = _pairs(systems, clusters, resampled["total"], labels)
    rows = []
    for i, system in enumerate(systems):
        row: Found = {"name": system.name, "folder": str(system.folder), "cost": _cost(system)}
        row |= {key: system.results.get(key) for key in STATED}
        row["scores"] = {
            part: {m: cell(v[:, i], counts[part]) for m, v in of.items()} for part, of in resampled.items()
        }
        rows.append(row | breakdown(system.rows, labels))
    return {
        **{key: first.results.get(key) for key in ("task", "task_version", "data", "evaluation_sha256")},
        "questions": len(clusters), "clusters": len(set(clusters)), "resamples": RESAMPLES, "seed": SEED,
        "metrics": list(resampled["total"]), "labels": labels,
        "parts": {part: len(indices) for part, indices in first.parts().items()}, "systems": rows, "pairs": pairs,
        "machines": sorted({str(row["machine"]) for row in rows if row["machine"]}),
        "seeds": over_seeds([s.results for s in systems], rows),
        "slices": slices(first.rows, scores) if first.results["task"].startswith("squad") else [],
        "examples": _examples(systems, pairs),
    }  # fmt: skip


def _resample(systems: Sequence[System], indices: list[int], labels: list[str]) -> dict[str, np.ndarray]:
    """Each metric in percent, [1 + resamples, systems]; row 0 is what was seen. All systems share the draws."""
    metrics, n = ("exact", systems[0].second), len(systems)
    columns = [np.ones((len(indices), 1)), *(s.scores(m)[indices, None] for m in metrics for s in systems)]
    columns += [label_counts(s.rows, labels)[indices] for s in systems if labels]
    table = np.hstack(columns)
    clusters = [systems[0].rows[i]["cluster"] for i in indices]
    sums = bootstrap_sums(table, clusters, RESAMPLES, SEED)
    found = {m: 100 * sums[:, 1 + i * n : 1 + (i + 1) * n] / sums[:, :1] for i, m in enumerate(metrics)}
    if labels:
        counts = sums[:, 1 + 2 * n :].reshape(len(sums), n, -1)
        found["macro_f1"] = 100 * macro_f1(counts)
    return found


def _pairs(
    systems: Sequence[System], clusters: list[str], resampled: dict[str, np.ndarray], labels: list[str]
) -> list[Found]:
    """Every two systems by each metric; Holm's correction is over all pairs of one metric."""
    alone = len(set(clusters)) == len(clusters)
    both = list(combinations(range(len(systems)), 2))
    pairs: list[Found] = []
    for metric in ("exact", "macro_f1" if labels else "f1"):
        by_label = metric == "macro_f1"
        scores = [label_counts(s.rows, labels) if by_label else s.scores(metric) for s in systems]
        found = []
        for i, j in both:
            pair: Found = {"metric": metric, "a": systems[i].name, "b": systems[j].name}
            pair["difference"] = cell(resampled[metric][:, i] - resampled[metric][:, j])
            a, b = scores[i], scores[j]
            if metric == "exact":
                pair["mcnemar_p"], pair["only_a"], pair["only_b"] = mcnemar_exact(a.tolist(), b.tolist())
            if metric == "exact" and alone:
                pair |= {"test": "exact McNemar", "p": pair["mcnemar_p"]}
            else:
                p = approximate_randomisation(a, b, clusters, macro_f1 if by_label else None, RESAMPLES, SEED)
                pair |= {"test": "randomisation" if alone else "cluster randomisation", "p": p}
            needed = None if by_label else items_to_settle(a.tolist(), b.tolist(), clusters, ALPHA / len(both))
            found.append(pair | {"questions_to_settle": needed})
        for pair, p in zip(found, holm([pair["p"] for pair in found]), strict=True):
            pair |= {"p_holm": p, "verdict": _verdict(pair, p, len(clusters))}
        pairs += found
    return pairs


def _verdict(pair: Found, p: float, questions: int) -> str:
    difference, needed = pair["difference"]["score"], pair["questions_to_settle"]
    sure = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if p < ALPHA:
        better, worse = (pair["a"], pair["b"]) if difference > 0 else (pair["b"], pair["a"])
        return f"{better} beats {worse} by {abs(difference):.1f} points ({sure} after Holm)"
    if needed is not None and needed > questions:
        return f"not significant ({sure} after Holm): about {needed - questions:,} more questions would settle it"
    return f"not significant ({sure} after Holm)" + ("" if difference else ": no difference was seen")


def _cost(system: System) -> Found:
    """Each cost, None where it is not known. Raises CompareError where one is no number."""
    results = system.results
    latency, known = results.get("latency_ms") or {}, results | (results.get("system") or {})
    cost = {key: known.get(key) for key in COSTS} | {f"latency_{q}_ms": latency.get(q) for q in ("p50", "p95")}
    for key, value in cost.items():
        if value is not None and not _is_number(value):
            where = system.folder / "results.json"
            raise CompareError(f"{where}: {key} is {value!r:.60}, no number; evaluate it anew with `graft eval`")
    return cost


def _examples(systems: Sequence[System], pairs: list[Found]) -> list[Found]:
    """Of the two systems that differ most in `exact`, the first two such."""
    widest = max((p for p in pairs if p["metric"] == "exact"), key=lambda p: abs(p["difference"]["score"]))
    a, b = (next(s for s in systems if s.name == widest[key]) for key in ("a", "b"))
    return examples((a.name, a.rows), (b.name, b.rows), SEED)
