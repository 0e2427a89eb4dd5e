"""Progress of work that takes more than a few seconds: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data.terminal import Console, print

T = TypeVar("T")
LINE_EVERY_S = 15.0
_silent = ContextVar("silent", default=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses progress bars, for short repeated calls."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


class Bar:
    """A counter towards a total (None if unknown); `update` adds a note (loss, speed)."""

    def __init__(self, description: str, total: int | None, done: int = 0) -> None:
        self.description, self.total, self.first = description, total, done
        self.start = self.shown = time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty() and not _silent.get():
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(description, total=total, completed=done, note="")
            self.bar.start()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
        elif done and (now - self.shown > LINE_EVERY_S or (done == self.total and now - self.start > LINE_EVERY_S)):
            self.shown = now
            line = f"{self.description} {done}"
            if self.total is not None:
                left = (now - self.start) / max(1, done - self.first) * (self.total - done)
                line += f"/{self.total}, {left:.0f} s left"
            line += f", {now - self.start:.0f} s  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items under a progress bar; give `total` for items without a length."""
    bar = Bar(description, total if total is not None else len(items) if isinstance(items, Sized) else None)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(done)
    finally:
        bar.close()
