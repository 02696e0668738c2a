"""General English on which the candidate must not become worse: sentences of nlp-corpus, a JSON list of text."""

import json
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 40, 400  # characters


def documents(source: Path) -> Iterator[str]:
    """One sentence a document, in the file's order (it is shuffled already)."""
    for sentence in json.loads(source.read_text(encoding="utf-8")):
        if SHORTEST <= len(sentence) <= LONGEST:
            yield sentence
