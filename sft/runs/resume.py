"""How a run resumes: what `graft train --resume` allows, and the check that it is still the same run."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import write_json
from data.cache import file_sha256
from data.terminal import print
from sft.errors import RecipeError, RunError
from sft.recipe.load import load_any_recipe
from sft.untrusted import check_run

KINDS = ("recipe", "data", "base")
# keys of the recipe that don't change the training
# keys that the weights, the optimizer's state or the examples seen so far depend on
FIXED = (
    "task", "objective", "tune.", "model.quantization", "train.optim", "train.seed", "train.examples_per_step",
)  # fmt: skip
IGNORED = ("train.output_dir", "train.report_to", "train.run_name", "model.dequantize", "export.")


@dataclass(frozen=True)
class Resume:
    """A run to resume; since its checkpoint the `allowed` KINDS, and if `elastic` the number of processes, may have
    changed."""

    folder: Path
    allowed: tuple[str, ...] = ()
    elastic: bool = False


def made_from(run: Path, facts: dict[str, Any], processes: int) -> dict[str, Any]:
    """The run folder's recipe, digests of data and base, and versions, for its checkpoints. facts: of manifest()."""
    recipe = load_any_recipe(run / "recipe.yaml").model_dump(mode="json")
    return {
        "recipe": {k: v for k, v in _flat(recipe) if not k.startswith(IGNORED)},
        "data": {
            **facts["data_sha256"],
            **facts["data_revision"],
            **({"encoded examples": facts["examples_sha256"]} if "examples_sha256" in facts else {}),
        },
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
    """The run that the options of `graft train` resume; None for a new run. Raises RecipeError for contradictions, and
    for a run that holds links out of it."""
    if folder is None:
        if allow_changed or elastic:
            option = "--elastic" if elastic else "--allow-changed"
            raise RecipeError(f"{option} works only with --resume RUN; leave it out")
        return None
    if overrides:
        raise RecipeError("--set changes the recipe, and --resume uses the run's own; start a new run")
    kinds = tuple(kind.strip() for kind in allow_changed.split(",")) if allow_changed else ()
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise RecipeError(f"--allow-changed {unknown[0]}: must be one or several of {','.join(KINDS)}")
    check_run(folder)
    return Resume(folder, kinds, elastic)


def check_unchanged(
    run: Path, then: dict[str, Any], now: dict[str, Any], allowed: Sequence[str] = (), elastic: bool = False
) -> list[str]:
    """A line for each allowed change since a checkpoint. Raises RunError with all changes that are not allowed, or that
    can't be."""
    then_recipe, now_recipe = then["recipe"], now["recipe"]
    names = sorted({*then_recipe, *now_recipe})
    if fixed := [n for n in names if n.startswith(FIXED) and then_recipe.get(n) != now_recipe.get(n)]:
        raise RunError(
            f"{run}: {', '.join(fixed)} can't change within a run, whose checkpoint depends on it; change it back, or "
            "start a new run"
        )
    changes = {kind: list(_differences(kind, then[kind], now[kind])) for kind in KINDS}
    if refused := [kind for kind in KINDS if changes[kind] and kind not in allowed]:
        raise RunError(
            f"{run}: {' and '.join(refused)} changed since the checkpoint, so it can't resume as the same run:"
            + "".join(f"\n  {line}" for kind in refused for line in changes[kind])
            + f"\nstart a new run, or allow it: --allow-changed {','.join(refused)}"
        )
    lines = [f"resumes although changed: {line}" for kind in KINDS for line in changes[kind]]
    if then["processes"] != now["processes"]:
        if not elastic:
            raise RunError(
                f"{run}: was trained by {then['processes']} processes and has {now['processes']} now; start as many, "
                "or allow it: --elastic keeps the examples of each step, but rounding and dropout differ"
            )
        lines.append(f"resumes with {now['processes']} processes instead of {then['processes']}")
    lines += [
        f"warning: {name} is {now['packages'][name]} and was {version}: losses may differ in their last digits"
        for name, version in then["packages"].items()
        if now["packages"].get(name) != version
    ]
    return lines


def note_changed_data(run: Path, facts: dict[str, Any]) -> None:
    """Warn of data files that changed while training, and list them in the manifest."""
    then = facts["data_sha256"]
    changed = [path for path, sha256 in then.items() if not Path(path).is_file() or file_sha256(Path(path)) != sha256]
    for path in changed:
        print(f"warning: {path} changed while training; the run used the earlier content", flush=True)
    if changed:
        write_json(run / "manifest.json", facts | {"changed_during_run": changed})


def _differences(kind: str, then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A line for each difference; data and base are compared by content, not by path."""
    if kind != "recipe":
        if [*then.values()] == [*now.values()]:
            return
        if sorted(map(str, then.values())) == sorted(map(str, now.values())):  # two files swapped
            yield f"{kind}: the same contents in other places: then {', '.join(then)}; now {', '.join(now)}"
            return
        then, now = _without(then, now), _without(now, then)
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield f"{kind}: {name}: then {_shown(then.get(name))}, now {_shown(now.get(name))}"


def _without(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The values without counterpart among the others; each other one, first that of the same name, is one's only."""
    counterparts = Counter(value for name, value in others.items() if (name, value) not in values.items())
    left = {}
    for name, value in values.items():
        if (name, value) in others.items():
            continue
        if counterparts[value]:
            counterparts[value] -= 1
        else:
            left[name] = value
    return left


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested sections by their dotted names."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
