"""Which texts are nearly the same: Jaccard similarity of character 5-grams, candidates by MinHash, in batches of numpy.

J(a, b) = |S(a) ∩ S(b)| / |S(a) ∪ S(b)|, where S is the set of 5-grams of the normalized text. MinHash with banding
(Broder 1997; Leskovec et al., Mining of Massive Datasets §3.4) finds candidates, and J itself decides: a pair that is
reported is similar; one that is similar is missed with a probability below 0.01 %.
Characters and not words, because one changed word of a short prompt destroys most of its word n-grams.

The 5-grams of all texts and the keys of their bands lie in a temporary file that is mapped into memory. Held are, for
each text, where its 5-grams begin and whether it was added, and the texts that share a band.
"""

import contextlib
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy
from numpy.typing import NDArray

from graftline.errors import DataError
from graftline.limits import usable_cores
from graftline.logs import OnProgress, silent

NEAR = 0.8
"""Jaccard similarity from which two texts count as nearly the same (Lee et al. 2022, arXiv:2107.06499)."""

Grams = NDArray[numpy.uint32]
"""5-grams of a text as sorted 32-bit hashes: 4 bytes each, a string set takes twenty times as much."""
Integers = NDArray[numpy.int64]

_GRAM = 5
_PRIME, _MIX = numpy.uint64(1_000_003), numpy.uint64(0x9E3779B97F4A7C15)
BANDS, _BAND_ROWS = 25, 5
"""A pair is a candidate with probability 1 - (1 - J^5)^25: 0.99995 at J = 0.8, 0.05 at J = 0.3."""
_BOILERPLATE_ROWS = 20
"""A 5-gram in more than half of the texts, and in more than so many, is the prompt's frame and tells nothing."""
_BATCH_TEXTS = 500
_BUCKETS = 1 << 20
"""Counters of 5-grams: one that is frequent is looked for among those that share a full counter."""
_PLACES = 1 << 22
"""Size of the table in which the 5-grams of a few texts are looked up."""


def _hash_functions() -> NDArray[numpy.uint32]:
    """(2, bands · rows) factors, which are odd, and summands of h(x) = a·x + b mod 2^32, always the same ones."""
    drawn = numpy.random.default_rng(1).integers(0, 1 << 32, size=(2, BANDS * _BAND_ROWS), dtype=numpy.uint32)
    drawn[0] |= 1
    return drawn


_HASHES = _hash_functions()


def normalize(text: str) -> str:
    """Compatibility forms unified (NFKC), case folded, runs of white space made one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class NearIndex:
    """Finds, among texts, those that are nearly the same as a given one of them."""

    def __init__(
        self,
        texts: Iterable[str],
        *,
        on_progress: OnProgress = silent,
        num_texts: int | None = None,
        normalized: bool = False,
        one_of: slice | None = None,
        least: float = NEAR,
    ) -> None:
        """Index ``texts``; both the ones to search among and the ones to search for.

        Args:
            texts: read once, in batches.
            on_progress: called with texts done and in all.
            num_texts: how many there are, where ``texts`` has no length.
            normalized: whether the texts are as `normalize` leaves them.
            one_of: of each pair that is looked for, one text is among these; where they are few, most other texts
                need not be hashed.
            least: the least similarity that `near` will be asked for, where ``one_of`` is given.

        Raises:
            DataError: the folder for temporary files is full.
        """
        total = num_texts if num_texts is not None else len(texts)  # type: ignore[arg-type]
        with scratch_space_told():
            self._grams, self._starts = _write_grams(texts if normalized else map(normalize, texts), total)
        frame = _frame(self._grams, self._starts)
        if len(frame):
            with scratch_space_told():
                self._grams, self._starts = _without(frame, self._grams, self._starts)
        compared = numpy.ones(total, dtype=numpy.bool_)
        if one_of is not None:
            compared = _within_reach(self._grams, self._starts, one_of, least)
        with scratch_space_told():
            keys = _band_keys(self._grams, self._starts, compared, on_progress)
        self._mates = _Mates(keys)
        self._added = numpy.zeros(total, dtype=numpy.bool_)

    def add(self, at: int | slice) -> None:
        """Let `near` find text ``at``, or several. Texts without a distinctive 5-gram are never found."""
        self._added[at] = True

    def candidates(self) -> Integers:
        """Numbers of the texts for which `near` may find something, ascending: few, if few are alike."""
        return self._mates.texts()

    def near(self, at: int, *, threshold: float = NEAR) -> Iterator[tuple[int, float]]:
        """Added texts with J ≥ ``threshold`` to text ``at``, itself left out, with J, in order."""
        mates = self._mates.of(at)
        for other in mates[self._added[mates]].tolist():
            similarity = jaccard(self._of(at), self._of(other)) if other != at else 0.0
            if similarity >= threshold:
                yield other, similarity

    def _of(self, at: int) -> Grams:
        return self._grams[self._starts[at] : self._starts[at + 1]]


class _Mates:
    """Texts that share a band with others: few, where few are alike."""

    def __init__(self, keys: NDArray[numpy.uint64]) -> None:
        """``keys``: (bands, texts); 0 for a text that has none."""
        members, texts, begins, ends, held = [], [], [], [], 0
        for band in keys:
            order = numpy.argsort(band, kind="stable")
            ordered = band[order]
            edges = numpy.flatnonzero(numpy.r_[True, ordered[1:] != ordered[:-1], True][: len(band) + 1])
            sizes = numpy.diff(edges)
            shared = (sizes > 1) & (ordered[edges[:-1]] != 0)
            size = sizes[shared]
            inside = order[numpy.repeat(shared, sizes)]
            begin = held + numpy.cumsum(size) - size
            members.append(inside.astype(numpy.int32))
            texts.append(inside.astype(numpy.int32))
            begins.append(numpy.repeat(begin, size))
            ends.append(numpy.repeat(begin + size, size))
            held += len(inside)
        self._members, text = numpy.concatenate(members), numpy.concatenate(texts)
        order = numpy.argsort(text, kind="stable")
        self._begins, self._ends = numpy.concatenate(begins)[order], numpy.concatenate(ends)[order]
        self._rows = numpy.searchsorted(text[order], numpy.arange(keys.shape[1] + 1))

    def texts(self) -> Integers:
        """Those that share a band with another one, in order."""
        return numpy.flatnonzero(numpy.diff(self._rows))

    def of(self, at: int) -> Integers:
        """Texts that share a band with text ``at``, itself among them, in order."""
        bands = range(self._rows[at], self._rows[at + 1])
        found = [self._members[self._begins[band] : self._ends[band]] for band in bands]
        return numpy.unique(numpy.concatenate(found)) if found else numpy.zeros(0, dtype=numpy.int32)


def _write_grams(texts: Iterable[str], total: int) -> tuple[Grams, Integers]:
    """5-grams of every normalized text, one after the other, in a mapped file; where each begins, and the end."""
    counts = numpy.zeros(total + 1, dtype=numpy.int64)
    iterator, done = iter(texts), 1
    with tempfile.TemporaryFile() as file:
        while batch := list(islice(iterator, _BATCH_TEXTS)):
            owners, grams = grams_of(batch)
            counts[done : done + len(batch)] = numpy.bincount(owners, minlength=len(batch))
            file.write(grams.data)
            done += len(batch)
        return _mapped(file), numpy.cumsum(counts)


def grams_of(texts: list[str]) -> tuple[Integers, Grams]:
    """Each text's different 5-grams in order, as hashes: the number of the text, and the hash."""
    padded = [text.ljust(_GRAM, "\0") for text in texts]
    codes = numpy.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    hashes = numpy.zeros(len(codes) - _GRAM + 1, dtype=numpy.uint64)
    for offset in range(_GRAM):
        hashes = hashes * _PRIME + codes[offset : len(hashes) + offset]
    lengths = numpy.array([len(text) for text in padded])
    owners = numpy.repeat(numpy.arange(len(texts), dtype=numpy.uint64), lengths)[: len(hashes)]
    # A 5-gram begins at most five letters before the end of its text.
    within = numpy.ones(len(codes), dtype=numpy.bool_)
    ends = numpy.cumsum(lengths)
    for back in range(1, _GRAM):
        within[ends - back] = False
    within = within[: len(hashes)]
    both = owners[within] << numpy.uint64(32) | (hashes[within] * _MIX) >> numpy.uint64(32)
    both.sort()  # numpy.unique would hash them, which takes ten times as long
    different = both[numpy.r_[True, both[1:] != both[:-1]][: len(both)]]
    return (different >> numpy.uint64(32)).astype(numpy.int64), different.astype(numpy.uint32)


def frame_limit(num_texts: int) -> int:
    """A 5-gram in more texts than this belongs to the prompts' frame."""
    return max(_BOILERPLATE_ROWS, num_texts // 2)


def _frame(grams: Grams, starts: Integers) -> Grams:
    """The 5-grams that are in more than half of the texts, sorted."""
    limit = frame_limit(len(starts) - 1)
    if len(starts) - 1 <= limit:
        return numpy.zeros(0, dtype=numpy.uint32)
    counters = numpy.zeros(_BUCKETS, dtype=numpy.int64)
    for piece in _pieces(grams):
        counters += numpy.bincount(piece & numpy.uint32(_BUCKETS - 1), minlength=_BUCKETS)
    is_full = counters > limit
    if not is_full.any():
        return numpy.zeros(0, dtype=numpy.uint32)
    values, counts = numpy.zeros(0, dtype=numpy.uint32), numpy.zeros(0, dtype=numpy.int64)
    for piece in _pieces(grams):
        some, number = numpy.unique(piece[is_full[piece & numpy.uint32(_BUCKETS - 1)]], return_counts=True)
        values, places = numpy.unique(numpy.concatenate([values, some]), return_inverse=True)
        counts = numpy.bincount(places, weights=numpy.concatenate([counts, number]), minlength=len(values))
    return values[counts > limit]


def _without(frame: Grams, grams: Grams, starts: Integers) -> tuple[Grams, Integers]:
    """The 5-grams without those of the frame."""
    kept = numpy.zeros(len(starts), dtype=numpy.int64)
    with tempfile.TemporaryFile() as file:
        for first in range(0, len(starts) - 1, _BATCH_TEXTS):
            bounds = starts[first : first + _BATCH_TEXTS + 1]
            piece = grams[bounds[0] : bounds[-1]]
            told = frame.take(numpy.searchsorted(frame, piece), mode="clip") != piece
            file.write(piece[told].data)
            running = numpy.r_[0, numpy.cumsum(told)]
            kept[first + 1 : first + len(bounds)] = numpy.diff(running[bounds - bounds[0]])
        return _mapped(file), numpy.cumsum(kept)


def _within_reach(grams: Grams, starts: Integers, some: slice, least: float) -> NDArray[numpy.bool_]:
    """(texts,) whether a text may be as similar as ``least`` to one of ``some``.

    J(a, b) ≤ |S(a) ∩ S(b)| / |S(a)| ≤ |S(a) ∩ S| / |S(a)|, where S holds the 5-grams of all of ``some``. S is a table
    of places that 5-grams may share, so that too many are found in it, never too few.
    """
    total = len(starts) - 1
    first, last, _ = some.indices(total)
    is_there = numpy.zeros(_PLACES, dtype=numpy.bool_)
    for piece in _pieces(grams[starts[first] : starts[last]]):
        is_there[piece & numpy.uint32(_PLACES - 1)] = True
    reach = numpy.zeros(total, dtype=numpy.bool_)
    for at in range(0, total, _BATCH_TEXTS):
        bounds = starts[at : at + _BATCH_TEXTS + 1]
        running = numpy.r_[0, numpy.cumsum(is_there[grams[bounds[0] : bounds[-1]] & numpy.uint32(_PLACES - 1)])]
        shared = numpy.diff(running[bounds - bounds[0]])
        reach[at : at + len(shared)] = shared + 0.5 > least * numpy.diff(bounds)
    return reach


def _band_keys(
    grams: Grams, starts: Integers, compared: NDArray[numpy.bool_], on_progress: OnProgress
) -> NDArray[numpy.uint64]:
    """(bands, texts) one number for each band's least hashes, in a mapped file.

    0 where a text has no 5-gram, or is not compared.
    """
    total = len(starts) - 1
    if not total:
        return numpy.zeros((BANDS, 0), dtype=numpy.uint64)
    with tempfile.TemporaryFile() as file:
        for _ in range(BANDS):  # a file with holes would fail where it is written to, with a signal
            file.write(bytes(8 * total))
        file.flush()
        keys = numpy.memmap(file, numpy.uint64, "r+", shape=(BANDS, total))

    def work(first: int) -> int:
        bounds = starts[first : first + _BATCH_TEXTS + 1]
        sizes = numpy.diff(bounds)
        is_some = (sizes > 0) & compared[first : first + len(sizes)]
        some = numpy.flatnonzero(is_some)
        if len(some):
            piece = grams[bounds[0] : bounds[-1]][numpy.repeat(is_some, sizes)]
            keys[:, first + some] = band_keys_of(piece, numpy.cumsum(sizes[some]) - sizes[some])
        return len(sizes)

    done = 0
    with ThreadPoolExecutor(usable_cores()) as pool:
        for number in pool.map(work, range(0, total, _BATCH_TEXTS)):
            done += number
            on_progress(done, total)
    return numpy.asarray(keys)


def band_keys_of(grams: Grams, starts: Integers) -> NDArray[numpy.uint64]:
    """(bands, texts) one number for each band's least hashes, for texts that have 5-grams."""
    keys = numpy.zeros((BANDS, len(starts)), dtype=numpy.uint64)
    hashed = numpy.empty_like(grams)
    for number, (factor, summand) in enumerate(_HASHES.T):
        numpy.multiply(grams, factor, out=hashed)
        numpy.add(hashed, summand, out=hashed)
        least = numpy.minimum.reduceat(hashed, starts)
        band = keys[number // _BAND_ROWS]
        band *= _MIX
        band ^= least + (band >> numpy.uint64(29))
    return numpy.maximum(keys, 1)


def jaccard(a: Grams, b: Grams) -> float:
    """J of two texts' 5-grams."""
    both = len(numpy.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def _pieces(grams: Grams) -> Iterator[Grams]:
    step = 1 << 22
    return (grams[at : at + step] for at in range(0, len(grams), step))


def _mapped(file: Any) -> Grams:
    """What was written to a file, as long as it is used."""
    file.flush()
    if not file.tell():
        return numpy.zeros(0, dtype=numpy.uint32)
    return numpy.asarray(numpy.memmap(file, numpy.uint32, "r"))


@contextlib.contextmanager
def scratch_space_told() -> Iterator[None]:
    """Explain a full disk in the folder of temporary files."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"rows cannot be compared: {error.strerror or error} in {tempfile.gettempdir()}; it takes about four times "
            "as much as the rows' prompts: free space there, or set TMPDIR to a folder that has some"
        ) from error
