"""Rows of a small task: does a definition describe an animal or a plant? From WordNet's ``data.noun``, in its order."""

from collections.abc import Iterator
from pathlib import Path

KINDS = {"05": "animal", "20": "plant"}
SHORTEST, LONGEST = 20, 120  # characters of a definition


def rows(source: Path) -> Iterator[dict[str, str]]:
    """Rows with the keys ``prompt`` and ``completion``; no definition comes twice."""
    seen = set()
    with source.open(encoding="latin-1") as lines:
        for line in lines:
            fields, _, gloss = line.partition(" | ")
            kind = KINDS.get(fields.split()[1]) if gloss else None
            definition = gloss.split('; "')[0].strip()
            if kind and SHORTEST <= len(definition) <= LONGEST and definition not in seen:
                seen.add(definition)
                yield {"prompt": f"Definition: {definition}\nAnimal or plant:", "completion": f" {kind}"}
