"""Encodings that stop for each text that they need, so that one request renders for many rows."""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from data.conversation import DataError
from data.encode.template import Render, render_all

R = TypeVar("R")
Steps = Generator[Render, list[str], R]  # yields each render that it needs, and gets its texts


def finished(steps: Steps[R], tokenizer: PreTrainedTokenizerBase) -> R:
    """The result of one encoding. Raises its DataError."""
    (result,) = finished_all([steps], tokenizer)
    if isinstance(result, DataError):
        raise result
    return result


def finished_all(rows: Sequence[Steps[R]], tokenizer: PreTrainedTokenizerBase) -> Iterator[R | DataError]:
    """The result of each row, in order. One request renders for all rows that wait for a text, and the worker goes on
    to the next text while one is tokenized."""
    renders: dict[int, Render] = {}  # what each unfinished row waits for
    asked: list[int] = []  # the rows whose texts come next
    results: dict[int, R | DataError] = {}

    def resume(row: int, step: Callable[[], Render]) -> None:
        try:
            renders[row] = step()
        except StopIteration as end:
            results[row] = end.value
        except DataError as error:
            results[row] = error

    def receive(texts: list[str] | DataError) -> None:
        row = asked.pop(0)
        del renders[row]
        if isinstance(texts, DataError):
            results[row] = texts
        else:
            resume(row, partial(rows[row].send, texts))

    for row, steps in enumerate(rows):
        resume(row, partial(next, steps))
    for row in range(len(rows)):
        while row not in results:
            asked[:] = sorted(renders)
            render_all([renders[each] for each in asked], tokenizer, receive)
        yield results.pop(row)
