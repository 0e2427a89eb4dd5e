"""Start and end of a command: quiet libraries, and a user's mistake as one line and an exit code."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

from data.errors import ExitCode, UserError, is_disk_full
from data.redact import print_scrubbed, scrub, secret_line
from data.terminal import print, printable

TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
VISIBLE = (
    "the command line holds a token, key or password, and every user of this machine can read it; set it in the "
    "environment instead (HF_TOKEN for the Hub, VLLM_API_KEY for a server)"
)
ROOT = Path(__file__).parents[1]
P = ParamSpec("P")
R = TypeVar("R")
UsageError: Any = BadParameter.__mro__[1]  # typer exports its subclass only


@contextmanager
def _scrubbed_usage() -> Iterator[None]:
    """The parser's errors, which show what was typed, hold no password and no control characters."""
    try:
        yield
    except UsageError as error:
        error.message = printable(scrub(error.message))
        raise


class Commands(TyperGroup):
    """All commands, with scrubbed usage errors."""

    def invoke(self, ctx: Any) -> Any:
        with _scrubbed_usage():
            return super().invoke(ctx)


class OneCommand(TyperCommand):
    """The only command of a program, with scrubbed usage errors."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _scrubbed_usage():
            return super().parse_args(ctx, args)


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """End a mistake that the user can fix with one line on stderr and its own exit code (data/errors.py).

    GRAFT_TRACEBACK=1 prints the traceback before that line.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        quiet_libraries()
        sys.excepthook = print_scrubbed
        try:
            if any(secret_line(argument.lstrip("-")) for argument in sys.argv[1:]):
                raise UserError(VISIBLE)
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise SystemExit(ExitCode.INTERRUPTED) from None
        except Exception as error:
            known = _what_to_do(error)
            if known is None:
                raise
            if os.environ.get("GRAFT_TRACEBACK", "0") not in ("", "0"):
                print_scrubbed(type(error), error, error.__traceback__)
            code, text = known
            print(f"error: {scrub(text)}", file=sys.stderr, flush=True)
            raise SystemExit(code) from None

    return wrapped


def _what_to_do(error: Exception) -> tuple[ExitCode, str] | None:
    """Exit code and text of an error that a user can fix; None for an error of our own."""
    first = str(error).splitlines()[0] if str(error) else repr(error)
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if is_disk_full(error):
        return ExitCode.DISK_FULL, f"{first}: the disk is full; make room, then start the command again"
    if isinstance(error, OSError):  # such as a file that can't be read, a model that is not on the Hub
        return ExitCode.MISTAKE, first
    if lost_a_process(error):
        return ExitCode.FAILED, (
            f"process {os.environ.get('RANK', 0)}: another process of this training has ended or can't be reached "
            f"({first}); see what it printed, then start all of them again with: graft train --resume RUN"
        )
    if is_out_of_memory(error):
        return ExitCode.OUT_OF_MEMORY, (
            f"{first} Lower data.pack_tokens or data.max_length (eval.batch_tokens when answering), "
            "or set train.gradient_checkpointing: true"
        )
    return None


def quiet_libraries() -> None:
    """Show only library messages that a user can act on; call it before the libraries are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it prints every retry without a network
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|bitsandbytes|trl")


def lost_a_process(error: BaseException) -> bool:
    """Whether one of several processes no longer hears from another."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not isinstance(error, RuntimeError):
        return False
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory, or the CPU, whose error says so only in its text."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def graft_command(*arguments: object) -> list[str]:
    """The command line of another `graft` process; -P keeps modules of the current folder, such as eval.py, out."""
    return [sys.executable, "-P", "-m", "sft.cli", *map(str, arguments)]


def child_environment() -> dict[str, str]:
    """This process's environment, with our packages on the path of a child in any folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def shards_parameters() -> bool:
    """Whether accelerate shards the parameters, which requires one dtype for all."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return fsdp or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def keeps_pickles() -> bool:
    """Whether accelerate uses FSDP or DeepSpeed, whose checkpoints hold pickles."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def tune_allocator() -> None:
    """Restart this process with glibc's cache of small blocks off, which a running process can't change.

    The cached blocks lie between activations and leave holes that the next micro-batch does not fit. Training on a CPU
    grows to 2.4 - 2.5 GiB with them and to 2.2 - 2.3 without (SmolLM2-135M, packs of 512 tokens).
    """
    if os.environ.get("GLIBC_TUNABLES") == TUNABLES:
        del os.environ["GLIBC_TUNABLES"]  # this process has it; children need not
    elif sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": TUNABLES})  # noqa: S606


def use_all_cores() -> None:
    """Use this process's share of the cores; launchers set one thread (115 instead of 204 tokens/s on two cores)."""
    import torch

    torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
