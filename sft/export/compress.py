"""Compress a model with llm-compressor. Its own Python runs this file, as it pins a different transformers than Graft.

PYTHON sft/export/compress.py MODEL OUT SCHEME ROWS.json (W4A16, W8A8 or FP8_DYNAMIC, as compressed-tensors calls them)
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

GROUPS = (128, 64, 32)  # values that share a scale; vLLM has kernels for these sizes


def compress(model_folder: Path, out: Path, scheme: str, rows: list[list[int]]) -> None:
    """GPTQ calibrated on rows of token ids; a floating-point scheme only rounds, without calibration."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto", trust_remote_code=False)
    settings = preset_name_to_scheme(scheme, ["Linear"])
    if settings.weights.group_size:
        widths = [
            m.in_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"
        ]
        fitting = [size for size in GROUPS if all(width % size == 0 for width in widths)]
        if not fitting:
            sys.exit(f"{scheme} needs layers whose width is a multiple of {GROUPS[-1]}; use w8a8")
        settings.weights.group_size = fitting[0]
    arguments = {"config_groups": {"group_0": settings}, "ignore": ["lm_head"]}
    if scheme.startswith("FP8"):
        oneshot(model=model, recipe=QuantizationModifier(**arguments))
    else:
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        oneshot(
            model=model,
            dataset=data,
            recipe=GPTQModifier(**arguments),
            num_calibration_samples=len(rows),
            max_seq_length=max(map(len, rows)),
        )
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    folder, out, scheme, rows = sys.argv[1:]
    compress(Path(folder), Path(out), scheme, json.loads(Path(rows).read_text()))
