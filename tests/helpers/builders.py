"""Small models, recipes, examples and files that tests are built of."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    set_seed,
)

from data.conversation import Conversation
from data.encode.chat import Example
from data.encode.example_store import Examples, Writer
from data.readers.source import FileSource, read_all


def save_tiny(config, folder: Path, tokenizer) -> Path:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_qwen3(folder: Path, tokenizer, hidden: int = 128) -> Path:
    """A tiny Qwen3 with heads that vLLM serves and a context of 4,096 tokens."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=hidden // 2, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    return save_tiny(config, folder, tokenizer)


def read_squad(path: Path, version: int = 2) -> list[Conversation]:
    """Every question of a SQuAD file in file order."""
    return read_all(FileSource(str(path), f"squad_v{version}"), f"squad_v{version}")


def stored(folder: Path, examples: Sequence[Example], weights: Sequence[float] | None = None) -> Examples:
    """The examples as training reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(folder)
    for example, weight in zip(examples, weights or [1.0] * len(examples), strict=True):
        writer.add(example, weight)
    writer.close()
    return Examples(folder)


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def write_recipe(path: Path, base: Path | str, **changes: str) -> Path:
    """A small runnable recipe; changes replace whole top-level sections, as YAML text."""
    sections = {
        "task": "squad_v2",
        "model": f"{{base: '{base}', dtype: float32}}",
        "tune": "{method: lora, r: 4, lora_alpha: 8, target_modules: all-linear}",
        "data": "{train: data/samples/squad_train.json, max_contexts: 4}",
        "train": f"{{examples_per_step: 6, learning_rate: 1e-3, output_dir: '{path.parent / 'run'}'}}",
        "eval": "{data: data/samples/squad_dev.json, limit: 12, max_new_tokens: 4}",
    } | changes
    path.write_text("".join(f"{key}: {value}\n" for key, value in sections.items()))
    return path
