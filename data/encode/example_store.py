"""Encoded examples on disk, in an Arrow file that is memory-mapped, so that memory does not grow with its size.

A store is a folder of data/cache.py: if it exists it is whole, and its key names everything that it depends on.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.encode.chat import Example

FILE = "examples.arrow"
ROWS = 4096  # in a record batch
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("context", pa.string()),
        ("where", pa.string()),
        ("weight", pa.float32()),
    ]
)


class Examples(Sequence[Example]):
    """The examples of a store, read one at a time. `contexts` and `weights` are loaded at first use."""

    def __init__(self, folder: Path) -> None:
        self.table = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def contexts(self) -> list[str]:
        return list(self.table["context"].to_pylist())

    @cached_property
    def weights(self) -> list[float]:
        return [round(w, 6) for w in self.table["weight"].to_pylist()]

    def sha256(self) -> str:
        """Digest of what is trained: ids, loss masks and weights, in order."""
        digest = hashlib.sha256()
        for name in ("ids", "loss_mask"):
            for chunk in self.table[name].chunks:
                digest.update(chunk.value_lengths().to_numpy())
            for chunk in self.table[name].chunks:
                digest.update(chunk.flatten().to_numpy())
        for chunk in self.table["weight"].chunks:
            digest.update(chunk.to_numpy())
        return digest.hexdigest()

    def distinct_ids(self) -> set[int]:
        """Every token id that an example holds."""
        return {int(i) for chunk in self.table["ids"].chunks for i in np.unique(chunk.flatten().to_numpy())}

    def count_contexts(self) -> int:
        """The number of distinct contexts, counted without loading them."""
        return int(pc.count_distinct(self.table["context"]).as_py())

    def __getitem__(self, index: Any) -> Any:  # an Example, or a list of them for a slice
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids, mask = (self.table[name][index].values.to_pylist() for name in ("ids", "loss_mask"))
        return Example(ids, mask, self.contexts[index], self.table["where"][index].as_py())


class Writer:
    """Writes examples to a folder's Arrow file."""

    def __init__(self, folder: Path) -> None:
        self.file = pa.ipc.new_file(str(folder / FILE), SCHEMA)
        self.rows: list[dict[str, Any]] = []

    def add(self, example: Example, weight: float = 1.0) -> None:
        self.rows.append(
            {
                "ids": example.ids, "loss_mask": example.loss_mask, "context": example.context,
                "where": example.where, "weight": weight,
            }
        )  # fmt: skip
        if len(self.rows) == ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.file.close()

    def _flush(self) -> None:
        if self.rows:
            self.file.write_batch(pa.RecordBatch.from_pylist(self.rows, SCHEMA))
        self.rows = []
