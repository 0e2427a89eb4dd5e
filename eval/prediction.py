"""What a system answers to one question."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    text: str  # the answer, without a thought before it
    new_tokens: int
    finished: bool  # the model ended its turn; False: cut at max_new_tokens
    asked: bool = True  # False: prompt and answer may need more positions than the model has, so it counts as wrong
    probability: float | None = None  # of the answer, if the system reports one
    written: str | None = None  # all that the model wrote, if it is more than the answer
    ids: tuple[int, ...] = ()  # of the answer and the token that ends it, if it was generated in-process


NOT_ASKED = Prediction("", 0, finished=False, asked=False)
