"""A recipe in the making out of another program's training file, and what LLaMA-Factory and Axolotl have in common."""

import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import yaml

from data.redact import VARIABLE, scrub
from sft.errors import RecipeError
from sft.recipe.strict_yaml import MOST_CHARACTERS, YamlError, parse
from sft.recipe.values import Schedule
from sft.untrusted import check_run_folder

OPTIMIZERS = {
    "adamw_torch": "adamw_torch", "adamw_torch_fused": "adamw_torch_fused", "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit", "adafactor": "adafactor", "sgd": "sgd",
}  # fmt: skip
# of transformers' TrainingArguments, with the same meaning here
SAME = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "adam_beta1", "adam_beta2",
    "adam_epsilon", "logging_steps", "save_strategy", "save_total_limit", "eval_strategy", "seed", "run_name",
)  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab")
LORA = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "loraplus_lr_ratio", "loraplus_lr_embedding")


class Draft:
    """A recipe in the making: values by dotted keys, comments on them, and what the file has besides."""

    def __init__(self, file: Path, program: str, given: dict[str, Any]) -> None:
        self.file, self.program = file, program
        self.given = {str(key): value for key, value in given.items() if value is not None}
        self.values: dict[str, Any] = {"task": "instruct"}
        self.notes: dict[str, str] = {"task": "how answers are scored: instruct, squad_v1, squad_v2 or newsgroups"}
        self.left: list[str] = []

    def take(self, key: str, default: Any = None) -> Any:
        """The file's value of a key, which is then dealt with."""
        return self.given.pop(key, default)

    def put(self, key: str, value: Any, note: str = "") -> None:
        """Set a key of the recipe; a comment says what its value is made of."""
        if scrub(text := json.dumps(value, default=str)) != text:
            self.leave(key, "its value holds a secret")
            return
        self.values[key] = value
        if note:
            self.notes[key] = note

    def leave(self, key: str, why: str, value: Any = None) -> None:
        """Name a key that has no match."""
        shown = f": {one_line(value)}" if isinstance(value, str | int | float) and not VARIABLE.search(key) else ""
        self.left.append(f"{one_line(key)[1:-1]}{shown}: {why}")

    def refuse(self, key: str, why: str) -> RecipeError:
        return RecipeError(f"{self.file}: {key}: {why}")

    def locate(self, name: str, *folders: Path) -> str:
        """The path of a file that the program finds from where it is started: from here, or from beside its file."""
        beside = self.file.parent
        candidates = [folder / name for folder in folders] or [Path(name), beside / name]
        return str(next((path for path in candidates if path.exists()), candidates[0]))

    def text(self) -> str:
        """The recipe with its comments."""
        lines = [f"# made of {one_line(self.file.name)[1:-1]} ({self.program}) by graft import; see graft check"]
        sections: dict[str, dict[str, Any]] = {}
        for key, value in self.values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        for section in sorted(sections, key=("task", "model", "tune", "data", "train", "eval").index):
            keys = sections[section]
            if "" not in keys:
                lines.append(f"{section}:")
            for name, value in keys.items():
                indent = "  " if name else ""
                if note := self.notes.get(f"{section}.{name}".rstrip(".")):
                    lines.append(f"{indent}# {note}")
                dumped = yaml.safe_dump({name or section: value}, sort_keys=False, allow_unicode=True, width=10**6)
                lines += [indent + line for line in dumped.splitlines()]
        if self.left:
            lines += ["", f"# of {self.program} and not taken:", *(f"#   {line}" for line in self.left)]
        return "\n".join(lines) + "\n"


def read_other(file: Path) -> Any:
    """The content of a YAML or JSON file. Raises RecipeError."""
    if not file.is_file():
        raise RecipeError(f"{file}: no such file")
    if (size := file.stat().st_size) > MOST_CHARACTERS:
        raise RecipeError(f"{file}: {size:,} bytes, the limit is {MOST_CHARACTERS:,}; shorten it")
    try:
        text = file.read_text(encoding="utf-8-sig")
        return json.loads(text) if file.suffix == ".json" else parse(text, str(file))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # YamlError and JSON's are ValueErrors
        problem = str(error) if isinstance(error, YamlError) else f"{file}: not JSON: {error}"
        raise RecipeError(problem) from error


def put_tune(draft: Draft, key: str, method: Any, settings: dict[str, Any]) -> None:
    """Section tune; LoRA's settings only for LoRA."""
    if method not in ("lora", "full"):
        raise draft.refuse(key, f"{method}: lora, qlora and full are converted; for another method write a recipe")
    draft.put("tune.method", method)
    own = {key: draft.take(key) for key in (*LORA, "init_lora_weights", "layers_to_transform")}
    for name, value in {**settings, **own}.items():
        if value is not None and method == "lora":
            draft.put(f"tune.{name}", value)
        elif value is not None and own.get(name) is not None:
            draft.leave(name, "works only with lora", value)


def put_sources(draft: Draft, key: str, trained: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> None:
    if not trained:
        raise draft.refuse(key, "names no dataset; a recipe needs data.train")
    draft.put("data.train", list(trained))
    if held_out:
        draft.put("eval.data", held_out[0])
    for source in held_out[1:]:
        draft.leave(f"eval data {source['path']}", "eval.data is a single source")


def put_length(draft: Draft, length: Any, habit: str) -> None:
    if length is not None:
        draft.put("data.max_length", length)
    draft.put("data.too_long", "skip", f"{draft.program} {habit}; here they are left out and counted")


def put_batch(draft: Draft, key: str, default: int, packed: bool) -> None:
    size, times = draft.take(key, default), draft.take("gradient_accumulation_steps", 1)
    if not (isinstance(size, int) and isinstance(times, int)):
        raise draft.refuse(key, "batch size and gradient_accumulation_steps are whole numbers; correct them")
    note = f"{key} {size} x gradient_accumulation_steps {times}, on one process; multiply by their number"
    draft.put(
        "train.examples_per_step", size * times, f"{note}; a packed sequence there holds several" if packed else note
    )


def put_defaults(draft: Draft, values: dict[str, Any]) -> None:
    """Values that the program has if its file names none, as far as Graft has others."""
    for key, value in values.items():
        if key not in draft.given and value is not None:
            draft.put(f"train.{key}", value, f"the default of {draft.program}")


def put_training(draft: Draft, share: str) -> None:
    """What transformers' TrainingArguments and both programs have in common."""
    if (bf16 := draft.take("bf16")) is not None:
        draft.leave("bf16", "model.dtype: auto is bfloat16 on a GPU", bf16)
    schedule = draft.given.get("lr_scheduler_type")
    if isinstance(schedule, str) and schedule not in get_args(Schedule):
        draft.leave(
            "lr_scheduler_type",
            "not known here; train.lr_scheduler_type keeps its default",
            draft.take("lr_scheduler_type"),
        )
    for key in SAME:
        if (value := draft.take(key)) is not None:
            draft.put(f"train.{key}", value)
    if (ratio := draft.take("warmup_ratio")) is not None and "train.warmup_steps" not in draft.values:
        draft.put("train.warmup_steps", ratio, "warmup_ratio: below 1 it is a share of all steps")
    if optimizer := draft.take("optim"):
        if isinstance(optimizer, str) and optimizer in OPTIMIZERS:
            draft.put("train.optim", OPTIMIZERS[optimizer])
        else:
            draft.leave("optim", "not known here; train.optim keeps its default", optimizer)
    for what in ("save", "eval"):
        steps = draft.take(f"{what}_steps")
        if isinstance(steps, int) and not isinstance(steps, bool):
            draft.put(f"train.{what}_steps", steps)
            draft.values.setdefault(f"train.{what}_strategy", "steps")
        elif steps is not None:
            draft.leave(f"{what}_steps", "a share of the steps; a recipe takes their number", steps)
    part = draft.take(share)
    if isinstance(part, int | float) and 0 < part < 1 and "eval.data" not in draft.values:
        draft.put("eval.share", part, f"{share}; by whole passages, so no text is on both sides")
    elif part:
        draft.leave(share, "eval.share is a share of the rows, and only without eval.data", part)
    if not {"eval.data", "eval.share"} & draft.values.keys():
        for key in ("train.eval_strategy", "train.eval_steps"):
            if (value := draft.values.pop(key, None)) not in (None, "no"):
                draft.leave(key, "nothing is held out; set eval.data or eval.share", value)
    if (folder := draft.take("output_dir")) is not None:
        try:
            check_run_folder(Path(str(folder)), "output_dir")
            draft.put("train.output_dir", folder)
        except RecipeError as error:
            draft.leave("output_dir", str(error))
    if isinstance(draft.given.get("gradient_checkpointing"), bool):
        draft.put("train.gradient_checkpointing", draft.take("gradient_checkpointing"))
    if (asked := names_of(draft.take("report_to"))) is not None:
        here = [name for name in asked if name in TRACKERS and find_spec(name)]
        draft.put("train.report_to", here)
        for name in asked:
            if name in TRACKERS and name not in here:
                draft.leave("report_to", f"pip install {name}, then set train.report_to: {name}", name)
            elif name not in (*here, "none"):
                draft.leave("report_to", f"train.report_to has {', '.join(TRACKERS)}", name)


def names_of(value: Any) -> list[str] | None:
    """Names of a list, or of a text with commas."""
    if value is None or value == "":
        return None
    parts: Iterable[Any] = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [str(part).strip() for part in parts]


def one_line(value: Any) -> str:
    """A value on one line, without secrets."""
    text = scrub(json.dumps(value, default=str))
    return text if len(text) <= 80 else f'{text[:76]}..."'
