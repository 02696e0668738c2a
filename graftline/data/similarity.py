"""Which texts are nearly the same: Jaccard similarity of character 5-grams, candidates by MinHash.

J(a, b) = |S(a) ∩ S(b)| / |S(a) ∪ S(b)|, where S is the set of 5-grams of the normalized text. MinHash with banding
(Broder 1997; Leskovec et al., Mining of Massive Datasets §3.4) finds candidates, and J itself decides: a pair that is
reported is similar; one that is similar is missed with a probability below 0.01 %.
Characters and not words, because one changed word of a short prompt destroys most of its word n-grams.
"""

import unicodedata
from collections.abc import Iterator, Sequence

import numpy
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from graftline.progress import OnProgress, silent

NEAR = 0.8
"""Jaccard similarity from which two texts count as nearly the same (Lee et al. 2022, arXiv:2107.06499)."""

Grams = NDArray[numpy.uint32]
"""The 5-grams of a text as sorted 32-bit hashes: 4 bytes each, a string set takes twenty times as much."""

_GRAM = 5
_PRIME, _MIX = numpy.uint64(1_000_003), numpy.uint64(0x9E3779B97F4A7C15)
_BANDS, _BAND_ROWS = 25, 5
"""A pair is a candidate with probability 1 - (1 - J^5)^25: 0.99995 at J = 0.8, 0.05 at J = 0.3."""
_BOILERPLATE_ROWS = 20
"""A 5-gram in more than half of the texts, and in more than so many, is the prompt's frame and tells nothing."""
_EMPTY = MinHash(num_perm=_BANDS * _BAND_ROWS, seed=1, hashfunc=int)
"""Copied for each text: drawing the permutations costs more than using them."""


def normalize(text: str) -> str:
    """Compatibility forms unified (NFKC), case folded, runs of white space made one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class NearIndex:
    """Finds, among texts, those that are nearly the same as a given one of them."""

    def __init__(self, texts: Sequence[str], *, on_progress: OnProgress = silent) -> None:
        """Index ``texts``; both the ones to search among and the ones to search for."""
        self._grams = _informative([_grams(normalize(text)) for text in texts])
        self._hashes: list[MinHash] = []
        for done, grams in enumerate(self._grams, start=1):
            self._hashes.append(_min_hash(grams))
            on_progress(done, len(texts))
        self._index = MinHashLSH(num_perm=_BANDS * _BAND_ROWS, params=(_BANDS, _BAND_ROWS))

    def add(self, at: int) -> None:
        """Make text ``at`` one that `near` finds. Texts without a telling 5-gram are never found."""
        if len(self._grams[at]):
            self._index.insert(at, self._hashes[at], check_duplication=False)

    def near(self, at: int, *, threshold: float = NEAR) -> Iterator[tuple[int, float]]:
        """Added texts with J ≥ ``threshold`` to text ``at``, itself left out, with J, in order."""
        if not len(self._grams[at]):
            return
        for other in sorted(self._index.query(self._hashes[at])):
            similarity = _jaccard(self._grams[at], self._grams[other]) if other != at else 0.0
            if similarity >= threshold:
                yield other, similarity


def _grams(text: str) -> Grams:
    codes = numpy.frombuffer(text.ljust(_GRAM, "\0").encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    hashes = numpy.zeros(len(codes) - _GRAM + 1, dtype=numpy.uint64)
    for offset in range(_GRAM):
        hashes = hashes * _PRIME + codes[offset : len(hashes) + offset]
    return numpy.unique((hashes * _MIX >> numpy.uint64(32)).astype(numpy.uint32))


def _informative(grams: list[Grams]) -> list[Grams]:
    if not grams:
        return []
    values, counts = numpy.unique(numpy.concatenate(grams), return_counts=True)
    frame = values[counts > max(_BOILERPLATE_ROWS, len(grams) // 2)]
    if not len(frame):
        return grams
    return [one[frame.take(numpy.searchsorted(frame, one), mode="clip") != one] for one in grams]


def _min_hash(grams: Grams) -> MinHash:
    sketch = _EMPTY.copy()
    if len(grams):
        sketch.update_batch(grams)
    return sketch


def _jaccard(a: Grams, b: Grams) -> float:
    both = len(numpy.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
