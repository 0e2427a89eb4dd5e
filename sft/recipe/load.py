"""Load a recipe: strict YAML, `--set` overrides, and one line of explanation for every mistake."""

import dataclasses
import difflib
import math
from collections.abc import Iterator
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from data.conversation import DataError
from data.readers.source import files_of
from data.redact import secret_line
from data.terminal import quoted
from sft.errors import RecipeError
from sft.recipe.baseline_schema import FLOORS, PEFT_TASKS, STRATEGIES, AnyRecipe, BaselineRecipe, BaselineTrain
from sft.recipe.peers import instead, program_of
from sft.recipe.schema import (
    OTHER_METHODS,
    WHEEL,
    Recipe,
    Source,
    Train,
    Tune,
    changed,
    common_prompts,
    is_hub_id,
    with_prompts,
)
from sft.recipe.strict_yaml import MOST_CHARACTERS, YamlError, parse
from sft.untrusted import check_peft, check_run_folder

R = TypeVar("R", bound=BaseModel)
PLAIN_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")  # they need no arguments


def load_recipe(path: Path, overrides: list[str] | None = None, check_files: bool = True) -> Recipe:
    """A language model's recipe from a YAML file and `a.b=value` overrides. Loads neither model nor data.

    check_files=False: for a finished run, whose training data may be missing. Raises RecipeError.
    """
    recipe = load_any_recipe(path, overrides, check_files)
    if isinstance(recipe, BaselineRecipe):
        raise RecipeError(f"{path}: objective {recipe.objective} is a baseline's; name the recipe of an adapter")
    return recipe


def load_any_recipe(path: Path, overrides: list[str] | None = None, check_files: bool = True) -> AnyRecipe:
    """Any recipe: a baseline's if the file names an `objective`; see load_recipe."""
    try:
        tree = parse(_text(path), str(path))
        if not isinstance(tree, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of sections (task, model, tune, data, train, eval)")
        if program := program_of(tree):
            remedy = f"convert it: graft import {quoted(path)} --out recipe.yaml"
            raise RecipeError(f"{path}: is a file of {program}, not a recipe; {remedy}")
        _keep_old_seed(tree, path)
        for override in overrides or []:
            _set(tree, override)
        return check_baseline(tree, check_files) if "objective" in tree else check_recipe(tree, check_files)
    except YamlError as error:
        raise RecipeError(str(error)) from error
    except OSError as error:  # such as a name that is too long
        raise RecipeError(f"{path}: {error.strerror or error}: {str(error.filename)[:60]}; correct the name") from error


def _keep_old_seed(tree: dict[str, Any], path: Path) -> None:
    """Set eval.seed of runs older than that key: they drew their held-out rows by train.seed."""
    evaluation, train = tree.get("eval"), tree.get("train")
    of_run = path.name == "recipe.yaml" and (path.parent / "manifest.json").is_file()
    if of_run and isinstance(evaluation, dict) and isinstance(train, dict) and "seed" in train:
        evaluation.setdefault("seed", train["seed"])


def _text(path: Path) -> str:
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    if (size := path.stat().st_size) > MOST_CHARACTERS:  # before it is read
        raise RecipeError(f"{path}: {size:,} bytes, a recipe has at most {MOST_CHARACTERS:,}; name data by its path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    if line := secret_line(text):
        raise RecipeError(
            f"{path}:{line}: holds a token, key or password, and recipes are copied into run folders; remove it "
            "and set it in the environment (HF_TOKEN for the Hub, VLLM_API_KEY for a server)"
        )
    return text


def check_recipe(tree: dict[str, Any], check_files: bool = True) -> Recipe:
    recipe = _validate(Recipe, tree)
    tune = recipe.tune
    built, values = _check_tune(tune, OTHER_METHODS, "CAUSAL_LM")
    if built is not None and built.is_prompt_learning and recipe.data.share_prefixes is True:
        raise RecipeError(
            f"tune.method {tune.method} puts virtual tokens before each example, and a pack of several has no place "
            "for them; set data.share_prefixes: auto or false"
        )
    check_schedule(recipe.train)
    if check_files:
        _check_files(recipe)
        template = recipe.model.chat_template
        if template and not template.is_file():
            raise RecipeError(f"model.chat_template: no such file: {template}")
    if recipe.eval.data:
        held_out = with_prompts(recipe.eval.data, common_prompts(recipe.data.train))
        recipe = changed(recipe, eval={"data": held_out})
    return changed(recipe, tune=values)


def check_baseline(tree: dict[str, Any], check_files: bool = True) -> BaselineRecipe:
    recipe = _validate(BaselineRecipe, tree)
    _, values = _check_tune(recipe.tune, STRATEGIES, PEFT_TASKS[recipe.objective])
    check_schedule(recipe.train)
    if check_files:
        _check_files(recipe)
    return changed(recipe, tune=values)


def _validate(kind: type[R], tree: dict[str, Any]) -> R:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e, kind) for e in error.errors())) from error


def dump_recipe(recipe: Recipe | BaselineRecipe) -> str:
    """The recipe as YAML that load_recipe reads back as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def peft_types() -> dict[str, type]:
    """tune.method -> PEFT config class."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _check_tune(tune: Tune, own: tuple[str, ...], task_type: str | None) -> tuple[Any, dict[str, Any]]:
    """The PEFT config, None for one of the `own` methods, and the values in the types that the config declares.

    Raises RecipeError.
    """
    config, allowed = None, dict[str, Any]()
    if tune.method not in own:
        methods = peft_types()
        if tune.method not in methods:
            near = nearest(tune.method, [*methods, *own])
            raise RecipeError(f"tune.method: {tune.method!r} is none of {', '.join(sorted([*methods, *own]))}{near}")
        config = methods[tune.method]
        hints = get_type_hints(config)
        if "init_lora_weights" in hints:  # PEFT's own type has no pissa_niter_4; sft/models/adapter_init.py checks it
            hints["init_lora_weights"] = bool | str
        ours = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
        ours |= {"tokenizer_name_or_path", "tokenizer_kwargs"}  # the base's own, see sft/models/load.py
        allowed = {f.name: (hints[f.name], None) for f in dataclasses.fields(config) if f.name not in ours}
    for key in tune.peft:
        if key not in allowed:
            near = instead(("tune", key), Recipe) or nearest(key, [*allowed, *type(tune).model_fields])
            raise RecipeError(f"tune.{key}: unknown key of method {tune.method}{near}")
    check_peft(tune.peft, "tune.")
    fields: dict[str, Any] = {key: allowed[key] for key in tune.peft}
    settings = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False)
    model = create_model("tune", __config__=settings, **fields)
    try:
        checked = model.model_validate(tune.peft)
        values = {key: getattr(checked, key) for key in tune.peft}  # `no` is text in YAML and may be False here
        named = {"tokenizer_name_or_path": "the base's"} if values.get("prompt_tuning_init") == "TEXT" else {}
        return config(task_type=task_type, **named, **values) if config else None, values
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e, Recipe, ("tune",)) for e in error.errors())) from error
    except (ValueError, TypeError) as error:  # the PEFT config refuses a combination
        raise RecipeError(f"tune: method {tune.method}: {error}") from error


def check_schedule(train: Train | BaselineTrain) -> None:
    """Raise RecipeError if the schedule can't be made of its arguments, as transformers makes it."""
    name, arguments = train.lr_scheduler_type, train.lr_scheduler_kwargs
    if name in PLAIN_SCHEDULES and not arguments:
        return
    import torch
    from transformers import SchedulerType, get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    takes = [key for key in signature(make).parameters if key not in given]
    if unknown := [key for key in arguments if key not in takes]:
        valid = f"valid ones: {', '.join(takes)}" if takes else "it takes none"
        raise RecipeError(f"train.lr_scheduler_kwargs.{unknown[0]}: unknown argument of schedule {name}; {valid}")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], train.learning_rate)
    try:
        schedule: Any = get_scheduler(name, optimizer, 100, 1000, arguments)
        rates = [schedule.lr_lambdas[0](step) for step in (0, 99, 100, 500, 999, 1000)]
        if not all(0 <= rate < math.inf for rate in rates):
            raise ValueError(f"a rate of {min(rates):.3g} to {max(rates):.3g} times train.learning_rate")
    except (TypeError, ValueError, ArithmeticError) as error:
        remedy = f"its arguments: {', '.join(takes)}"
        raise RecipeError(f"train.lr_scheduler_kwargs: schedule {name}: {error}; {remedy}") from error


def _check_files(recipe: AnyRecipe) -> None:
    """Raise RecipeError if this machine lacks something that the recipe names."""
    if absent := [name for name in recipe.train.report_to if not find_spec(name)]:
        raise RecipeError(f"train.report_to: {absent[0]} is not installed; run: pip install {absent[0]}")
    if recipe.train.output_dir:
        check_run_folder(recipe.train.output_dir, "train.output_dir")
    sources: dict[str, Source] = {f"data.train[{i}].path": source for i, source in enumerate(recipe.data.train)}
    if recipe.eval.data:
        sources["eval.data.path"] = recipe.eval.data
    for key, source in sources.items():
        try:
            files_of(source)
        except DataError as error:
            raise RecipeError(f"{key}: {error}") from error
    for key, base in recipe.model.model_dump(include={"base", "embedder"}, exclude_none=True).items():
        if not (base in FLOORS or is_hub_id(base) or WHEEL.fullmatch(base) or Path(base).exists()):
            raise RecipeError(f"model.{key}: {base} is no folder, .gguf file, wheel:package/file.gguf or Hub id")


def _set(tree: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise RecipeError(f"--set {override}: write KEY=VALUE, for example train.learning_rate=1e-4")
    node: Any = tree
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
        if isinstance(node, list):
            raise RecipeError(f"--set {path}: {key} is a list; set the whole of it, {key}=[...]")
        if not isinstance(node, dict):
            raise RecipeError(f"--set {path}: {key} is a value, not a section")
    node[last] = parse(text, f"--set {path}")


def _explain(error: Any, kind: type[BaseModel], root: tuple[str, ...] = ()) -> str:
    """One line: key, value, what is allowed, the nearest valid key."""
    location = (*root, *error["loc"])
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if error["type"] == "extra_forbidden":
        near = instead(location, kind) or nearest(str(location[-1]), _keys_at(kind, location[:-1]))
        return f"{path}: unknown key{near}"
    if error["type"] == "missing":
        return f"{path}: this key is required"
    message = error["msg"].removeprefix("Value error, ")
    if not path:
        return message
    value = error["input"]
    return f"{path}: {message[0].lower()}{message[1:]}" + ("" if isinstance(value, dict) else f", found {value!r}")


def _keys_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Valid keys of the section at a location of the recipe."""
    for part in location:
        if isinstance(part, str):
            kind = next(_models_in(kind.model_fields[part].annotation))
    return list(kind.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a field's type: itself, or inside a tuple or an optional."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def nearest(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=1)
    return f", did you mean {near[0]}?" if near else f"; valid keys: {', '.join(valid)}"
