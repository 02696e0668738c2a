"""Near duplicates among more prompts than a machine holds: MinHash bands shuffled, candidates compared by 5-grams.

Finds the same pairs as `graftline.data.near.NearIndex`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, pairwise
from types import ModuleType
from typing import Any

import numpy
import pyarrow
from numpy.typing import NDArray

from graftline.data.near import BANDS, NEAR, Grams, band_keys_of, frame_limit, grams_of, jaccard, normalize
from graftline.data.ray_steps import WORK, Job, map_parts, rows_in, summaries, summary_of

_NO_PAIR = -1
_APART = numpy.arange(BANDS, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
"""(bands,) numbers added to the keys of each band."""
_GRAMS = pyarrow.schema([("row", pyarrow.int64()), ("grams", pyarrow.large_list(pyarrow.uint32()))])
_BAND = pyarrow.schema([("bucket", pyarrow.int64()), ("row", pyarrow.int64()), ("key", pyarrow.uint64())])
_CANDIDATE = pyarrow.schema(
    [("bucket", pyarrow.int64()), ("row", pyarrow.int64()), ("other", pyarrow.int64()), _GRAMS.field("grams")]
)
"""A prompt's 5-grams (``other``: none), or a pair of prompts that waits for them."""
_PAIR = pyarrow.schema([("row", pyarrow.int64()), ("other", pyarrow.int64())])


def near_pairs(ray: ModuleType, job: Job, is_first: NDArray[numpy.bool_]) -> NDArray[numpy.int64]:
    """(P, 2) rows a < b whose prompts differ but are nearly equal. ``is_first``: (R,) rows with a new prompt."""
    found = summaries(map_parts(ray, job, partial(_grams_of_part, job, ray.put(is_first))), job, "5-grams")
    frequent = numpy.unique(numpy.concatenate([numpy.frombuffer(row["frequent"], numpy.uint32) for row in found]))
    if len(frequent):
        counted = summaries(map_parts(ray, job, partial(_count_in_part, job, frequent)), job, "frame")
        counts = sum(numpy.frombuffer(row["counts"], numpy.int64) for row in counted)
        frequent = frequent[counts > frame_limit(int(is_first.sum()))]
    buckets = 2 * len(job.parts)
    bands = map_parts(ray, job, partial(_bands_of_part, job, frequent, buckets))
    prompts = map_parts(ray, job, partial(_prompts_of_part, job, frequent, buckets))
    candidates = _reduce(bands, partial(_candidates, buckets))
    half = _reduce(candidates.union(prompts), partial(_bring_first, buckets))
    pairs = _reduce(half.union(prompts), _compare).iter_batches(batch_size=None, batch_format="numpy")
    none = numpy.zeros((0, 2), dtype=numpy.int64)
    return numpy.concatenate([none, *(numpy.stack([each["row"], each["other"]], axis=1) for each in pairs)])


def _reduce(data: Any, function: Callable[[pyarrow.Table], pyarrow.Table]) -> Any:
    return data.groupby("bucket").map_groups(function, batch_format="pyarrow")


def _gram_file(number: int) -> str:
    return f"{WORK}/grams/{number:06}.parquet"


def _grams_of_part(job: Job, flags: Any, number: int) -> pyarrow.Table:
    import ray

    part = job.parts[number]
    is_first = ray.get(flags)[part.first : part.first + part.num_rows]
    rows, texts = list[int](), list[str]()
    for at, row in enumerate(rows_in(job, part)):
        if is_first[at]:
            rows.append(part.first + at)
            texts.append(normalize(row.prompt))
    owners, grams = grams_of(texts) if texts else (numpy.zeros(0, int), numpy.zeros(0, numpy.uint32))
    offsets = numpy.cumsum([0, *numpy.bincount(owners, minlength=len(rows))])
    each = pyarrow.LargeListArray.from_arrays(offsets, grams)
    job.out.write(_gram_file(number), pyarrow.table({"row": rows, "grams": each}, schema=_GRAMS))
    # A 5-gram in more than half of all prompts is in more than half of those of some part.
    values, counts = numpy.unique(grams, return_counts=True)
    return summary_of(number, frequent=values[2 * counts > len(rows)].tobytes())


def _count_in_part(job: Job, frequent: Grams, number: int) -> pyarrow.Table:
    """The number of the part's prompts that contain each 5-gram."""
    grams = job.out.read_file(_gram_file(number))["grams"].combine_chunks().flatten().to_numpy()
    values, counts = numpy.unique(grams, return_counts=True)
    found = numpy.zeros(len(frequent), dtype=numpy.int64)
    is_there = numpy.isin(frequent, values)
    found[is_there] = counts[numpy.searchsorted(values, frequent[is_there])]
    return summary_of(number, counts=found.tobytes())


def _telling(job: Job, frame: Grams, number: int) -> Iterator[tuple[int, Grams]]:
    """Prompts of a part that have 5-grams besides the frame's, with those 5-grams."""
    table = job.out.read_file(_gram_file(number))
    for row, one in zip(table["row"].to_pylist(), table["grams"], strict=True):
        told = numpy.setdiff1d(one.values.to_numpy(), frame, assume_unique=True)
        if len(told):
            yield row, told


def _bands_of_part(job: Job, frame: Grams, buckets: int, number: int) -> pyarrow.Table:
    telling = list(_telling(job, frame, number))
    if not telling:
        return _BAND.empty_table()
    rows, grams = numpy.array([row for row, _ in telling]), [one for _, one in telling]
    starts = numpy.cumsum([0, *map(len, grams)])[:-1]
    # Prompts are compared band by band: the same number in two bands means nothing.
    keys = (band_keys_of(numpy.concatenate(grams), starts) + _APART[:, None]).ravel()
    bucket = (keys % numpy.uint64(buckets)).astype(numpy.int64)
    return pyarrow.table({"bucket": bucket, "row": numpy.tile(rows, BANDS), "key": keys}, schema=_BAND)


def _prompts_of_part(job: Job, frame: Grams, buckets: int, number: int) -> pyarrow.Table:
    return _as_candidates([(row % buckets, row, _NO_PAIR, grams) for row, grams in _telling(job, frame, number)])


def _as_candidates(found: list[tuple[int, int, int, Any]]) -> pyarrow.Table:
    columns = {name: [one[at] for one in found] for at, name in enumerate(_CANDIDATE.names)}
    return pyarrow.table(columns, schema=_CANDIDATE)


def _candidates(buckets: int, bands: pyarrow.Table) -> pyarrow.Table:
    """Pairs of a bucket's prompts that share a band; both are put in the lower one's bucket."""
    keys, rows = bands["key"].to_numpy(), bands["row"].to_numpy()
    order = numpy.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    edges = numpy.flatnonzero(numpy.r_[True, keys[1:] != keys[:-1], True])
    pairs: list[tuple[int, int]] = []
    for start, stop in pairwise(edges.tolist()):
        if stop - start > 1:
            pairs += combinations(rows[start:stop].tolist(), 2)
    return _as_candidates([(a % buckets, a, b, []) for a, b in pairs])


def _sorted_out(table: pyarrow.Table) -> tuple[dict[int, Grams], list[tuple[int, int, Any]]]:
    """The prompts of a bucket with their 5-grams, and the pairs that wait for them."""
    prompts: dict[int, Grams] = {}
    pairs: list[tuple[int, int, Any]] = []
    for row, other, grams in zip(table["row"].to_pylist(), table["other"].to_pylist(), table["grams"], strict=True):
        if other == _NO_PAIR:
            prompts[row] = grams.values.to_numpy()
        else:
            pairs.append((row, other, grams))
    return prompts, pairs


def _bring_first(buckets: int, table: pyarrow.Table) -> pyarrow.Table:
    """Pairs, each once, with the 5-grams of the first prompt, in the bucket of the second."""
    prompts, pairs = _sorted_out(table)
    once = sorted({(a, b) for a, b, _ in pairs})
    return _as_candidates([(b % buckets, b, a, prompts[a]) for a, b in once])


def _compare(table: pyarrow.Table) -> pyarrow.Table:
    prompts, pairs = _sorted_out(table)
    near = [(a, b) for b, a, grams in pairs if jaccard(grams.values.to_numpy(), prompts[b]) >= NEAR]
    return pyarrow.table({"row": [a for a, _ in near], "other": [b for _, b in near]}, schema=_PAIR)
