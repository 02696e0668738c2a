"""Rows that outgrow a machine: duplicates found, split and encoded as a Ray Data job over parquet files.

The result is that of `graftline.data.preparation` on one machine. Rows are read by parts (`graftline.data.parts`):

1. Each row's keys: digests of its text and of its question, 16 bytes each. The process that starts the job, the
   starter, holds about 100 bytes a row.
2. The 5-grams of each distinct prompt, written beside the result, and those that are the frame of most prompts.
3. Near duplicates: bands of MinHashes are shuffled, and prompts that share one are candidates; two more shuffles bring
   the candidates' 5-grams together, and their similarity decides.
4. The starter groups duplicates and splits; each part's rows are encoded and written to their sides.

A step writes and returns the same whenever it runs, because Ray repeats the work of a lost worker.
"""

import json
import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any

import numpy
import pyarrow
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graftline.data.columns import EncodedColumns
from graftline.data.encoding import BATCH_ROWS, encode_columns
from graftline.data.parts import Part, Place
from graftline.data.ray_near import near_pairs
from graftline.data.ray_steps import WORK, Job, Told, map_parts, rows_in, summaries, summary_of
from graftline.data.row_keys import text_key
from graftline.data.rows import AUTO, detect_format
from graftline.data.screening import contradiction_policy
from graftline.data.split import split_key
from graftline.errors import ConfigError, DataError
from graftline.settings.data import Data

Keys = NDArray[numpy.uint64]
"""Two words a row: the head of a SHA-256, in its order."""
TRAINING, EVALUATION, NEAR_FILE, SUMMARY = "training", "evaluation", "near.parquet", "summary.json"


@dataclass(frozen=True)
class Sides:
    """How the rows are split: numbers of rows, from 0."""

    training: NDArray[numpy.int64]
    evaluation: NDArray[numpy.int64]
    near: NDArray[numpy.int64]
    """Pairs of a training row and the earlier row with the same or nearly the same prompt."""


def prepare(ray: ModuleType, job: Job) -> dict[str, int]:
    """Write both sides of a `checked` job, the pairs of near duplicates and, at last, the summary to ``job.out``.

    ``training/`` and ``evaluation/`` have the source's columns and ``line``, ``input_ids``, ``supervised``.

    Returns:
        The summary: rows, rows left out, rows of each side, pairs of near duplicates.

    Raises:
        DataError: rows cannot be read, split or encoded as the section says; all bad rows are reported together.
    """
    job.out.write_text(f"{WORK}/{SUMMARY}", "{}\n")  # from here on the place is marked as this job's
    job.out.remove(SUMMARY, NEAR_FILE, TRAINING, EVALUATION)
    _set_up(ray)
    texts, prompts = _keys(ray, job)
    kept = numpy.flatnonzero(_first_of(texts) == numpy.arange(len(texts)))
    if job.data.duplicates == "error" and len(kept) < len(texts):
        raise DataError(
            f"{len(texts) - len(kept)} of {len(texts)} rows are the same as an earlier one; remove them, or set "
            "data.duplicates to drop"
        )
    first = numpy.full(len(texts), -1)
    first[kept] = kept[_first_of(prompts[kept])]
    is_first = first == numpy.arange(len(texts))
    pairs = near_pairs(ray, job, is_first)
    sides = _split(prompts, first, pairs, job.data.evaluation_rows)
    encoded = _encode(ray, job, len(texts), sides)
    job.out.write(NEAR_FILE, pyarrow.table({"line": sides.near[:, 0] + 1, "earlier": sides.near[:, 1] + 1}))
    summary = {
        "rows": len(texts),
        "duplicates": len(texts) - len(kept),
        **encoded,
        "near": len(sides.near),
    }
    job.out.write_text(SUMMARY, json.dumps(summary, indent=2) + "\n")
    job.out.remove(WORK)
    return summary


def _set_up(ray: ModuleType) -> None:
    context = ray.data.DataContext.get_current()
    # Shuffles by tasks, which are repeated; those by actors lose what a lost actor had.
    context.shuffle_strategy = "sort_shuffle_pull_based"
    context.enable_progress_bars = False


def checked(job: Job) -> Job:
    """The job with its source's parts and format, checked before anything is started.

    Raises:
        ConfigError: the section ``data`` asks for something that works only on one machine.
        DataError: there are no rows, or their format is unknown, or the place of the result holds something else.
    """
    data = job.data
    for name, is_done, meant in (
        ("prepare", all(each.prepare is None for each in data.all_sources), "leave it out, and write parquet first"),
        ("sources", len(data.all_sources) == 1, "give one source"),
        ("max_rows", data.max_rows is None, "leave it out, and draw rows first"),
        ("split", data.split == "drawn", "write drawn"),
        ("evaluation", data.evaluation is None, "leave it out"),
        ("reserve_rows", data.reserve_rows == 0, "write 0"),
        ("empty", data.empty == "error", "write error, and leave such rows out first"),
        ("duplicates", data.duplicates != "keep", "write drop or error"),
        ("contradictions", contradiction_policy(data.contradictions, data.labels) == "keep", "write keep"),
        ("near_duplicates", data.near_duplicates == "keep", "write keep: near.parquet lists them"),
        ("learned", data.learned == "every-turn", 'write every-turn, and "weight": 0 on turns that are not learned'),
        ("learned_reasoning", data.learned_reasoning, 'write on, and "reasoning_weight": 0 on such turns'),
    ):
        if not is_done:
            raise ConfigError(f"data.{name} is set to what is done on one machine only; {meant}")
    if job.out.overlaps(job.source):
        raise DataError(
            f"the result would be at {job.out.address}, among the rows of {job.source.address}; name another place"
        )
    names = job.out.names()
    if names and not {SUMMARY, WORK} & set(names):
        raise DataError(f"{job.out.address} holds {names[0]}, which no such job has written; name an empty place")
    parts = tuple(job.source.find_parts())
    return replace(job, parts=parts, format=_format(job.source, parts[0], data.all_sources[0].format))


def _format(source: Place, part: Part, given: str) -> str:
    found = detect_format(source.first_record(part)) if given == AUTO else given
    if found == "preference":
        raise DataError(f"{part.path} holds preference pairs, which are prepared on one machine only")
    return found


# Step 1: keys.


def _keys(ray: ModuleType, job: Job) -> tuple[Keys, Keys]:
    found = summaries(map_parts(ray, job, partial(_keys_of_part, job)), job, "keys")
    words = [numpy.frombuffer(b"".join(row[name] for row in found), ">u8") for name in ("texts", "prompts")]
    texts, prompts = (one.astype(numpy.uint64).reshape(-1, 2) for one in words)
    return texts, prompts


def _keys_of_part(job: Job, number: int) -> pyarrow.Table:
    told, texts, prompts = Told(), bytearray(), bytearray()
    for row in job.source.rows(job.parts[number], format=job.format, problems=told):
        texts += bytes.fromhex(text_key(row)[:32])
        prompts += bytes.fromhex(split_key(row.prompt, job.data.seed)[:32])
    return summary_of(number, told, texts=bytes(texts), prompts=bytes(prompts))


def _first_of(keys: Keys) -> NDArray[numpy.int64]:
    """For each row the number of the first row with the same key."""
    order = numpy.lexsort((keys[:, 1], keys[:, 0]))  # stable: rows of a key stay in their order
    ordered = keys[order]
    begins = numpy.ones(len(keys), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = numpy.empty(len(keys), dtype=numpy.int64)
    first[order] = order[begins][numpy.cumsum(begins) - 1]
    return first


# Step 4: the split, and the rows of each side.


def _split(prompts: Keys, first: NDArray[numpy.int64], pairs: NDArray[numpy.int64], evaluation_rows: int) -> Sides:
    """As `graftline.data.split.split_rows`: takes groups in the order of their least key, each that still fits.

    ``first``: for each row that is kept the first with the same prompt; -1 for the others.
    """
    kept = numpy.flatnonzero(first >= 0)
    if not evaluation_rows < len(kept):
        raise DataError(
            f"data.evaluation_rows is {evaluation_rows}, but there are {len(kept)} rows, and at least one is needed to "
            f"train; set it to 0..{len(kept) - 1} or add rows"
        )
    size = len(first)
    graph = coo_array((numpy.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    group[kept] = group[first[kept]]
    sizes = numpy.bincount(group[kept], minlength=size)
    distinct = kept[first[kept] == kept]
    order = distinct[numpy.lexsort((prompts[distinct, 1], prompts[distinct, 0]))]
    is_chosen, seen, num_chosen = numpy.zeros(size, bool), set[int](), 0
    for one in map(int, group[order]):
        if num_chosen == evaluation_rows:
            break
        if one not in seen and num_chosen + sizes[one] <= evaluation_rows:
            is_chosen[one] = True
            num_chosen += int(sizes[one])
        seen.add(one)
    if num_chosen < evaluation_rows:
        raise DataError(
            f"data.evaluation_rows is {evaluation_rows}, but only {num_chosen} of {len(kept)} rows can be set aside "
            "without leaving a near duplicate of them to train on; set it lower"
        )
    evaluated = is_chosen[group[kept]]
    again = kept[first[kept] != kept]
    near = numpy.concatenate([numpy.stack([again, first[again]], axis=1), _earliest(pairs)])
    near = near[numpy.lexsort((near[:, 1], near[:, 0]))]
    return Sides(kept[~evaluated], kept[evaluated], near[~is_chosen[group[near[:, 0]]]])


def _earliest(pairs: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
    """(N, 2) for each row that has earlier ones in ``pairs`` (earlier, later), the row and the earliest of them."""
    ordered = pairs[numpy.lexsort((pairs[:, 0], pairs[:, 1]))]
    _, at = numpy.unique(ordered[:, 1], return_index=True)
    return ordered[at][:, ::-1]


def _encode(ray: ModuleType, job: Job, num_rows: int, sides: Sides) -> dict[str, int]:
    side_of = numpy.zeros(num_rows, dtype=numpy.uint8)
    side_of[sides.training], side_of[sides.evaluation] = 1, 2
    found = summaries(map_parts(ray, job, partial(_encode_part, job, ray.put(side_of))), job, "encode")
    counts = {name: sum(int(row[name]) for row in found) for name in (TRAINING, EVALUATION, "too_long")}
    if counts["too_long"] and job.data.overlength == "error":
        raise DataError(
            f"{counts['too_long']} of {num_rows} rows have more than {job.data.max_tokens} tokens (the longest has "
            f"{max(int(row['longest']) for row in found)}); raise data.max_tokens, or set data.overlength to drop or "
            "truncate"
        )
    return counts


def _encode_part(job: Job, flags: Any, number: int) -> pyarrow.Table:
    import ray

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker already
    part, told, tokenizer = job.parts[number], Told(), job.load_tokenizer()
    side_of = ray.get(flags)[part.first : part.first + part.num_rows]
    counts = {TRAINING: 0, EVALUATION: 0, "too_long": 0, "longest": 0}
    pieces: dict[str, list[pyarrow.Table]] = {TRAINING: [], EVALUATION: []}
    kept = ((row, side) for row, side in zip(rows_in(job, part), side_of.tolist(), strict=True) if side)
    while batch := list(islice(kept, BATCH_ROWS)):
        columns, wrong = encode_columns([row for row, _ in batch], tokenizer, template=job.template)
        for error in wrong:
            told.add(error)
        fitting = _fitting(columns, job.data, counts)
        lines = {row.source_line for row, side in batch if side == 1}
        is_trained = numpy.isin(fitting.lines, list(lines))
        for name, chosen in ((TRAINING, is_trained), (EVALUATION, ~is_trained)):
            pieces[name].append(_as_table(fitting.take(numpy.flatnonzero(chosen))))
    for name, made in pieces.items():
        encoded = pyarrow.concat_tables(made) if made else None
        if encoded and not told.number:
            source = job.source.read(part).take(pyarrow.array(encoded["line"].to_numpy() - 1 - part.first))
            for column in encoded.column_names:
                source = source.append_column(column, encoded[column])
            job.out.write(f"{name}/{number:06}.parquet", source)
            counts[name] = encoded.num_rows
    return summary_of(number, told, **counts)


def _fitting(columns: EncodedColumns, data: Data, counts: dict[str, int]) -> EncodedColumns:
    """Rows no longer than ``data`` allows; the others are counted in ``counts``."""
    is_long = columns.lengths > data.max_tokens
    counts["longest"] = max(counts["longest"], int(columns.lengths.max(initial=0)))
    counts["too_long"] += int(is_long.sum())
    if data.overlength == "truncate":
        return columns.cut(data.max_tokens)
    return columns.take(numpy.flatnonzero(~is_long))


def _as_table(columns: EncodedColumns) -> pyarrow.Table:
    rows = list(columns)
    ids = pyarrow.array([row.input_ids for row in rows], pyarrow.list_(pyarrow.uint32()))
    supervised = pyarrow.array([row.supervised for row in rows], pyarrow.list_(pyarrow.bool_()))
    return pyarrow.table({"line": columns.lines, "input_ids": ids, "supervised": supervised})
