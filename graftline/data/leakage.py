"""Evaluation rows that the training rows already hold: exactly, after normalization, or nearly (MinHash).

A model that has seen an evaluation prompt is not being evaluated. Prompts are compared (all before the last answer):
the same question with another answer leaks too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftline.data.formats import Row
from graftline.data.similarity import NEAR, NearIndex, normalize
from graftline.progress import OnProgress, silent


@dataclass(frozen=True, slots=True)
class Leak:
    """An evaluation row and the training row most like it; ``similarity`` is 1.0 unless ``kind`` is near."""

    kind: Literal["exact", "normalized", "near"]
    training_line: int
    evaluation_line: int
    similarity: float


def find_leaks(
    training: Sequence[Row], evaluation: Sequence[Row], *, threshold: float = NEAR, on_progress: OnProgress = silent
) -> tuple[Leak, ...]:
    """At most one pair for each evaluation row, in their order: the first training row of the closest kind."""
    exact: dict[str, int] = {}
    normalized: dict[str, int] = {}
    for row in training:
        exact.setdefault(row.prompt, row.source_line)
        normalized.setdefault(normalize(row.prompt), row.source_line)
    index = NearIndex([row.prompt for row in (*training, *evaluation)], on_progress=on_progress)
    for at in range(len(training)):
        index.add(at)
    leaks: list[Leak] = []
    for at, row in enumerate(evaluation, start=len(training)):
        if row.prompt in exact:
            leaks.append(Leak("exact", exact[row.prompt], row.source_line, 1.0))
        elif (key := normalize(row.prompt)) in normalized:
            leaks.append(Leak("normalized", normalized[key], row.source_line, 1.0))
        elif found := max(index.near(at, threshold=threshold), key=lambda pair: (pair[1], -pair[0]), default=None):
            leaks.append(Leak("near", training[found[0]].source_line, row.source_line, found[1]))
    return tuple(leaks)
