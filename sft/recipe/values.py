"""Types of a recipe's values: what is accepted, and how a short form is written out."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from data.readers.prompts import check_prompt


def none_is_auto(value: Any) -> Any:
    return "auto" if value is None else value


def no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _as_trackers(value: Any) -> Any:
    if isinstance(value, str):  # as TrainingArguments takes it
        return () if value == "none" else (value,)
    return value


def regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


Number = Annotated[float, BeforeValidator(no_bool)]
Prompt = Annotated[str, AfterValidator(check_prompt)]
Count = Annotated[int, BeforeValidator(no_bool), Field(ge=1)]
Rows = Annotated[int, BeforeValidator(no_bool), Field(ge=0)]
MaxSteps = Annotated[int, BeforeValidator(no_bool), Field(ge=-1)]
Seed = Annotated[int, BeforeValidator(no_bool), Field(ge=0, lt=2**32)]
Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "squad_v1", "squad_v2", "newsgroups"]
Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"], ...], BeforeValidator(_as_trackers)
]
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "cosine_with_restarts",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
ScheduleArguments = dict[str, int | float | str]
