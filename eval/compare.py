"""Systems on the same questions -> who beats whom, how surely and at what cost: `graft compare RUN... --out DIR`.

Writes compare.json (all numbers), report.md and report.html. Every score is recomputed from samples.jsonl.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, count
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from data.atomic import write_json, write_text
from data.conversation import DataError
from data.errors import UserError
from data.inside import first_stray
from data.terminal import quoted
from eval.breakdown import calibration, discordant_examples, question_kinds, scores_per_label
from eval.compare_report import COSTS, markdown, page
from eval.metrics import FURTHER, gold_label, label_counts
from eval.stats import (
    approximate_randomisation,
    bootstrap_sums,
    cell,
    holm,
    items_to_settle,
    macro_f1,
    mcnemar_exact,
    mean_sd,
)

Model = TypeVar("Model", bound=BaseModel)
Row = dict[str, Any]
Share = Annotated[float, Field(ge=0, le=1)]

SEED, RESAMPLES, ALPHA = 0, 10_000, 0.05
ROUNDING = 0.0051  # scores in results.json are percentages with two decimals
STATED = {"target", "scorer", "seconds", "cut_at_max_new_tokens", "too_long_for_model", "machine"}  # shown as they are


class CompareError(UserError):
    """Folders that can't be compared: the values that differ or the damage, the place and the remedy."""


class Results(BaseModel, strict=True, extra="allow"):
    """The keys of results.json that a comparison reads; further ones may be costs."""

    target: str | None = None
    name: str | None = None
    task: str
    task_version: int
    data: str | None = None
    evaluation_sha256: str
    questions: int
    scores: dict[str, dict[str, Any]]  # of each part
    scorer: str | None = None
    trained_on: list[str] | None = None
    pattern: str | None = None
    cut_at_max_new_tokens: int | None = None
    too_long_for_model: int | None = None
    seconds: float | None = None
    machine: str | None = None
    latency_ms: dict[str, Any] | None = None
    system: dict[str, Any] | None = None


class Sample(BaseModel, strict=True):
    """A line of samples.jsonl."""

    id: str
    cluster: str
    prompt: str
    question: str
    label: str
    predicted: str
    gold: list[str]
    asked: bool
    probability: Share | None = None
    exact: Share
    f1: Share | None = None
    valid: Share | None = None
    rouge_l: Share | None = None
    chrf: Share | None = None
    number: Share | None = None
    is_json: Share | None = Field(None, alias="json")
    json_equal: Share | None = None
    regex: Share | None = None


@dataclass(frozen=True)
class System:
    """One evaluation folder: results.json and the rows of samples.jsonl."""

    name: str
    folder: Path
    results: Results
    rows: list[Row]

    @property
    def metrics(self) -> list[str]:
        """The scores that every question has; macro-F1 is one of all questions."""
        total = self.results.scores.get("total", {})
        return ["exact", "valid" if "valid" in total else "f1", *(name for name in FURTHER if name in total)]

    def scores(self, metric: str) -> np.ndarray:
        return np.array([row[metric] for row in self.rows], dtype=float)

    def parts(self) -> dict[str, list[int]]:
        """The indices of the rows of each part that is scored."""
        parts = {"total": list(range(len(self.rows)))}
        if self.results.task == "squad_v2":
            parts["HasAns"] = [i for i, row in enumerate(self.rows) if row["gold"]]
            parts["NoAns"] = [i for i, row in enumerate(self.rows) if not row["gold"]]
        return {name: part for name, part in parts.items() if part}


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """The content of compare.json, which is written to `out` with report.md and report.html. Scores and differences are
    in percent, p and calibration from 0 to 1, unknown values None.

    Each folder is an evaluation or a run. Raises CompareError if fewer than two are given, if they were not evaluated
    on the same questions, or if a file is missing, damaged or contradicts the one beside it.
    """
    if len(folders) < 2:
        raise CompareError(f"{len(folders)} folders to compare, at least 2 are needed; name another run")
    if out.exists() and not out.is_dir():
        raise CompareError(f"--out {out} is a file; name a folder")
    systems = [read_system(folder) for folder in folders]
    for system in systems:
        if files := system.results.trained_on:
            message = f"{system.folder}: the run was trained on {', '.join(files)}, the data of this score"
            raise CompareError(f"{message}; score it on held-out data: `graft eval RUN --data FILE`")
    for system in systems[1:]:
        _refuse_unlike(systems[0], system)
    report = build_report(_named_apart(systems))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", report)
    write_text(out / "report.md", markdown(report))
    write_text(out / "report.html", page(report))
    return report


def read_system(folder: Path) -> System:
    """The evaluation in the folder, or in its eval/. Raises CompareError with file and line."""
    at = folder if (folder / "results.json").is_file() or not (folder / "eval").is_dir() else folder / "eval"
    run = at.parent if at.name == "eval" else at
    remedy = f"score it with `graft eval {quoted(run)}`"
    if stray := first_stray(at, depth=0):
        raise CompareError(f"{at}: {stray}")
    try:
        results = _parse(Results, (at / "results.json").read_bytes(), str(at / "results.json"))
        remedy = f"score it with `graft eval {quoted(results.target or run)}`"
        lines = enumerate((at / "samples.jsonl").read_bytes().splitlines(), 1)
        rows = [_parse(Sample, line, f"{at / 'samples.jsonl'}:{i}").model_dump(by_alias=True) for i, line in lines]
        system = System(results.name or run.resolve().name, at, results, rows)
        _refuse_edited(system)
    except OSError as error:
        raise CompareError(f"{error.filename} can't be read ({error.strerror}); {remedy}") from error
    except DataError as error:
        raise CompareError(f"{error}; {remedy}") from error
    return system


def _parse(kind: type[Model], content: bytes, where: str) -> Model:
    """The record in the JSON. Raises DataError that names the key."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        wrong = error.errors()[0]
        key, value = ".".join(map(str, wrong["loc"])), f"{wrong['input']!r:.60}"
        known = {"missing": f"{key} is missing", "json_invalid": wrong["msg"]}
        raise DataError(where, known.get(wrong["type"], f"{key or 'the content'} is {value}")) from error


def _refuse_edited(system: System) -> None:
    """Raise DataError if results.json states other scores than the samples beside it give."""
    stated, file = system.results, str(system.folder / "results.json")
    if not system.rows or stated.questions != len(system.rows):
        raise DataError(file, f"{stated.questions} questions, but {len(system.rows)} rows in samples.jsonl")
    for part, indices in system.parts().items():
        for metric in system.metrics:
            value, score = stated.scores.get(part, {}).get(metric), 100 * system.scores(metric)[indices].mean()
            if not isinstance(value, int | float) or not abs(value - score) <= ROUNDING:
                values = f"scores.{part}.{metric} is {value}, but samples.jsonl gives {score:.2f}"
                raise DataError(file, f"{values}: one of the files was changed")


def _refuse_unlike(first: System, other: System) -> None:
    """Raise CompareError unless both answered the same questions under the same task."""
    remedy = "evaluate both with `graft eval` on the same --task, --limit and held-out --data"
    patterns = ["pattern"] if "regex" in _metrics([first, other]) else []
    for key in ("task", "task_version", "evaluation_sha256", *patterns):
        mine, theirs = getattr(first.results, key), getattr(other.results, key)
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
    """The systems, those of an equal name numbered."""
    names: list[str] = []
    for system in systems:
        candidates = chain([system.name], (f"{system.name} ({n})" for n in count(2)))
        names.append(next(name for name in candidates if name not in names))
    return [replace(system, name=name) for system, name in zip(systems, names, strict=True)]


def build_report(systems: Sequence[System]) -> dict[str, Any]:
    """All numbers of the comparison of systems that answered the same questions."""
    first, parts = systems[0], systems[0].parts()
    clusters = [row["cluster"] for row in first.rows]
    labels = sorted({gold_label(row) for row in first.rows}) if "valid" in first.metrics else []
    resampled = {part: _resample(systems, indices, labels) for part, indices in parts.items()}
    cells = {part: _cells(systems, resampled[part], indices) for part, indices in parts.items()}
    rows: list[Row] = []
    for i, system in enumerate(systems):
        row: Row = {"name": system.name, "folder": str(system.folder), "cost": _cost(system)}
        row |= system.results.model_dump(include=STATED) | {"scores": {part: each[i] for part, each in cells.items()}}
        rows.append(row | {"classes": scores_per_label(system.rows, labels), "calibration": calibration(system.rows)})
    pairs = _pairs(systems, clusters, resampled["total"], labels)
    return {
        **first.results.model_dump(include={"task", "task_version", "data", "evaluation_sha256"}),
        "questions": len(clusters), "clusters": len(set(clusters)), "resamples": RESAMPLES, "seed": SEED,
        "metrics": list(resampled["total"]), "labels": labels,
        "parts": {part: len(indices) for part, indices in parts.items()}, "systems": rows, "pairs": pairs,
        "machines": sorted({row["machine"] for row in rows if row["machine"]}),
        "seeds": _over_seeds(systems, cells["total"]),
        "slices": _slices(systems) if first.results.task.startswith("squad") else [],
        "examples": _examples(systems, pairs),
    }  # fmt: skip


def _metrics(systems: Sequence[System]) -> list[str]:
    """The scores that all systems have."""
    return [metric for metric in systems[0].metrics if all(metric in system.metrics for system in systems)]


def _resample(systems: Sequence[System], indices: list[int], labels: list[str]) -> dict[str, np.ndarray]:
    """Each metric in percent, [1 + resamples, systems]; row 0 is the observed score. All systems share the draws."""
    metrics, n = _metrics(systems), len(systems)
    columns = [np.ones((len(indices), 1)), *(s.scores(m)[indices, None] for m in metrics for s in systems)]
    columns += [label_counts(s.rows, labels)[indices] for s in systems if labels]
    table = np.hstack(columns)
    clusters = [systems[0].rows[i]["cluster"] for i in indices]
    sums = bootstrap_sums(table, clusters, RESAMPLES, SEED)
    resampled = {m: 100 * sums[:, 1 + i * n : 1 + (i + 1) * n] / sums[:, :1] for i, m in enumerate(metrics)}
    if labels:
        counts = sums[:, 1 + len(metrics) * n :].reshape(len(sums), n, -1)
        resampled["macro_f1"] = 100 * macro_f1(counts)
    return resampled


def _cells(systems: Sequence[System], resampled: dict[str, np.ndarray], indices: list[int]) -> list[Row]:
    """The scores of each system with their intervals, by metric."""
    clusters = len({systems[0].rows[i]["cluster"] for i in indices})
    return [{m: cell(values[:, i], clusters) for m, values in resampled.items()} for i in range(len(systems))]


def _slices(systems: Sequence[System]) -> list[Row]:
    """Scores by answer length and by question word, of each system in order."""
    return [
        {"by": by, "value": kind, "questions": len(indices),
         "systems": _cells(systems, _resample(systems, indices, []), indices)}
        for by, kind, indices in question_kinds(systems[0].rows)
    ]  # fmt: skip


def _over_seeds(systems: Sequence[System], scores: Sequence[Row]) -> list[Row]:
    """Mean and sd of the scores of each recipe that was trained with several seeds; a seed counts once."""
    recipes: dict[tuple[Any, ...], dict[Any, int]] = {}
    for i, system in enumerate(systems):
        facts = system.results.system or {}
        if facts.get("recipe_sha256") and facts.get("seed") is not None:
            key = facts["recipe_sha256"], facts.get("method"), system.results.scorer
            recipes.setdefault(key, {}).setdefault(facts["seed"], i)
    groups = []
    for (recipe, _, scorer), seeds in recipes.items():
        if len(seeds) > 1:
            group: Row = {"recipe_sha256": recipe, "scorer": scorer, "seeds": list(seeds)}
            group["systems"] = [systems[i].name for i in seeds.values()]
            for metric in scores[0]:
                mean, sd = mean_sd([scores[i][metric]["score"] for i in seeds.values()])
                group[metric] = {"mean": mean, "sd": sd}
            groups.append(group)
    return groups


def _pairs(
    systems: Sequence[System], clusters: list[str], resampled: dict[str, np.ndarray], labels: list[str]
) -> list[Row]:
    """Every two systems by each metric; Holm's correction is over all pairs of one metric."""
    alone = len(set(clusters)) == len(clusters)
    both = list(combinations(range(len(systems)), 2))
    pairs: list[Row] = []
    for metric in ("exact", "macro_f1") if labels else _metrics(systems):
        by_label = metric == "macro_f1"
        scores = [label_counts(s.rows, labels) if by_label else s.scores(metric) for s in systems]
        compared = []
        for i, j in both:
            pair: Row = {"metric": metric, "a": systems[i].name, "b": systems[j].name}
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
            compared.append(pair | {"questions_to_settle": needed})
        for pair, p in zip(compared, holm([pair["p"] for pair in compared]), strict=True):
            pair |= {"p_holm": p, "verdict": _verdict(pair, p, len(clusters))}
        pairs += compared
    return pairs


def _verdict(pair: Row, p: float, questions: int) -> str:
    difference, needed = pair["difference"]["score"], pair["questions_to_settle"]
    sure = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if p < ALPHA:
        better, worse = (pair["a"], pair["b"]) if difference > 0 else (pair["b"], pair["a"])
        return f"{better} beats {worse} by {abs(difference):.1f} points ({sure} after Holm)"
    if needed is not None and needed > questions:
        return f"not significant ({sure} after Holm): about {needed - questions:,} more questions would settle it"
    return f"not significant ({sure} after Holm)" + ("" if difference else ": no difference was seen")


def _cost(system: System) -> Row:
    """Each cost, None if it is unknown. Raises CompareError if one is no number."""
    results, latency = system.results, system.results.latency_ms or {}
    known = results.model_dump() | (results.system or {}) | {f"latency_{q}_ms": latency.get(q) for q in ("p50", "p95")}
    cost = {key: known.get(key) for key in COSTS}
    for key, value in cost.items():
        if not isinstance(value, int | float | None):
            where = system.folder / "results.json"
            raise CompareError(f"{where}: {key} is {value!r:.60}, no number; score it again with `graft eval`")
    return cost


def _examples(systems: Sequence[System], pairs: list[Row]) -> list[Row]:
    """Examples of the first pair with the largest difference in `exact`."""
    widest = max((p for p in pairs if p["metric"] == "exact"), key=lambda p: abs(p["difference"]["score"]))
    return discordant_examples(widest["a"], widest["b"], {s.name: s.rows for s in systems}, SEED)
