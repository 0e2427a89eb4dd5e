"""Time and memory of a merge, file by file, beside `cp` of the base's files.

    python tests/benchmarks/merge_speed.py [--gib 3] [--rounds 3] [--folder DIR] [--warm]

A random bfloat16 Llama of that size, once in several files and once in one, and a LoRA of rank 16 on all linear layers.
Each copy and each merge is a process of its own, by turns; each starts with the base's files out of the page cache
(--warm: in it) and ends when its files are on the disk (fsync). Seconds are those of the copy or merge itself, without
the start of Python. Memory is the largest RssAnon of the whole process, sampled: the base's files are mapped, and the
kernel drops their pages if it needs the room.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

if not __package__:  # started as a file: the repository root, not tests/benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from sft.session import quiet_libraries, use_all_cores

RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=3.0, help="size of the base (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--folder", help="on the disk to measure; default: the folder for temporary files")
    parser.add_argument("--warm", action="store_true", help="leave the base's files in the page cache")
    parser.add_argument("--merge", nargs=3, metavar=("BASE", "ADAPTER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    use_all_cores()
    if options.merge:
        print(json.dumps(merge_here(*map(Path, options.merge))))
        return
    with tempfile.TemporaryDirectory(prefix="graft-merge-", dir=options.folder) as scratch:
        print("| base | cp | merge | merge / cp | peak memory of the merge |\n|---|---|---|---|---|")
        for name, shard_gib in (("several files", 1.0), ("one file", options.gib + 1)):
            folder = Path(scratch) / "base"
            size = write_base(folder, options.gib, shard_gib)
            write_adapter(folder, Path(scratch) / "adapter")
            seconds: dict[str, list[float]] = {"cp": [], "merge": []}
            peaks = []
            for _ in range(options.rounds):
                for way in seconds:
                    out = Path(scratch) / "out"
                    out.mkdir()
                    settle(folder, options.warm)
                    if way == "cp":
                        seconds[way].append(copy_there(folder, out))
                    else:
                        told = merge_there(folder, Path(scratch) / "adapter", out)
                        seconds[way].append(told["seconds"])
                        peaks.append(told["peak_gb"])
                    shutil.rmtree(out)
            cp, merge = (statistics.median(seconds[way]) for way in ("cp", "merge"))
            every = {way: ", ".join(f"{s:.1f}" for s in taken) for way, taken in seconds.items()}
            print(
                f"| {size / 1e9:.2f} GB in {name} | {cp:.1f} s ({every['cp']}) | {merge:.1f} s ({every['merge']}) "
                f"| {merge / cp:.2f} | {max(peaks):.2f} GB |",
                flush=True,
            )
            shutil.rmtree(folder)


def write_base(folder: Path, gib: float, shard_gib: float) -> int:
    """A random Llama of that size; its bytes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    width, inner = 2048, 5632
    layer = 2 * (2.5 * width * width + 3 * width * inner)  # bytes
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=width, intermediate_size=inner, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=round((gib * 2**30 - 4 * 32_000 * width) / layer),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=int(shard_gib * 2**30))
    return sum(value.nbytes for value in model.state_dict().values())


def write_adapter(base: Path, folder: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, module.in_features) * 0.02
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.02
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM").save_pretrained(folder)


def settle(folder: Path, warm: bool) -> None:
    """Nothing waits for the disk any more, and the base's files are in memory or not."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            if warm:
                while opened.read(2**24):
                    pass
            else:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_there(base: Path, out: Path) -> float:
    files = [str(file) for file in sorted(base.iterdir())]
    start = time.monotonic()
    subprocess.run(["cp", *files, str(out)], check=True)
    subprocess.run(["sync", *(str(out / Path(file).name) for file in files)], check=True)
    return time.monotonic() - start


def merge_there(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--merge", str(base), str(adapter), str(out)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def merge_here(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    from data.atomic import flush
    from sft.export.merge import read_merge, write_merge

    peak, finished = [0], threading.Event()
    threading.Thread(target=sample_memory, args=(peak, finished), daemon=True).start()
    start = time.monotonic()
    facts = write_merge(read_merge(base, adapter, torch.bfloat16), out)
    for file in out.iterdir():
        flush(file)
    seconds = time.monotonic() - start
    finished.set()
    if facts["unchanged"]:
        raise RuntimeError(f"{facts['unchanged'][0]} was not merged")
    return {"seconds": seconds, "peak_gb": peak[0] / 1e9}


def sample_memory(peak: list[int], finished: threading.Event) -> None:
    """Keep the largest RssAnon of this process, in bytes, in `peak`."""
    while not finished.wait(0.02):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak[0] = max(peak[0], next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")))


if __name__ == "__main__":
    main()
