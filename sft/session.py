"""How a command starts and ends: library noise off, the user's mistakes as one line and exit code 2."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Mistakes in recipe, data, folders or at the server end with their text on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        from sft.recipe import RecipeError

        try:
            return command(*args, **kwargs)
        except RecipeError as error:
            raise _stop(error) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except Exception as error:
            # imported by now if one of theirs was raised
            mistakes = {"DataError", "TooLong", "RunError", "ServerError", "ParityError", "TrainingDiverged"}
            if type(error).__name__ in mistakes:
                raise _stop(error) from None
            raise

    return wrapped


def quiet_libraries() -> None:
    """Only what a user can act on stays on the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|bitsandbytes|trl")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def use_all_cores() -> None:
    """This process's share of the cores; launchers leave it one thread (of two: 115 instead of 204 tokens/s)."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _stop(error: Exception) -> SystemExit:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return SystemExit(2)
