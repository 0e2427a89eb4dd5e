"""vLLM's log -> why it stopped, and the remedy."""

import re
from pathlib import Path

# a pattern of what vLLM 0.32 writes, and the sentence to print, filled in with the pattern's groups
REASONS = [
    (
        r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed.*?KV cache memory \(([\d.]+) GiB\)\.\s+"
        r"(?:Based on the available memory, the estimated maximum model length is (\d+))?",
        "the model takes {0} tokens, whose cache needs {1} GiB, and there are {2} GiB; pass "
        "--vllm=--max-model-len={3}, or give it more memory: VLLM_CPU_KVCACHE_SPACE=GIB on a CPU, "
        "--vllm=--gpu-memory-utilization=0.95 on a GPU",
    ),
    (
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "--max-model-len {0} exceeds the model's {1} positions; lower it",
    ),
    (
        r"Available memory on node \d+ \(([\d.]+)/[\d.]+ GiB\) on kv cache\s+allocation is less than requested "
        r"memory for kv \(([\d.]+)",
        "out of memory: a cache of {1} GiB is asked for and {0} GiB are free; lower VLLM_CPU_KVCACHE_SPACE (GiB) or "
        "end other programs",
    ),
    (
        r"Free memory on device \S+ \(([\d.]+)/[\d.]+ GiB\) on startup is less than desired GPU memory utilization "
        r"\([\d.]+, ([\d.]+) GiB",
        "out of memory: {1} GiB of the GPU are asked for and {0} GiB are free; lower "
        "--vllm=--gpu-memory-utilization or end other programs",
    ),
    (
        r"No available memory for the cache blocks|OutOfMemoryError|CUDA out of memory|can't allocate memory"
        r"|MemoryError",
        "out of memory; lower VLLM_CPU_KVCACHE_SPACE (GiB, on a CPU) or --vllm=--max-model-len=N, spread the model "
        "with --tensor-parallel-size, or end other programs",
    ),
    (
        r"LoRA rank (\d+) is greater than max_lora_rank (\d+)",
        "the adapter's rank {0} exceeds --max-lora-rank {1}; leave --vllm=--max-lora-rank out, or export the run",
    ),
    (
        r"(\w+) does not support LoRA",
        "vLLM serves no adapters on a {0}; `graft export` the run and serve that",
    ),
    (r"[Aa]ddress already in use", "another program has taken the port; name another with --port"),
]


def why_it_stopped(log: Path, code: int) -> str:
    """One sentence with the remedy if the log's reason is a known one, else the log's last errors."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    for pattern, sentence in REASONS:
        if reason := re.search(pattern, text, re.DOTALL):
            return f"{sentence.format(*reason.groups('N'))}; log: {log}"
    if code == 128 + 9:
        return f"vLLM was killed (signal 9), most likely because the machine is out of memory; see {log}"
    errors = [line for line in text.splitlines() if "Error" in line][-3:]
    return "\n".join([f"vLLM stopped with code {code}; see {log}", *errors])
