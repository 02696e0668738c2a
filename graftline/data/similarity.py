"""Which texts are nearly the same: Jaccard similarity of character 5-grams, candidates by MinHash.

J(a, b) = |S(a) ∩ S(b)| / |S(a) ∪ S(b)|, where S is the set of 5-grams of the normalized text. MinHash with banding
(Broder 1997; Leskovec et al., Mining of Massive Datasets §3.4) finds candidates, and J itself decides: a pair that is
reported is similar; one that is similar is missed with a probability below 1 % (`_CANDIDATES_FROM`).
Characters and not words, because one changed word of a short prompt destroys most of its word n-grams.
"""

import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

from datasketch import MinHash, MinHashLSH

from graftline.progress import OnProgress, silent

NEAR = 0.8
"""Jaccard similarity from which two texts count as nearly the same (Lee et al. 2022, arXiv:2107.06499)."""

_GRAM = 5
_PERMUTATIONS = 128
_CANDIDATES_FROM = 0.6
"""The banding is made for this similarity, below `NEAR`, so that few similar pairs are missed."""
_BOILERPLATE_ROWS = 20
"""A 5-gram in more than half of the texts, and in more than so many, is the prompt's frame and tells nothing."""
_EMPTY = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
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
        self._index = MinHashLSH(threshold=_CANDIDATES_FROM, num_perm=_PERMUTATIONS)

    def add(self, at: int) -> None:
        """Make text ``at`` one that `near` finds. Texts without a telling 5-gram are never found."""
        if self._grams[at]:
            self._index.insert(at, self._hashes[at], check_duplication=False)

    def near(self, at: int, *, threshold: float = NEAR) -> Iterator[tuple[int, float]]:
        """Added texts with J ≥ ``threshold`` to text ``at``, itself left out, with J, in order."""
        if not self._grams[at]:
            return
        for other in sorted(self._index.query(self._hashes[at])):
            similarity = _jaccard(self._grams[at], self._grams[other]) if other != at else 0.0
            if similarity >= threshold:
                yield other, similarity


def _grams(text: str) -> frozenset[str]:
    if len(text) <= _GRAM:
        return frozenset([text])
    return frozenset(text[at : at + _GRAM] for at in range(len(text) - _GRAM + 1))


def _informative(grams: list[frozenset[str]]) -> list[frozenset[str]]:
    counts = Counter(gram for one in grams for gram in one)
    most = max(_BOILERPLATE_ROWS, len(grams) // 2)
    frame = {gram for gram, count in counts.items() if count > most}
    return [one - frame for one in grams]


def _min_hash(grams: frozenset[str]) -> MinHash:
    sketch = _EMPTY.copy()
    if grams:
        sketch.update_batch([gram.encode("utf-8", "surrogatepass") for gram in grams])
    return sketch


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)
