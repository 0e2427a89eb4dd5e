"""Which model, method and data.pack_tokens fit on a GPU, from the byte count; no GPU and no weights are needed.

    python tests/benchmarks/gpu_memory.py [--models qwen2.5-7b] [--gib 24 80]

Prints the table of docs/gpus.md: most tokens of a micro-batch that fit in 85 % of a card without gradient checkpointing,
and with it. One token in 10 is trained.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # started as a file: the repository root, not tests/benchmarks/

import numpy as np
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from data.terminal import print
from sft.recipe.load import check_recipe
from sft.recipe.schema import Recipe
from sft.session import quiet_libraries
from sft.training.memory import GIB, SHARE, Load, Memory, count_memory

# hidden size, layers, heads, key and value heads, inner size of the MLP, vocabulary, tied embeddings
SHAPES: dict[str, tuple[type[PretrainedConfig], int, int, int, int, int, int, bool]] = {
    "qwen2.5-0.5b": (Qwen2Config, 896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": (Qwen2Config, 1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-7b": (Qwen2Config, 3584, 28, 28, 4, 18944, 152064, False),
    "llama-3-8b": (LlamaConfig, 4096, 32, 32, 8, 14336, 128256, False),
    "qwen2.5-14b": (Qwen2Config, 5120, 48, 40, 8, 13824, 152064, False),
    "qwen2.5-32b": (Qwen2Config, 5120, 64, 40, 8, 27648, 152064, False),
    "llama-3-70b": (LlamaConfig, 8192, 80, 64, 8, 28672, 128256, False),
}
LORA = {"method": "lora", "r": 16, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True}
METHODS = {"QLoRA": (LORA, NF4, "adamw_torch_fused"), "LoRA": (LORA, None, "adamw_torch_fused"),
           "full": ({"method": "full"}, None, "adamw_8bit")}  # fmt: skip
CARDS = (12, 24, 48, 80, 141)
COUNTED = (1024, 8192, 65536)  # tokens of a micro-batch


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    kind, hidden, every, heads, kv_heads, inner, vocabulary, tied = SHAPES[shape]
    return kind(
        hidden_size=hidden, num_hidden_layers=layers or every, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip


def recipe_of(method: str) -> Recipe:
    tune, quantization, optim = METHODS[method]
    model = {"base": "owner/name", "dtype": "bfloat16", "quantization": quantization}
    return check_recipe(
        {"task": "squad_v2", "model": model, "tune": tune, "data": {"train": "a/b"}, "train": {"optim": optim}}
    )


def needed(shape: str, method: str, checkpointing: bool, tokens: int) -> Memory:
    """The memory of a training, from 2 and 4 of its layers; its temporary tensors are those of 4 layers, which bound
    those of more."""
    recipe, load = recipe_of(method), Load(tokens, tokens // 10)
    few, more = (
        count_memory(recipe, config_of(shape, layers), load, torch.device("cuda"), checkpointing) for layers in (2, 4)
    )
    rest = (SHAPES[shape][2] - 4) / 2
    parts = ("weights", "trained", "kept")
    return replace(more, **{n: getattr(more, n) + rest * (getattr(more, n) - getattr(few, n)) for n in parts})


def fitting(totals: list[float], card: float) -> str:
    """Thousands of tokens that fit, by straight lines between COUNTED: bytes are the largest of linear functions, and so
    below them."""
    tokens = int(np.interp(SHARE * card * GIB, totals, COUNTED)) if totals[0] <= SHARE * card * GIB else 0
    return f"{tokens // 1024}k{'+' if tokens == COUNTED[-1] else ''}" if tokens else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--gib", nargs="+", type=float, default=CARDS)
    options = parser.parse_args()
    quiet_libraries()
    print(
        "| model | method | weights and states, GiB | kept a token, KB | "
        + " | ".join(f"{g:g} GiB" for g in options.gib)
        + " |"
    )
    print("|---" * (4 + len(options.gib)) + "|")
    for shape in options.models:
        for method in METHODS:
            off, on = ([needed(shape, method, choice, tokens) for tokens in COUNTED] for choice in (False, True))
            kept = " / ".join(f"{memories[1].kept / COUNTED[1] / 1000:,.0f}" for memories in (off, on))
            cells = [[fitting([m.total for m in memories], card) for memories in (off, on)] for card in options.gib]
            shown = " | ".join("-" if cell == ["-", "-"] else " / ".join(cell) for cell in cells)
            base = (off[0].weights + off[0].trained) / GIB
            print(f"| {shape} | {method} | {base:.1f} | {kept} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
