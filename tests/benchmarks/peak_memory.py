"""Peak memory of training while the questions of a context grow and the token budget of a micro-batch stays.

    python tests/benchmarks/peak_memory.py SQUAD_FILE [--questions 1,6,10,60] [--passages 64] [--steps 10]

Each line is a training in a process of its own on the same passages, 64 questions a step; passages that have fewer
questions repeat theirs with a number in front.
"""

import argparse
import sys
import tempfile
from pathlib import Path

if not __package__:  # started as a file: the repository root, not tests/benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sft.session import quiet_libraries, use_all_cores
from tests.benchmarks.passages import read_passages, with_questions, write_workload
from tests.benchmarks.systems import Settings, measure
from tests.benchmarks.throughput import SMOLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="in SQuAD's format, .json or .json.gz")
    parser.add_argument("--questions", default="1,6,10,60", help="on each passage (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=64, help="drawn by the seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    use_all_cores()
    from sft.models.load import load_tokenizer
    from sft.models.resolve import resolve_base
    from sft.recipe.schema import Model

    settings = Settings(resolve_base(SMOLLM), batch=64, seed=options.seed, max_steps=options.steps)
    tokenizer = load_tokenizer(Model(base=settings.base))
    passages = read_passages(options.file, options.seed)[: options.passages]
    for count in map(int, options.questions.split(",")):
        with tempfile.TemporaryDirectory(prefix="graft-memory-") as scratch:
            chosen = [with_questions(passage, count) for passage in passages]
            workload = write_workload(chosen, Path(scratch) / "data", tokenizer)
            m = measure("graft", workload, Path(scratch) / "graft", settings)
        print(
            f"{count:3} questions a passage: peak {m.peak_memory_gib:.2f} GiB, {m.questions / m.seconds:.2f} questions/s, "
            f"{m.executed_tokens:,} tokens in {len(m.losses)} steps, {m.dtype}",
            flush=True,
        )


if __name__ == "__main__":
    main()
