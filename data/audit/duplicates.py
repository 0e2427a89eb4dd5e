"""Exact and near duplicates among many texts: inside the training data, and between it and what is held out.

A text is known by a 64-bit hash of its normalised form; it nearly equals another if most of their runs of five
words are the same ones. Candidates for the second come from MinHash and locality-sensitive hashing (Broder, On the
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

NEAR_SIMILARITY = 0.8  # from here on two texts count as nearly equal
NEAR_LIMIT = 60_000  # texts of an index that are compared by their words; of more, a random sample

RUN = 5  # words; a text with fewer is compared as a whole only
PASSAGE = 30  # runs; from this length on a text is also found as a part of another
RUNS_KEPT = 1000  # of a text; the lowest hashes, a random sample in which two copies of a long text agree
BANDS, ROWS = 16, 4  # texts with Jaccard index 0.8 meet with probability 0.9998, with 0.5 in 64 of 100 cases
HASHES = 1 << 32

# scripts without spaces: every character is a word
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")

Runs = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True)
class Match:
    """An earlier text that equals this one after normalisation (`exact`), or shares most of its runs of words."""

    where: str
    similarity: float
    exact: bool


@dataclass(frozen=True, slots=True)
class _Kept:
    where: str
    runs: Runs
    bands: tuple[int, ...]


class TextIndex:
    """Texts of one side, train or held-out. `near=False` looks for exact duplicates only.

    Takes about 170 MB for a million texts of any length (80 of them are the names of places, which indexes may share),
    and about 3 KB more for each of the `near_limit` texts that are kept for comparison by their words.
    """

    def __init__(self, near: bool = True, near_limit: int = NEAR_LIMIT) -> None:
        self._near, self._near_limit = near, near_limit
        self._places: dict[int, str] = {}  # hash of a text -> where it is first
        self._kept: list[_Kept] = []
        self._bands: dict[int, int] = {}  # hash of a band -> index into _kept
        self._long = 0  # distinct texts of at least RUN words
        self._ceiling = HASHES  # texts of lower rank are kept

    def __len__(self) -> int:
        """Distinct texts."""
        return len(self._places)

    @property
    def near_share(self) -> float:
        """The share of its texts that are compared by their words: below 1 if there are more than `near_limit`."""
        return len(self._kept) / self._long if self._long else 1.0

    def find(self, text: str) -> Match | None:
        """The text of this index that `text` equals, or else the one that it equals most nearly."""
        text = normalize(text)
        where = self._places.get(text_key(text))
        if where is not None:
            return Match(where, 1.0, exact=True)
        return self._nearest(text) if self._kept else None

    def add(self, text: str, where: str) -> Match | None:
        """What `find` says; from now on `text` is part of the index, under the name of its first place."""
        match = self.find(text)
        if match is None or not match.exact:
            text = normalize(text)
            self._places[text_key(text)] = where
            if self._near and len(runs := _runs(text)):
                self._long += 1
                if _rank(runs) < self._ceiling:
                    self._keep(_Kept(where, runs, _bands(text)))
                    self._thin_out()
        return match

    def _nearest(self, text: str) -> Match | None:
        met = {self._bands[band] for band in _bands(text) if band in self._bands}
        if not met:
            return None
        best, earliest = max((similarity(_runs(text), self._kept[i].runs), -i) for i in met)
        return Match(self._kept[-earliest].where, best, False) if best >= NEAR_SIMILARITY else None

    def _keep(self, text: _Kept) -> None:
        # only the first text of a band: ten thousand texts on one template would otherwise all meet in its bands
        for band in text.bands:
            self._bands.setdefault(band, len(self._kept))
        self._kept.append(text)

    def _thin_out(self) -> None:
        while len(self._kept) > self._near_limit:
            self._ceiling //= 2
            kept, self._kept, self._bands = self._kept, [], {}
            for text in kept:
                if _rank(text.runs) < self._ceiling:
                    self._keep(text)


@lru_cache(maxsize=8)  # a row and its text are looked up in several indexes, one after the other
def normalize(text: str) -> str:
    """Compatible characters unified (NFKC), lower case, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def similarity(a: Runs, b: Runs) -> float:
    """Shared runs of words over those of the shorter text if that is a passage, else over those of both (Jaccard).

    A passage cut short or embedded is still a copy; in a short text one more word makes another question.
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


@lru_cache(maxsize=4)  # what is looked up among the held-out texts is most often added to the training texts next
def _runs(text: str) -> Runs:
    """Hashes of a normalised text's runs of words, each once, in rising order; at most RUNS_KEPT of them."""
    words = _WORD.findall(text)
    runs = map(" ".join, zip(*(words[i:] for i in range(RUN)), strict=False))
    return np.unique(np.array([xxhash.xxh32_intdigest(run.encode()) for run in runs], dtype=np.uint32))[:RUNS_KEPT]


@lru_cache(maxsize=4)
def _bands(text: str) -> tuple[int, ...]:
    """Two texts with Jaccard index J have one of these in common with probability 1 - (1 - J^ROWS)^BANDS."""
    sketch = _empty_sketch().copy()
    sketch.update_batch(_runs(text).tolist())
    rows = sketch.hashvalues.tobytes()
    size = len(rows) // BANDS
    return tuple(xxhash.xxh3_64_intdigest(rows[i * size : (i + 1) * size], i) for i in range(BANDS))


@cache
def _empty_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(BANDS * ROWS, seed=0, hashfunc=int)  # what it is given are hashes


def _rank(runs: Runs) -> int:
    """A random number of a text that its near copies most often share, so that a sample holds both or neither."""
    return xxhash.xxh32_intdigest(runs[0].tobytes())
