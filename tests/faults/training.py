"""A small real training as a process that can be killed, and what must be equal in the end.

Libraries are imported once; a command is a fork of that process. It must have no pool of threads then, which a fork would
lack: whoever imports this file as a program sets OMP_NUM_THREADS=1 first, and builds models in a fork (make_in_fork).
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.utils.tensorboard
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig

import sft.training.trainer  # noqa: F401
from sft.cli import app
from sft.models.resolve import resolve_base
from sft.runs.metrics import read_metrics
from tests.helpers.builders import save_tiny, write_recipe
from tests.helpers.places import SMOLLM

STEPS, SAVE_STEPS = 40, 3
WAIT_S = 120.0


class Command:
    """`graft ARGUMENTS` in a fork of this process, with further variables; what it prints goes to `log`."""

    def __init__(self, arguments: Sequence[object], log: Path, variables: Mapping[str, object] | None = None) -> None:
        self.log = log
        log.write_text("")
        self.code: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.environ.update({name: str(value) for name, value in (variables or {}).items()})
            self._run([str(a) for a in arguments])

    def _run(self, arguments: list[str]) -> None:
        code = 1
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            torch.set_num_threads(1)
            app(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        end = time.monotonic() + WAIT_S
        while not self.ended():
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                raise SystemExit(f"a command hung for {WAIT_S:.0f} s:\n{self.log.read_text()}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def kill(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)


def make_recipe(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(SMOLLM))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, bos_token_id=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    base = save_tiny(config, folder / "base", tokenizer)
    return write_recipe(
        folder / "recipe.yaml",
        base,
        tune="{method: lora, r: 4, lora_dropout: 0.1, target_modules: all-linear}",
        data="{train: data/samples/squad_train.json, max_contexts: 10, pack_tokens: 512, share_prefixes: true}",
        train=f"{{examples_per_step: 3, max_steps: {STEPS}, learning_rate: 1e-3, save_strategy: steps, "
        f"save_steps: {SAVE_STEPS}, logging_steps: 2}}",
    )


def make_in_fork(folder: Path) -> Path:
    """Made by a fork: building a model starts threads."""
    pid = os.fork()
    if not pid:
        make_recipe(folder)
        os._exit(0)
    os.waitpid(pid, 0)
    return folder / "recipe.yaml"


def result(run: Path, processes: int = 1) -> dict[str, object]:
    """All that must be equal, bit for bit."""
    last = run / f"checkpoint-{STEPS}"
    found: dict[str, object] = {"adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes()}
    for name in ("optimizer.safetensors", *(f"process-{i}.safetensors" for i in range(processes))):
        with safe_open(last / name, framework="np") as file:
            found[name] = file.metadata(), {key: file.get_tensor(key).tobytes() for key in sorted(file.keys())}
    kept = ("step", "loss", "grad_norm", "learning_rate", "examples", "executed_tokens")
    found["metrics"] = [{key: row[key] for key in kept} for row in read_metrics(run) if "loss" in row]
    return found
