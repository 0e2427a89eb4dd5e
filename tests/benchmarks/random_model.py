"""Write a model of a known shape with random weights: what a step costs, in time and memory, does not depend on them.

    python tests/benchmarks/random_model.py qwen2.5-7b FOLDER

The tokenizer is that of the embedded base, whose ids all shapes have. On a GPU where there is one; 15 GB for the 7B.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # started as a file: the repository root, not tests/benchmarks/

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from sft.models.load import default_device, load_tokenizer
from sft.recipe.schema import Model
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.throughput import SMOLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    tokenizer = load_tokenizer(Model(base=SMOLLM))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    with default_device():
        config = Qwen2Config(**SHAPES[options.shape], **ids)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(options.folder, max_shard_size="4GB")
    tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
