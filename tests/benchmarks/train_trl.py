"""One training with TRL's SFTTrainer, started by throughput.py: python tests/benchmarks/train_trl.py SPEC RESULT"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


class Counted:
    """The trainer's own collator, and how many tokens it gave: with padding, and those that carry loss."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.executed_tokens = self.trained_tokens = 0

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collator(rows)
        self.executed_tokens += batch["input_ids"].numel()
        self.trained_tokens += int((batch["labels"] != -100).sum())
        return batch


def main(spec: Path, result: Path) -> None:
    told = json.loads(spec.read_text())
    rows = load_dataset("json", data_files=told["rows"], split="train", cache_dir=str(spec.parent / "cache"))
    trainer = SFTTrainer(
        told["base"],
        SFTConfig(**told["arguments"]),
        train_dataset=rows,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **told["lora"]),
    )
    trainer.data_collator = counted = Counted(trainer.data_collator)
    trained = trainer.train()
    found = {
        "seconds": trained.metrics["train_runtime"],
        "executed_tokens": counted.executed_tokens,
        "trained_tokens": counted.trained_tokens,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    if torch.cuda.is_available():
        found["device_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
