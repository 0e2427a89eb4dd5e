"""Exact and near duplicates among many texts: inside the training data, and between it and the held-out data.

Two texts are equal if the 64-bit hashes of their normalised forms are; they are nearly equal if most of their runs of
five words are the same. Candidates for near duplicates come from MinHash and locality-sensitive hashing (Broder, On the
resemblance and containment of documents, 1997; Leskovec et al., Mining of Massive Datasets, chapter 3), and every
candidate is compared by its runs of words before it is reported.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import xxhash

NEAR_SIMILARITY = 0.8  # least similarity of near duplicates
NEAR_LIMIT = 60_000  # most texts of an index that are compared by their words; a random sample if there are more

RUN = 5  # words; a text with fewer is compared as a whole only
PASSAGE = 30  # runs; a text with as many is also a near duplicate of a text that contains it
RUNS_KEPT = 1000  # per text: the lowest hashes, a random sample in which two copies of a long text agree
BANDS, ROWS = 16, 4  # two texts share a band with probability 0.9998 at Jaccard index 0.8, 0.64 at 0.5
HASHES = 1 << 32

# in scripts without spaces every character is a word
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")

Runs = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True)
class Match:
    """An earlier text that equals this one after normalisation (`exact`), or shares most of its runs of words."""

    where: str
    similarity: float
    exact: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    where: str
    runs: Runs
    bands: tuple[int, ...]


class TextIndex:
    """Index of training or held-out texts. `near=False` looks for exact duplicates only.

    Memory: about 170 MB for a million texts of any length (80 MB of it for their places, which indexes may share), and
    about 3 KB more for each of the `near_limit` texts that are compared by their words.
    """

    def __init__(self, near: bool = True, near_limit: int = NEAR_LIMIT) -> None:
        self._near, self._near_limit = near, near_limit
        self._places: dict[int, str] = {}  # hash of a text -> its first place
        self._entries: list[_Entry] = []
        self._bands: dict[int, int] = {}  # hash of a band -> index into _entries
        self._long = 0  # distinct texts of at least RUN words
        self._ceiling = HASHES  # only texts of lower rank are compared by their words

    def __len__(self) -> int:
        """Number of distinct texts."""
        return len(self._places)

    @property
    def near_share(self) -> float:
        """Share of the texts that are compared by their words: below 1 if there are more than `near_limit`."""
        return len(self._entries) / self._long if self._long else 1.0

    def find(self, text: str) -> Match | None:
        """The text of the index that equals `text`, or else its nearest near duplicate."""
        text = normalize(text)
        where = self._places.get(text_key(text))
        if where is not None:
            return Match(where, 1.0, exact=True)
        return self._nearest(text) if self._entries else None

    def add(self, text: str, where: str) -> Match | None:
        """Return what `find` returns, and add `text` to the index; an equal text keeps its first place."""
        match = self.find(text)
        if match is None or not match.exact:
            text = normalize(text)
            self._places[text_key(text)] = where
            if self._near and len(runs := _runs(text)):
                self._long += 1
                if _rank(runs) < self._ceiling:
                    self._keep(_Entry(where, runs, _bands(text)))
                    self._thin_out()
        return match

    def _nearest(self, text: str) -> Match | None:
        candidates = {self._bands[band] for band in _bands(text) if band in self._bands}
        if not candidates:
            return None
        best, earliest = max((similarity(_runs(text), self._entries[i].runs), -i) for i in candidates)
        return Match(self._entries[-earliest].where, best, False) if best >= NEAR_SIMILARITY else None

    def _keep(self, entry: _Entry) -> None:
        # only the first text of a band: otherwise ten thousand texts on one template would share its bands
        for band in entry.bands:
            self._bands.setdefault(band, len(self._entries))
        self._entries.append(entry)

    def _thin_out(self) -> None:
        while len(self._entries) > self._near_limit:
            self._ceiling //= 2
            entries, self._entries, self._bands = self._entries, [], {}
            for entry in entries:
                if _rank(entry.runs) < self._ceiling:
                    self._keep(entry)


@lru_cache(maxsize=8)  # a row and its text are looked up in several indexes in turn
def normalize(text: str) -> str:
    """The text in NFKC and lower case, its white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def similarity(a: Runs, b: Runs) -> float:
    """Shared runs of words over those of the shorter text if it is a passage, else over those of both (Jaccard).

    A passage that is cut short or embedded is still a copy; in a short text one more word makes another question.
    """
    sampled = [runs[-1] for runs in (a, b) if len(runs) == RUNS_KEPT]
    if sampled:
        a, b = a[a <= min(sampled)], b[b <= min(sampled)]
    shared = len(np.intersect1d(a, b, assume_unique=True))
    shorter = min(len(a), len(b))
    return shared / (shorter if shorter >= PASSAGE else len(a) + len(b) - shared)


def text_key(text: str) -> int:
    """64-bit hash of a normalised text."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


@lru_cache(maxsize=4)  # a text that is looked up among the held-out texts is usually added to the training texts next
def _runs(text: str) -> Runs:
    """Distinct hashes of a normalised text's runs of words, in rising order, at most RUNS_KEPT."""
    words = _WORD.findall(text)
    runs = map(" ".join, zip(*(words[i:] for i in range(RUN)), strict=False))
    return np.unique(np.array([xxhash.xxh32_intdigest(run.encode()) for run in runs], dtype=np.uint32))[:RUNS_KEPT]


@lru_cache(maxsize=4)
def _bands(text: str) -> tuple[int, ...]:
    """Hashes of bands: two texts with Jaccard index J share one with probability 1 - (1 - J^ROWS)^BANDS."""
    sketch = _empty_sketch().copy()
    sketch.update_batch(_runs(text).tolist())
    rows = sketch.hashvalues.tobytes()
    size = len(rows) // BANDS
    return tuple(xxhash.xxh3_64_intdigest(rows[i * size : (i + 1) * size], i) for i in range(BANDS))


@cache
def _empty_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(BANDS * ROWS, seed=0, hashfunc=int)  # its inputs are hashes


def _rank(runs: Runs) -> int:
    """A random number that a text and its near copies usually share, so that a sample holds both or neither."""
    return xxhash.xxh32_intdigest(runs[0].tobytes())
