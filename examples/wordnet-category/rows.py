"""Rows of the task: the definition of an English noun -> its category, one of ten, 1,200 rows each.

WordNet keeps its nouns in files by topic; the topic's number is the second field of every line of ``data.noun``, the
definition follows the bar. Rows are drawn and shuffled with a fixed seed, and no definition comes twice.
"""

import random
from collections.abc import Iterator
from pathlib import Path

TOPICS = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "10": "communication",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
    "27": "substance",
}
ROWS_PER_TOPIC = 1200
SHORTEST, LONGEST = 20, 160  # characters of a definition: shorter ones say too little, longer ones are rare


def rows(source: Path) -> Iterator[dict[str, str]]:
    """Rows with the keys ``prompt`` and ``completion``, in shuffled order."""
    draw = random.Random(0)
    chosen = []
    for topic, definitions in _definitions(source).items():
        rows_of_topic = [
            {"prompt": f"Definition: {definition}\nCategory:", "completion": f" {topic}"} for definition in definitions
        ]
        chosen += draw.sample(rows_of_topic, min(ROWS_PER_TOPIC, len(rows_of_topic)))
    draw.shuffle(chosen)
    yield from chosen


def _definitions(source: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {topic: [] for topic in TOPICS.values()}
    seen = set()
    with source.open(encoding="latin-1") as lines:
        for line in lines:
            if line.startswith("  "):  # the licence, at the top of the file
                continue
            fields, gloss = line.rstrip("\n").split(" | ", 1)
            definition = gloss.split('; "')[0].strip()  # example sentences follow the definition in quotes
            topic = TOPICS.get(fields.split()[1])
            if topic and SHORTEST <= len(definition) <= LONGEST and definition not in seen:
                seen.add(definition)
                found[topic].append(definition)
    return found
