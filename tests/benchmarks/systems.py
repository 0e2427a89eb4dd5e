"""How throughput.py trains with each system: its settings, its command, and what it leaves to be read.

LLaMA-Factory 0.9.5 wants older libraries than Graft, so it lives in a virtual environment of its own. On a machine
whose pip installs CPU builds of torch:

    python3 -m venv VENV
    VENV/bin/pip install torch==2.13.0
    VENV/bin/pip install torch==2.13.0 torchaudio==2.11.0 llamafactory==0.9.5
    VENV/bin/pip uninstall -y torchvision                            # a CUDA build: transformers can't be imported
    rm VENV/lib/python3*/site-packages/torchaudio/lib/_torchaudio*.so  # likewise; torchaudio goes on without it
"""

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import AutoTokenizer

from tests.benchmarks.passages import Workload

ROOT = Path(__file__).parents[2]
PACK_TOKENS = 1024  # a row of trl-packing


class BenchmarkError(Exception):
    """A system that did not train as it was told to; the text ends with its last lines."""


@dataclass(frozen=True)
class Settings:
    """What all systems share. `base` is a folder; `batch` questions make an optimizer step."""

    base: str
    batch: int = 8
    r: int = 16
    lora_alpha: int = 32
    learning_rate: float = 5e-4
    seed: int = 42
    max_steps: int = -1
    gpu: bool = False
    llamafactory: Path | None = None


@dataclass(frozen=True)
class Measurement:
    """One training in a process of its own. `seconds`: training alone; `wall_seconds`: the whole process."""

    system: str
    seconds: float
    wall_seconds: float
    peak_memory_gib: float
    questions: int
    executed_tokens: int
    trained_tokens: int
    dtype: str
    losses: list[float] = field(repr=False)
    steady_questions_per_s: float | None = None  # without the first step, Graft only
    start_seconds: float | None = None  # before the first step, Graft only


@dataclass(frozen=True)
class System:
    what: str
    command: Callable[[Path, Workload, Settings], list[str]]
    read: Callable[[Path, Workload, Settings], dict[str, Any]]
    layout: Literal["tree", "flat", "padded"]
    dtype: str = ""  # of its matrix products; Graft chooses by the machine, and its run folder says which


def measure(name: str, workload: Workload, folder: Path, settings: Settings) -> Measurement:
    """Train in a process of its own in `folder`. Raises BenchmarkError where it fails."""
    system = SYSTEMS[name]
    folder.mkdir(parents=True)
    command = system.command(folder, workload, settings)
    began = time.time()
    wall_seconds, resident = run(command, folder / "log.txt", settings.gpu)
    found = {"dtype": system.dtype} | system.read(folder, workload, settings)
    on_device = found.pop("device_memory_gib", float("nan"))  # LLaMA-Factory does not tell
    peak_memory_gib = on_device if settings.gpu else resident
    if "began" in found:
        found["start_seconds"] = round(found.pop("began") - began, 2)
    return Measurement(name, wall_seconds=round(wall_seconds, 2), peak_memory_gib=round(peak_memory_gib, 3), **found)


def run(command: list[str], log: Path, gpu: bool = False) -> tuple[float, float]:
    """Wall seconds and peak resident memory in GiB of a process on all cores, without a network. Linux only."""
    own = {
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    } | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | own)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise BenchmarkError(f"{' '.join(command)} ended with exit code {process.returncode}:\n{tail}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def graft(
    model: dict[str, str] | None = None, data: dict[str, bool] | None = None, train: dict[str, bool] | None = None
) -> Callable[[Path, Workload, Settings], list[str]]:
    """What is added to these sections of the recipe; all else is Graft's default."""

    def command(folder: Path, workload: Workload, settings: Settings) -> list[str]:
        recipe = {
            "task": "squad_v2",
            "model": {"base": settings.base, **(model or {})},
            "tune": {"method": "lora", "r": settings.r, "lora_alpha": settings.lora_alpha, "target_modules": "all-linear"},
            "data": {"train": str(workload.squad), "max_length": workload.max_length, **(data or {})},
            "train": {
                "learning_rate": settings.learning_rate, "examples_per_step": settings.batch, "seed": settings.seed,
                "num_train_epochs": 1, "max_steps": settings.max_steps, "save_strategy": "no",
                "output_dir": str(folder / "run"), **(train or {}),
            },
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return [sys.executable, "sft/train.py", str(folder / "recipe.yaml")]

    return command


def read_graft(folder: Path, workload: Workload, settings: Settings) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    steady = None
    if len(rows) > 1:
        steady = (last["examples"] - first["examples"]) / (last["seconds"] - first["seconds"])
    return {
        "seconds": last["seconds"],
        "questions": last["examples"],
        "executed_tokens": last["executed_tokens"],
        "trained_tokens": workload.trained_tokens,
        "losses": [row["loss"] for row in rows],
        "steady_questions_per_s": steady,
        "dtype": yaml.safe_load((folder / "run" / "recipe.yaml").read_text())["model"]["dtype"],
        "device_memory_gib": max(row["peak_memory_gib"] for row in rows),
        "began": (folder / "run" / "tensorboard").stat().st_mtime,  # when the first step began, its one file was made
    }


def trl(micro_batch: int | None = None, **own: Any) -> Callable[[Path, Workload, Settings], list[str]]:
    """SFTTrainer in tests/benchmarks/train_trl.py; `own` are arguments of SFTConfig, all others are its defaults.
    A step is one micro-batch, or several of `micro_batch` questions."""

    def command(folder: Path, workload: Workload, settings: Settings) -> list[str]:
        together = min(micro_batch or settings.batch, settings.batch)
        arguments = {
            "output_dir": str(folder / "trl"), "learning_rate": settings.learning_rate, "seed": settings.seed,
            "num_train_epochs": 1, "max_steps": settings.max_steps, "max_length": workload.max_length,
            "per_device_train_batch_size": together, "gradient_accumulation_steps": settings.batch // together,
            "use_cpu": not settings.gpu, "save_strategy": "no", "report_to": "none", "logging_steps": 1,
        } | own  # fmt: skip
        if own.get("packing"):
            mean = workload.logical_tokens / workload.questions
            arguments |= {
                "max_length": max(PACK_TOKENS, workload.max_length),  # it would cut longer ones
                "per_device_train_batch_size": 1,  # its collator joins the rows of a batch, and attention is T^2 there
                "gradient_accumulation_steps": max(1, round(settings.batch * mean / PACK_TOKENS)),
            }
        lora = {"r": settings.r, "lora_alpha": settings.lora_alpha, "lora_dropout": 0.0, "target_modules": "all-linear"}
        spec = {"base": settings.base, "rows": str(workload.rows), "arguments": arguments, "lora": lora}
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        return [sys.executable, "tests/benchmarks/train_trl.py", str(folder / "spec.json"), str(folder / "result.json")]

    return command


def read_trl(folder: Path, workload: Workload, settings: Settings) -> dict[str, Any]:
    return {"questions": workload.questions, **json.loads((folder / "result.json").read_text())}


def llamafactory(folder: Path, workload: Workload, settings: Settings) -> list[str]:
    """Its defaults; the rows as ChatML, which is what the base's own template renders."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for c in workload.conversations:
            file.write(json.dumps({"messages": list(c.messages)}) + "\n")
    tags = {f"{role}_tag": role for role in ("user", "assistant", "system")}
    info = {
        "file_name": "rows.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", **tags},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"rows": info}), encoding="utf-8")
    arguments = {
        "model_name_or_path": settings.base, "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": settings.r, "lora_alpha": settings.lora_alpha, "lora_target": "all",
        "dataset": "rows", "dataset_dir": str(folder), "template": "chatml", "cutoff_len": workload.max_length,
        "output_dir": str(folder / "out"), "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": 1, "learning_rate": settings.learning_rate, "seed": settings.seed,
        "num_train_epochs": 1.0, "max_steps": settings.max_steps, "save_strategy": "no", "report_to": "none",
        "logging_steps": 1, "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(arguments), encoding="utf-8")
    return [str(settings.llamafactory / "bin" / "llamafactory-cli"), "train", str(folder / "train.yaml")]  # type: ignore[operator]


def read_llamafactory(folder: Path, workload: Workload, settings: Settings) -> dict[str, Any]:
    """Raises BenchmarkError where the ids of the row that it prints are not those of the base's own template."""
    ids, labels = printed_example((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    rendered = [tokenizer.apply_chat_template(list(c.messages), return_dict=False) for c in workload.conversations]
    if ids not in rendered:
        raise BenchmarkError(f"LLaMA-Factory trains on {tokenizer.decode(ids)!r}, which is none of the rows")
    example = workload.examples[rendered.index(ids)]
    more = sum(label != -100 for label in labels) - sum(example.loss_mask)  # it also trains the line break at the end
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    return {
        "seconds": json.loads((folder / "out" / "train_results.json").read_text())["train_runtime"],
        "questions": workload.questions,
        "executed_tokens": state["num_input_tokens_seen"],
        "trained_tokens": workload.trained_tokens + more * workload.questions,
        "losses": [row["loss"] for row in state["log_history"] if "loss" in row],
    }


def printed_example(log: str) -> tuple[list[int], list[int]]:
    """Ids and labels of the training example that LLaMA-Factory prints before it trains."""
    found = [re.search(rf"^{name}:\n(\[.*?\])", log, re.DOTALL | re.MULTILINE) for name in ("input_ids", "label_ids")]
    if not all(found):
        raise BenchmarkError(f"LLaMA-Factory printed no training example; its log ends with\n{log[-800:]}")
    ids, labels = (ast.literal_eval(match[1]) for match in found if match)
    return ids, labels


# What is fastest with TRL 1.16 on 2 cores: micro-batches of 2 beat one of 8 (1.65 against 1.01 questions/s) and of 1
# (1.48), bf16 autocast over a bf16 base beats that base alone (1.51), where the CPU's bf16 is as fast as this one's.
BEST: dict[str, Any] = {
    "micro_batch": 2, "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length",
}  # fmt: skip
COMPILED = {"compile_layers": True}  # by default only where a run is long enough
BF16: dict[str, Any] = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}

SYSTEMS = {
    "graft": System("Graft, defaults", graft(), read_graft, "tree"),
    "graft-fp32": System("Graft, model.dtype: float32", graft({"dtype": "float32"}), read_graft, "tree"),
    "graft-flat": System("Graft, data.share_prefixes: false", graft(data={"share_prefixes": False}), read_graft, "flat"),
    "graft-compiled": System("Graft, compiled layers", graft(train=COMPILED), read_graft, "tree"),
    "graft-fp32-compiled": System(
        "Graft, model.dtype: float32, compiled layers", graft({"dtype": "float32"}, train=COMPILED), read_graft, "tree"
    ),
    "trl": System(
        "TRL SFTTrainer, defaults: checkpointing, bf16 autocast over an fp32 base",
        trl(), read_trl, "padded", "bfloat16",
    ),
    "trl-grouped": System(
        "TRL, fp32, no checkpointing, group_by_length",
        trl(gradient_checkpointing=False, train_sampling_strategy="group_by_length", bf16=False),
        read_trl, "padded", "float32",
    ),
    "trl-best": System(
        "TRL, fp32, no checkpointing, micro-batches of 2, group_by_length",
        trl(**BEST, bf16=False), read_trl, "padded", "float32",
    ),
    "trl-best-bf16": System(
        "TRL, the same with base and autocast in bf16", trl(**BEST, **BF16), read_trl, "padded", "bfloat16"
    ),
    "trl-grouped-bf16": System(
        "TRL, base and autocast in bf16, no checkpointing, micro-batches of 16, group_by_length",
        trl(16, gradient_checkpointing=False, train_sampling_strategy="group_by_length", **BF16),
        read_trl, "padded", "bfloat16",
    ),
    "trl-packing": System(
        f"TRL, fp32, no checkpointing, rows of {PACK_TOKENS} tokens packed by bfd, as many a step as hold about as many "
        "questions",
        trl(packing=True, gradient_checkpointing=False, bf16=False), read_trl, "flat", "float32",
    ),
    "trl-packing-bf16": System(
        "TRL, the same with base and autocast in bf16",
        trl(packing=True, gradient_checkpointing=False, **BF16), read_trl, "flat", "bfloat16",
    ),
    "llamafactory": System(
        "LLaMA-Factory, defaults: checkpointing, base in the dtype it is stored in, bf16",
        llamafactory, read_llamafactory, "padded", "bfloat16",
    ),
}  # fmt: skip
