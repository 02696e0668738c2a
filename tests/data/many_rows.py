"""Rows with duplicates of every kind, as parquet files: what a job over many machines and one machine must agree on."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

_FRAME = "Answer in one word, without any explanation, what the following is about: "


def make_rows(count: int) -> list[dict[str, Any]]:
    """Prompts behind one frame: many alone, some repeated letter by letter, in another case, or with one word changed.

    Near duplicates come in chains, whose ends are not near each other.
    """
    draw = random.Random(5)
    words = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6)) for _ in range(400)]
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        text = draw.choices(words, k=24)
        answer = draw.choice(words)
        for _ in range(draw.choice([1, 1, 1, 1, 3])):
            rows.append({"prompt": _FRAME + " ".join(text), "completion": f" {answer}"})
            text = [*text]
            text[draw.randrange(24)] = draw.choice(words)
        if draw.random() < 0.1:
            rows.append(dict(rows[draw.randrange(len(rows))]))
        if draw.random() < 0.1:
            chosen = rows[draw.randrange(len(rows))]
            rows.append({"prompt": chosen["prompt"].upper(), "completion": chosen["completion"]})
    draw.shuffle(rows)
    return rows[:count]


def write_parts(rows: Sequence[dict[str, Any]], folder: Path, *, files: int, group: int) -> None:
    """The rows in order over ``files`` files, whose row groups have ``group`` rows."""
    folder.mkdir(parents=True)
    each = -(-len(rows) // files)
    for number in range(files):
        table = pyarrow.Table.from_pylist(list(rows[number * each : (number + 1) * each]))
        pyarrow.parquet.write_table(table, folder / f"rows-{number}.parquet", row_group_size=group)
