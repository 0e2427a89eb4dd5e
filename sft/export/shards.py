"""Safetensors files read and written tensor by tensor, so that no file is ever in memory.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the header's length; a JSON header of dtypes,
shapes and byte ranges; raw little-endian values. A file whose tensors are known can be written in any order and by
several threads.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from sft.models.resolve import readable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 16 * 2**20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# what copy_file_range answers where the kernel can't copy between these two files
NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Tensor):
    """A tensor in a file; `start` is its first byte there."""

    file: Path
    start: int

    def read(self, rows: range | None = None) -> torch.Tensor:
        """The values, or some rows, by plain reads: mapped pages would count as memory of this process."""
        shape = self.shape if rows is None else (len(rows), *self.shape[1:])
        start = self.start if rows is None else self.start + rows.start * (self.bytes // self.shape[0])
        values = torch.empty(shape, dtype=self.dtype)
        view, done = _bytes_of(values), 0
        with self.file.open("rb", buffering=0) as file:
            while done < len(view):  # one call reads at most 2 GiB
                count = os.preadv(file.fileno(), [view[done:]], start + done)
                if not count:
                    raise OSError(f"{self.file} ends in the middle of a tensor")
                done += count
        return values


def shard_files(folder: Path) -> list[Path]:
    """The files of a model, in the index's order; a single file goes before them, as transformers has it."""
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        with readable(str(folder / INDEX)):
            names = dict.fromkeys(json.loads((folder / INDEX).read_text())["weight_map"].values())
        if strange := [name for name in names if Path(name).name != name]:
            raise OSError(f"{folder / INDEX} names {strange[0]}, which is no file beside it")
        return [folder / name for name in names]
    return [folder / SINGLE]


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a file by name, in the order of their bytes. Raises KeyError for a dtype that torch has not."""
    with readable(str(file)), safe_open(file, framework="pt"):  # the library proves the header, byte ranges included
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    found = {
        name: Stored(DTYPES[e["dtype"]], tuple(e["shape"]), file, 8 + length + e["data_offsets"][0])
        for name, e in entries.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1].start))


class Shard:
    """A file that is being written; each tensor has its place from the start."""

    def __init__(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        # wide dtypes first, so that each tensor begins at a multiple of its item size
        ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.offsets: dict[str, int] = {}
        end = 0
        for name, tensor in ordered:
            self.offsets[name], end = end, end + tensor.bytes
            entries[name] = {
                "dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [self.offsets[name], end]
            }  # fmt: skip
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self.start = 8 + len(header)
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:  # a full disk is found now, not after an hour
            os.posix_fallocate(self.descriptor, 0, self.start + end)
        except OSError as error:
            os.close(self.descriptor)
            needed = f"{file} needs {(self.start + end) / 1e6:,.1f} MB: {error.strerror}"
            raise OSError(error.errno, needed) from error  # whose number says that the disk is full
        _write(self.descriptor, memoryview(len(header).to_bytes(8, "little") + header), 0)

    def write(self, name: str, values: torch.Tensor, row: int = 0) -> None:
        """Whole, or rows of a tensor from `row` on."""
        view = _bytes_of(values)
        skipped = row * (len(view) // len(values)) if row else 0
        _write(self.descriptor, view, self.start + self.offsets[name] + skipped)

    def copy(self, name: str, stored: Stored) -> None:
        """Byte for byte; the kernel does it where it can, and file systems that share blocks share them."""
        target, done = self.start + self.offsets[name], 0
        with stored.file.open("rb", buffering=0) as source:
            try:
                while done < stored.bytes:
                    left, at = stored.bytes - done, (stored.start + done, target + done)
                    count = os.copy_file_range(source.fileno(), self.descriptor, left, *at)
                    if not count:
                        raise OSError(f"{stored.file} ends in the middle of {name}")
                    done += count
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
            while done < stored.bytes:
                piece = os.pread(source.fileno(), min(CHUNK, stored.bytes - done), stored.start + done)
                if not piece:
                    raise OSError(f"{stored.file} ends in the middle of {name}")
                _write(self.descriptor, memoryview(piece), target + done)
                done += len(piece)

    def close(self) -> None:
        """On the disk when this returns."""
        os.fsync(self.descriptor)
        os.close(self.descriptor)


@contextmanager
def writing(folder: Path, layout: Mapping[str, Mapping[str, Tensor]]) -> Iterator[dict[str, Shard]]:
    """Shards by the name of each tensor; `layout` says by file name which tensors it holds. Writes the index too."""
    shards: dict[str, Shard] = {}
    try:
        for file, tensors in layout.items():
            shards[file] = Shard(folder / file, tensors)
        yield {name: shards[file] for file, tensors in layout.items() for name in tensors}
        if set(layout) != {SINGLE}:
            total = sum(tensor.bytes for tensors in layout.values() for tensor in tensors.values())
            weight_map = {name: file for file, tensors in layout.items() for name in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    finally:
        for shard in shards.values():
            shard.close()


def _bytes_of(values: torch.Tensor) -> memoryview:
    """Of a contiguous tensor its own bytes, no copy."""
    return cast(Any, values.contiguous().flatten().view(torch.uint8).numpy()).data


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
