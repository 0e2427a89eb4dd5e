"""An encoder with a task head: load it, choose its trainable parameters, predict.

The heads are those of transformers: AutoModelForSequenceClassification, ...ForQuestionAnswering, ...ForMaskedLM.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from data.progress import track
from sft.errors import RecipeError
from sft.models.load import load_config
from sft.models.load import load_tokenizer as load_any_tokenizer
from sft.models.patterns import check_adapter_patterns
from sft.models.resolve import readable, resolve_base, stored_config
from sft.models.tune import add_adapter, train_matching
from sft.recipe.baseline_schema import PEFT_TASKS, BaselineTune, EncoderModel
from sft.recipe.schema import Model
from sft.untrusted import check_adapter, check_config

HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "extractive_qa": "AutoModelForQuestionAnswering",
    "mlm": "AutoModelForMaskedLM",
    "nsp": "BertForPreTraining",
    "features": "AutoModel",
}
PER_TOKEN = ("start_logits", "end_logits")
BATCH_TOKENS = 8192  # of a batch of predictions, padding included
Row = dict[str, Any]  # inputs of a model by name, with or without targets


def load_tokenizer(model: EncoderModel) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Raises RecipeError if it can't map tokens to characters, or can't pad."""
    tokenizer = load_any_tokenizer(Model(base=model.base, revision=model.revision))
    if not tokenizer.is_fast:
        raise RecipeError(f"model.base: {model.base}: no fast tokenizer, which maps tokens to characters; convert it")
    if tokenizer.pad_token is None:
        raise RecipeError(
            f"model.base: {model.base}: no padding token; name an encoder, as google-bert/bert-base-uncased"
        )
    return tokenizer


def load_encoder(model: EncoderModel, head: str, seed: int, labels: Sequence[str] = ()) -> PreTrainedModel:
    """The encoder in float32 with the base's head, or else a new one drawn by the seed. Raises RecipeError if a weight
    of the encoder itself is missing."""
    set_seed(seed)
    names: dict[str, Any] = {}
    if labels:
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with readable(f"model.base: {model.base}"):
        folder = resolve_base(model.base)
        check_config(stored_config(model.base, model.revision), f"model.base: {model.base}")
        config = AutoConfig.from_pretrained(folder, revision=model.revision, trust_remote_code=False, **names)
        _set_attention_dropout(config, model)
        loaded, info = getattr(transformers, HEADS[head]).from_pretrained(
            folder, config=config, revision=model.revision, use_safetensors=True, trust_remote_code=False,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    inside = "" if head == "features" else f"{loaded.base_model_prefix}."
    of_encoder = sorted(k.removeprefix(inside) for k in info["missing_keys"] if k.startswith(inside))
    loaded.drawn = [k for k in of_encoder if "pooler." in k]  # a pooler belongs to the head
    if missing := [k for k in of_encoder if "pooler." not in k]:
        raise RecipeError(
            f"model.base: {model.base}: the weight {missing[0]} is missing ({len(missing)} such weights); "
            "name a whole encoder such as google-bert/bert-base-uncased"
        )
    return cast(PreTrainedModel, loaded)


def _set_attention_dropout(config: PretrainedConfig, model: EncoderModel) -> None:
    if model.attention_dropout is None:
        return
    known = [name for name in ("attention_probs_dropout_prob", "attention_dropout") if hasattr(config, name)]
    if not known:
        raise RecipeError(f"model.attention_dropout: the config of {model.base} has no such value; leave it out")
    setattr(config, known[0], model.attention_dropout)


def positions_of(model: EncoderModel) -> int | None:
    """Tokens of the longest input; None if the config sets no limit."""
    config = load_config(model)
    positions: int | None = config.to_dict().get("max_position_embeddings")
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer"):
        positions -= 2  # they count positions from padding_idx + 1
    return positions


def check_positions(model: EncoderModel, max_seq_length: int, virtual_tokens: int = 0) -> None:
    """Raise RecipeError if PEFT's virtual tokens and an input may need more positions than the encoder has."""
    positions = positions_of(model)
    if positions is not None and max_seq_length + virtual_tokens > positions:
        virtual = f" with {virtual_tokens} virtual tokens" if virtual_tokens else ""
        raise RecipeError(
            f"data.max_seq_length {max_seq_length}{virtual} exceeds the {positions} positions of {model.base}; lower it"
        )


def tune_encoder(model: PreTrainedModel, tune: BaselineTune, objective: str, seed: int) -> PreTrainedModel:
    """The model with the trainable parameters that the method starts with."""
    set_seed(seed)  # PEFT draws the adapter's initial weights
    if tune.method in ("full", "gradual_unfreezing"):  # Unfreeze freezes before the first step
        return model
    if tune.method == "freeze":
        train_matching(model, tune.trainable)
        return model
    if tune.method == "linear_probe":
        for name, parameter in model.base_model.named_parameters():
            parameter.requires_grad_(name in cast(Any, model).drawn)
        return model
    # the new head is trained whole, as that of a classifier is
    whole = objective == "extractive_qa" and tune.peft.get("target_modules") == "all-linear"
    return add_adapter(model, tune, PEFT_TASKS[objective], {"exclude_modules": ["qa_outputs"]} if whole else {})


def depths(model: PreTrainedModel) -> tuple[dict[str, int], int]:
    """Depth of each parameter by name, and the largest depth: 0 for head and pooler, 1 for the uppermost layer, ...,
    the largest for the embeddings. Raises RecipeError if the names have no layers."""
    layers = model.config.num_hidden_layers
    depth = {}
    for name, _ in model.named_parameters():
        layer = re.search(r"\.layers?\.(\d+)\.", name)
        depth[name] = layers - int(layer[1]) if layer else (layers + 1) * ("embeddings" in name)
    if not any(0 < level <= layers for level in depth.values()):
        raise RecipeError(f"tune: {type(model).__name__} names no layers to go through; use full without layer_decay")
    return depth, layers + 1


def load_trained(
    folder: Path, objective: str, base: EncoderModel, seed: int, labels: Sequence[str] = ()
) -> PreTrainedModel:
    """A run's model in eval mode: whole weights in model/, or an adapter on its base. The run's seed draws again the
    weights that neither base nor adapter has, such as a pooler."""
    if (folder / "model").is_dir():
        return load_encoder(EncoderModel(base=str(folder / "model")), objective, 0, labels).eval()
    from peft import PeftModel

    adapter = folder / "adapter"
    check_adapter(adapter, (base.base, resolve_base(base.base)))
    encoder = load_encoder(base, objective, seed, labels)
    with readable(str(adapter)):
        check_adapter_patterns(encoder, adapter)
        model = PeftModel.from_pretrained(encoder, str(adapter))
    return cast(PreTrainedModel, model.eval())


@torch.inference_mode()
def predict(
    model: nn.Module, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, outputs: Sequence[str], bf16: bool
) -> list[tuple[np.ndarray, ...]]:
    """The named outputs of each row in float32, in order; outputs per token are without padding. Rows of similar length
    share a batch of at most BATCH_TOKENS."""
    model.eval()
    device = next(model.parameters()).device
    lengths = [len(row["input_ids"]) for row in rows]
    predictions: list[tuple[np.ndarray, ...]] = [()] * len(lengths)
    for batch in track(list(_batches(lengths)), "predict, in batches"):
        inputs = pad([rows[i] for i in batch], tokenizer)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        values = {name: output[name].float().cpu().numpy() for name in outputs}
        for j, i in enumerate(batch):
            predictions[i] = tuple(v[j, : lengths[i]] if n in PER_TOKEN else v[j] for n, v in values.items())
    return predictions


def pad(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Rows as tensors (rows, longest), padded on the right, with an attention mask; targets as tensors (rows)."""
    return dict(tokenizer.pad(list(rows), padding_side="right", return_attention_mask=True, return_tensors="pt"))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):  # so the last row of a batch is its longest
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
