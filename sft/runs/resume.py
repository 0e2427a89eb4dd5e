"""How a run begins, anew or from a checkpoint; what it is made from, so that none goes on as another one."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import write_json
from data.audit.report import DataReport
from data.cache import file_sha256
from sft.errors import RecipeError, RunError
from sft.recipe.baseline_schema import AnyRecipe
from sft.recipe.load import load_any_recipe
from sft.runs.checkpoint import read_manifest, remove_leftovers, set_aside, step_of
from sft.runs.folder import start_run
from sft.runs.metrics import rewind_metrics

KINDS = ("recipe", "data", "base")
NO_MATTER = (
    "train.output_dir",
    "train.report_to",
    "export.",
)  # of the recipe: where the run lies, and what follows training


@dataclass(frozen=True)
class Resume:
    """A run to go on with. allowed: kinds of change that may have happened since its checkpoint, of KINDS. elastic:
    whether the number of processes may have changed."""

    folder: Path
    allowed: tuple[str, ...] = ()
    elastic: bool = False


def begin(
    run: Path,
    recipe: AnyRecipe,
    facts: dict[str, Any],
    report: DataReport,
    resume: Resume | None,
    checkpoint: tuple[Path | None, dict[Path, str]],
    processes: int,
) -> tuple[dict[str, Any], list[str]]:
    """Ready the folder; what the run is made from, for its checkpoints, and lines that tell the user.

    checkpoint: see last_checkpoint. Raises RunError where something changed that `resume` does not allow.
    """
    last, damaged = checkpoint
    lines: list[str] = []
    if last is None:
        start_run(run, recipe, facts, report)
        if resume:
            lines.append("no checkpoint was saved yet: the run begins at its first step")
    made = made_from(run, facts, processes)
    if last and resume:
        if recipe.tune.method == "adalora":
            raise RunError(
                f"{run}: adalora can't go on from a checkpoint: PEFT saves pruned weights, which don't fit the state "
                "of the optimizer; start a new run"
            )
        lines += check_unchanged(run, read_manifest(last)["made_from"], made, resume.allowed, resume.elastic)
        lines += [
            f"warning: {path.name}: {problem}; set aside as damaged-{path.name}" for path, problem in damaged.items()
        ]
        set_aside(damaged)
        lines.append(f"goes on from {last.name}")
    remove_leftovers(run)
    rewind_metrics(run, step_of(last) if last else 0)
    return made, lines


def made_from(run: Path, facts: dict[str, Any], processes: int) -> dict[str, Any]:
    """Recipe as it stands in the run folder, digests of data and base, versions. facts: see manifest()."""
    recipe = load_any_recipe(run / "recipe.yaml").model_dump(mode="json")
    return {
        "recipe": {k: v for k, v in _flat(recipe) if not k.startswith(NO_MATTER)},
        "data": {**facts["data_sha256"], **facts["data_revision"]},
        "base": {
            **facts["base"]["sha256"],
            "commit": facts["base"]["commit"],
            "chat template": facts.get("chat_template_sha256"),
        },
        "processes": processes,
        "packages": facts["packages"],
    }


def resume_of(
    folder: Path | None, overrides: Sequence[str] | None, allow_changed: str | None, elastic: bool
) -> Resume | None:
    """What the options of `graft train` say of a run to go on with. Raises RecipeError for options that contradict."""
    if folder is None:
        if allow_changed or elastic:
            option = "--elastic" if elastic else "--allow-changed"
            raise RecipeError(f"{option} is read with --resume RUN; leave it out")
        return None
    if overrides:
        raise RecipeError("--set changes the recipe, and --resume goes on with the run's own; start a new run")
    kinds = tuple(kind.strip() for kind in allow_changed.split(",")) if allow_changed else ()
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise RecipeError(f"--allow-changed {unknown[0]}: name one or several of {','.join(KINDS)}")
    return Resume(folder, kinds, elastic)


def check_unchanged(
    run: Path, then: dict[str, Any], now: dict[str, Any], allowed: Sequence[str] = (), elastic: bool = False
) -> list[str]:
    """Lines on what has changed since a checkpoint and may. Raises RunError with all that has changed and may not."""
    found = {kind: list(_differences(kind, then[kind], now[kind])) for kind in KINDS}
    if refused := [kind for kind in KINDS if found[kind] and kind not in allowed]:
        raise RunError(
            f"{run}: {' and '.join(refused)} changed since the checkpoint, so it can't go on as the same run:"
            + "".join(f"\n  {line}" for kind in refused for line in found[kind])
            + f"\nstart a new run, or go on with this one: --allow-changed {','.join(refused)}"
        )
    lines = [f"goes on changed: {line}" for kind in KINDS for line in found[kind]]
    if then["processes"] != now["processes"]:
        if not elastic:
            raise RunError(
                f"{run}: was trained by {then['processes']} processes and has {now['processes']} now; start as many, "
                "or go on with --elastic: the same examples in each step, but other rounding and dropout"
            )
        lines.append(f"goes on with {now['processes']} processes instead of {then['processes']}")
    lines += [
        f"warning: {name} is {now['packages'][name]} and was {version}: losses may differ in their last digits"
        for name, version in then["packages"].items()
        if now["packages"].get(name) != version
    ]
    return lines


def note_changed_data(run: Path, facts: dict[str, Any]) -> None:
    """Say which data files are no longer what was trained on; the run's manifest keeps it."""
    then = facts["data_sha256"]
    changed = [path for path, sha256 in then.items() if not Path(path).is_file() or file_sha256(Path(path)) != sha256]
    for path in changed:
        print(f"warning: {path} changed during the run, which was trained on its content of before", flush=True)
    if changed:
        write_json(run / "manifest.json", facts | {"changed_during_run": changed})


def _differences(kind: str, then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A line for each difference. Of data and base the content counts, not the path that it was found at."""
    if kind != "recipe":
        if [*then.values()] == [*now.values()]:
            return
        if sorted(map(str, then.values())) == sorted(map(str, now.values())):  # train and held-out files, or two parts
            yield f"{kind}: the same contents in other places: then {', '.join(then)}; now {', '.join(now)}"
            return
        if moved := {*then.values()} & {*now.values()}:
            then = {name: v for name, v in then.items() if v not in moved}
            now = {name: v for name, v in now.items() if v not in moved}
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield f"{kind}: {name}: then {_shown(then.get(name))}, now {_shown(now.get(name))}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested sections by their dotted names."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
