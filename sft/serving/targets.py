"""Targets of `graft serve` -> one model and the adapters on it, checked before vLLM starts.

The adapter of a quantized run is served on the base that its training saw: the rounded weights, dequantized once into
the cache folder. On the original weights only 64 of 96 answers of a QLoRA run were those of training, so these are
served only if the user names them: `graft serve BASE --lora NAME=RUN`.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.cache import build_once, file_sha256, text_sha256
from data.conversation import DataError
from data.encode.call_text import PARSER
from data.encode.chat import stop_tokens
from data.encode.template import arguments_of, date_arguments, date_of, probe
from data.terminal import print
from eval.client import ServerError
from sft.export.merge import other_way
from sft.models.capabilities import unserved
from sft.models.load import default_device, generation_config, is_quantized, load_base, load_tokenizer
from sft.models.resolve import cache_dir, readable, resolve_base
from sft.models.target import adapter_folder, check_target, is_run, is_url, run_recipe
from sft.recipe.schema import WHEEL, Model

PARSER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # no option of vLLM
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices of --max-lora-rank
# what a server has once, for the adapters of all runs
SHARED: dict[str, Callable[[PreTrainedTokenizerBase], Any]] = {
    "chat_template": lambda tokenizer: tokenizer.chat_template,
    "vocab_size": lambda tokenizer: tokenizer.vocab_size,
    "template_arguments": arguments_of,
    "template_date": date_of,
}
PICKLES = ("adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True)
class Served:
    """model: Hub id or folder. adapters: folders by served name. tokenizer: the adapters', with the chat template of
    training. ends: ids that end an answer, some of which the base's generation config may lack.
    parser: of tool calls."""

    model: str
    name: str
    adapters: dict[str, Path] = field(default_factory=dict)
    tokenizer: Path | None = None
    revision: str | None = None
    rank: int = 0
    ends: tuple[int, ...] = ()
    parser: str | None = None


def resolve_targets(targets: Sequence[str], loras: Mapping[str, str] | None = None) -> Served:
    """One model and its adapters: an export, a base or a run trained as a whole, or runs with adapters of one base;
    `loras` (name: run) adds runs to either. Raises ServerError if vLLM can't serve them together."""
    loras = loras or {}
    for target in (*targets, *loras.values()):
        if is_url(target):
            raise ServerError(f"{target}: is already a server; name a run, an exported model or a base")
        check_target(target)
    runs = [*((Path(t).resolve().name, t) for t in dict.fromkeys(targets) if _has_adapter(t)), *loras.items()]
    models = [t for t in targets if not _has_adapter(t)]
    if len(models) > 1:
        raise ServerError(f"{' and '.join(models)} are several models; serve each on its own --port")
    if not models and not runs:
        raise ServerError("nothing to serve; name a run, an exported model or a base")
    model, name = (_folder(models[0]), served_name(models[0])) if models else (None, "base")
    names = [name, *(name for name, _ in runs)]
    if twice := sorted(n for n in names if names.count(n) > 1):
        raise ServerError(f"{twice[0]}: two of them have this name; rename one: --lora NAME=RUN")
    return _with_adapters(model, name, {name: Path(run) for name, run in runs}) if runs else Served(str(model), name)


def check_served_template(served: Served) -> tuple[dict[str, Any], str | None]:
    """What the chat template is given by default, and vLLM's parser of tool calls. Raises ServerError if the template,
    which vLLM would render without limits, exceeds them with usual turns."""
    folder = served.tokenizer or served.model
    with readable(f"{folder}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=served.revision, trust_remote_code=False)
    try:
        probe(tokenizer)
    except DataError as error:
        raise ServerError(f"{folder}: vLLM renders chat templates without limits, and {error.problem}") from error
    fixed = date_arguments(tokenizer)
    if (day := date_of(tokenizer)) and not fixed:
        print(f"warning: the chat template writes the server's date; the run was trained with {day}", file=sys.stderr)
    return {**fixed, **(arguments_of(tokenizer) or {})}, served.parser or parser_in(tokenizer, folder)


def parser_in(tokenizer: PreTrainedTokenizerBase, folder: object) -> str | None:
    """The parser of tool calls that training saved with the tokenizer."""
    parser = tokenizer.init_kwargs.get(PARSER)
    if parser is not None and not (isinstance(parser, str) and PARSER_NAME.fullmatch(parser)):
        raise ServerError(f"{folder}: {PARSER} {parser!r:.60} is no name of a parser; remove it")
    return parser


def served_name(target: str) -> str:
    if match := WHEEL.fullmatch(target):
        return Path(match[2]).stem
    return Path(target).resolve().name if Path(target).exists() else target


def _has_adapter(target: str) -> bool:
    return is_run(target) and not (Path(target) / "model").is_dir()


def _folder(target: str) -> str:
    return resolve_base(str(Path(target) / "model") if is_run(target) else target)


def _with_adapters(model: str | None, name: str, runs: dict[str, Path]) -> Served:
    revision, first, rank = None, next(iter(runs)), 0
    original = model is not None  # the user names the base: serve its original weights
    adapters: dict[str, Path] = {}
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    for served, run in runs.items():
        if not _has_adapter(str(run)):
            raise ServerError(f"--lora {served}={run}: is not a run with an adapter")
        adapters[served] = adapter_folder(run)
        rank = max(rank, _rank(adapters[served]))
        recipe = run_recipe(run).model
        base = resolve_base(recipe.base) if original else trained_base(recipe)
        if model is None:
            model, revision = base, recipe.revision if base == recipe.base else None
        if base != model:
            raise ServerError(
                f"{run}: its adapter was trained on {recipe.base}, and the server's model is {model}; serve it on "
                "another --port"
            )
        with readable(f"{adapters[served]}: the tokenizer"):
            tokenizers[served] = AutoTokenizer.from_pretrained(adapters[served], trust_remote_code=False)
        for part, of in SHARED.items():
            if of(tokenizers[served]) != of(tokenizers[first]):
                raise ServerError(
                    f"{run}: its {part} differs from that of {runs[first]}, and a server has one for all adapters; "
                    "serve it on another --port"
                )
    parsers = {parser for run, of in tokenizers.items() if (parser := parser_in(of, adapters[run]))}
    if len(parsers) > 1:
        raise ServerError(f"the runs' tool calls have the parsers {', '.join(sorted(parsers))}; serve each by itself")
    ends = stop_tokens(generation_config(str(model), revision).eos_token_id, tokenizers[first])
    return Served(
        str(model),
        name,
        adapters,
        adapters[first],
        revision,
        next(r for r in RANKS if r >= rank),
        tuple(ends),
        next(iter(parsers), None),
    )


def trained_base(model: Model) -> str:
    """Hub id or folder of the base that training computed with; for a quantized one its dequantized weights in
    bfloat16, written into the cache folder once."""
    base = resolve_base(model.base)
    if not is_quantized(model.quantization) or model.quantization is None:
        return base
    weights = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    origin = [file_sha256(file) for file in weights] or [model.base, str(model.revision)]
    digest = text_sha256(json.dumps([origin, model.quantization.model_dump(), model.dtype, version("bitsandbytes")]))
    folder = cache_dir() / f"{Path(base).name}-dequantized-{digest[:16]}"

    def build(temporary: Path) -> None:
        print(f"writing the dequantized base of training to {folder} (once)", file=sys.stderr, flush=True)
        loaded = load_base(model, default_device())
        if getattr(loaded, "is_quantized", False):
            loaded = cast(Any, loaded).dequantize(dtype=torch.bfloat16)
        loaded.config.use_cache = True
        cast(Any, loaded).to(torch.bfloat16).save_pretrained(temporary)
        load_tokenizer(model).save_pretrained(temporary)

    return str(build_once(folder, build))


def _rank(adapter: Path) -> int:
    """The adapter's largest rank. Raises ServerError if vLLM can't serve it, or would open a pickle."""
    for pickle in PICKLES:
        if (adapter / pickle).exists():
            raise ServerError(f"{adapter / pickle}: is a pickle, which can run code, so it is never opened; remove it")
    with readable(str(adapter)):
        config = json.loads((adapter / "adapter_config.json").read_text())
    if reasons := unserved(config):
        raise ServerError(f"{adapter}: vLLM serves no adapter with {', '.join(reasons)}; {other_way(adapter)}")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1]:
        raise ServerError(f"{adapter}: its rank {rank} exceeds vLLM's {RANKS[-1]}; `graft export` the run, serve that")
    return int(rank)
