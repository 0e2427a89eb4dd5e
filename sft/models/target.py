"""Load the model that a command names: a run (base and adapter), an export, or any base."""

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from data.encode.chat import check_template
from data.terminal import print, quoted
from sft.errors import RunError
from sft.models.capabilities import has_virtual_tokens, takes_packs
from sft.models.load import default_device, fit_vocabulary, load_base, load_tokenizer, load_weights
from sft.models.patterns import check_adapter_patterns
from sft.models.resolve import readable, resolve_base
from sft.recipe.baseline_schema import AnyRecipe
from sft.recipe.load import load_any_recipe, load_recipe
from sft.recipe.schema import WHEEL, Model, Recipe, changed, is_hub_id
from sft.untrusted import check_adapter, check_contents, check_run


@dataclass(frozen=True)
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    packed: bool  # whether the model takes a pack's mask


def is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def is_run(target: str) -> bool:
    return (Path(target) / "recipe.yaml").is_file()


def check_target(target: str) -> None:
    """Raise RunError if a command's target can be neither loaded nor asked, RecipeError if its files lead elsewhere."""
    if is_url(target) or WHEEL.fullmatch(target) or Path(target).exists():
        if not is_url(target) and Path(target).is_dir():
            check_run(Path(target)) if is_run(target) else check_contents(Path(target), target, depth=1)
        return
    runs = sorted(recipe.parent.name for recipe in Path(target).parent.glob("*/recipe.yaml"))
    if is_hub_id(target) and not runs:  # `runs/mistyped` is no Hub id
        return
    near = difflib.get_close_matches(Path(target).name, runs, n=1)
    hint = f"did you mean {Path(target).with_name(near[0])}?" if near else "check the spelling"
    raise RunError(f"{target}: no run folder, exported model, base or server address; {hint}")


def run_recipe(run: Path) -> Recipe:
    """The recipe of a language model's run. Raises RunError if the folder is no run."""
    return load_recipe(_recipe_file(run), check_files=False)


def run_any_recipe(run: Path) -> AnyRecipe:
    """The recipe of any run, a baseline's too. Raises RunError if the folder is no run."""
    return load_any_recipe(_recipe_file(run), check_files=False)


def _recipe_file(run: Path) -> Path:
    if not (run / "recipe.yaml").is_file():
        raise RunError(f"{run}: no run folder (it holds no recipe.yaml)")
    check_run(run)
    return run / "recipe.yaml"


def load_target(target: str, base: bool = False) -> Loaded:
    """A run (with `base`: its untrained base), an exported model, or any base; in eval mode."""
    check_target(target)
    if is_run(target) and not base:
        return load_run(Path(target))
    model = run_recipe(Path(target)).model if base else Model(base=target)
    tokenizer = load_tokenizer(model)
    check_template(tokenizer, target)
    loaded = load_base(model, default_device())
    return Loaded(loaded, tokenizer, takes_packs(loaded))


def load_run(run: Path, dtype: str | None = None, adapter: Path | None = None) -> Loaded:
    """The run's model as it was trained: the adapter on its (quantized) base, or the trained weights.

    dtype, adapter: used instead of the run's.
    """
    recipe = run_recipe(run)
    if dtype:
        recipe = changed(recipe, model={"dtype": dtype})
    device = default_device()
    if (run / "model").is_dir():
        tokenizer = load_tokenizer(Model(base=str(run / "model")))
        trained = load_base(changed(recipe.model, base=str(run / "model")), device)
        return Loaded(trained, tokenizer, takes_packs(trained))
    own = adapter_folder(run)
    adapter = adapter or own
    from peft import PeftModel

    tokenizer = adapter_tokenizer(own)
    if note := template_note(tokenizer, recipe.model, own):
        print(note, file=sys.stderr, flush=True)
    base = load_base(changed(recipe.model, dequantize=False), device)  # answering may have less memory than training
    packed = takes_packs(base)
    fit_vocabulary(base, adapter)
    with readable(str(adapter)):
        check_adapter_patterns(base, adapter)
        model = PeftModel.from_pretrained(base, str(adapter))
    return Loaded(cast(PreTrainedModel, model.eval()), tokenizer, packed and not has_virtual_tokens(model))


def adapter_tokenizer(adapter: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter, with the chat template of training and what it is given."""
    with readable(f"{adapter}: the tokenizer"):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(adapter, trust_remote_code=False))


def adapter_folder(run: Path) -> Path:
    adapter = run / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise RunError(f"{run}: holds no finished adapter; resume it: graft train --resume {quoted(run)}")
    base = run_any_recipe(run).model.base
    check_adapter(adapter, (base, resolve_base(base)))  # PEFT stores the folder that the base was loaded from
    return adapter


def template_note(tokenizer: PreTrainedTokenizerBase, model: Model, adapter: Path) -> str:
    """A warning if the template beside the adapter is not that of the base or of the recipe, else "".

    A template is a program that comes with the adapter and decides what surrounds every text.
    """
    if model.chat_template and not model.chat_template.is_file():
        return f"warning: {adapter}: its chat template can't be compared: {model.chat_template} is gone"
    if tokenizer.chat_template == load_tokenizer(model).chat_template:
        return ""
    of = f"model.chat_template {model.chat_template}" if model.chat_template else f"its base {model.base}"
    return f"warning: {adapter} brings a chat template other than that of {of}; look at it before you trust its answers"


def load_plain(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model of a folder, by plain AutoModelForCausalLM."""
    return load_weights(str(folder), folder, dtype=dtype, device_map={"": default_device()}).eval()
