"""A Great Expectations suite made from today's rows, so that validation says when tomorrow's differ from them.

The suite is a JSON file in Great Expectations' own format, kept in the repository beside pipelines.yaml, where people
read and edit it and git shows what changed.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graftline.data.rows import Row
from graftline.errors import DataError
from graftline.settings.data import Check

WIDER = 1.5
"""Factor by which a later length may exceed today's largest, and a later mean may differ from today's either way."""
MAX_ANSWERS = 50
"""At most so many different answers, each given often, are taken for labels."""
MIN_REPEATS = 5
_SURE = 0.99
"""Share of rows that must meet an expectation on lengths: tails are long."""


def profile(rows: Iterable[Row], tokens: Sequence[int], learned: Sequence[int]) -> dict[str, Any]:
    """The suite that describes these rows.

    Args:
        rows: of both sides; they are read once.
        tokens: of each row.
        learned: how many of them are learned.

    Raises:
        DataError: there are no rows.
    """
    lengths: dict[str, list[int]] = {"prompt": [], "completion": []}
    turns, answers, prompts = 0, Counter[str](), set[int]()
    for row in rows:
        lengths["prompt"].append(len(row.prompt))
        lengths["completion"].append(len(row.answer))
        turns = max(turns, len(row.messages))
        prompts.add(hash(row.prompt))
        if len(answers) <= MAX_ANSWERS:
            answers[row.answer] += 1
    number = len(tokens)
    if not number:
        raise DataError("there are no rows to profile; run `graftline fetch PIPELINE` first")
    found = [_between("lengths", name, 1, _wider(max(values)), _SURE) for name, values in lengths.items()]
    found += [
        _between("values", "tokens", 1, _wider(max(tokens)), _SURE),
        _between("values", "turns", 1, max(turns, 1)),
        _mean("tokens", tokens),
        _mean("supervised_tokens", learned),
        {
            "type": "expect_column_proportion_of_unique_values_to_be_between",
            "kwargs": {"column": "prompt", "min_value": round(len(prompts) / number * 0.9, 4)},
        },
    ]
    if len(answers) <= MAX_ANSWERS and min(answers.values()) >= MIN_REPEATS:
        values = {"column": "completion", "value_set": sorted(answers)}
        found.append({"type": "expect_column_values_to_be_in_set", "kwargs": values})
    return {"name": "rows", "meta": {"rows": number}, "expectations": found}


def _between(what: str, column: str, least: int, most: int, mostly: float = 1.0) -> dict[str, Any]:
    kind = "expect_column_value_lengths_to_be_between" if what == "lengths" else "expect_column_values_to_be_between"
    sure = {"mostly": mostly} if mostly < 1 else {}
    return {"type": kind, "kwargs": {"column": column, "min_value": least, "max_value": most, **sure}}


def _mean(column: str, values: Sequence[int]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    bounds = {"min_value": round(mean / WIDER, 2), "max_value": round(mean * WIDER, 2)}
    return {"type": "expect_column_mean_to_be_between", "kwargs": {"column": column, **bounds}}


def _wider(most: int) -> int:
    return max(1, round(most * WIDER))


def read_suite(path: Path) -> tuple[Check, ...]:
    """The expectations of a suite in Great Expectations' form.

    Raises:
        DataError: the file is missing or is not such a suite; the entry is named.
    """
    try:
        suite = json.loads(path.read_text(encoding="utf-8-sig"))
        given = suite["expectations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a suite of Great Expectations ({error!r}); `graftline validate PIPELINE --profile` writes "
            "one"
        ) from error
    checks = []
    for number, each in enumerate(given if isinstance(given, list) else [given], start=1):
        try:
            checks.append(Check.model_validate({**each["kwargs"], "expectation": each["type"]}))
        except (ValidationError, KeyError, TypeError) as error:
            raise DataError(f"{path}: expectation {number} has no type or kwargs, or others: {error}") from error
    return tuple(checks)
