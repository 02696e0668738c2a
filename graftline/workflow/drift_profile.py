"""What a release's training prompts are like, as ``prompts.json`` in its package: lengths, and hashes of words."""

import json
import random
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from graftline.data.rows import Row
from graftline.digest import write_text
from graftline.errors import DataError
from graftline.evaluate.statistics.drift import Prompt
from graftline.registry.request_log import REMOVED

PROMPTS_FILE = "prompts.json"
_MOST_PROMPTS = 2000
_MOST_WORDS = 256
"""Words of a prompt that are looked at beside its length."""
_BUCKETS = 1 << 16
# Letters of scripts that are written without spaces count one by one.
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\u0e00-\u0eff]|\w+|[^\w\s]")


def prompt_of(texts: Sequence[str]) -> Prompt:
    """The words of a conversation's beginning: `Row.messages` or a request's, up to the user's first turn."""
    words = _WORD.findall("\n".join(texts).replace(REMOVED, " ").casefold())
    hashed = {zlib.crc32(word.encode("utf-8", "replace")) % _BUCKETS for word in words[:_MOST_WORDS]}
    return Prompt(len(words), tuple(sorted(hashed)))


def opening(turns: Sequence[tuple[str, str]]) -> list[str]:
    """Texts up to the user's first turn, of (role, text)."""
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), len(turns))
    return [text for _, text in turns[: first + 1]]


def write_prompts(rows: Sequence[Row], path: Path) -> None:
    """Write what up to 2,000 rows' prompts are like, in random order."""
    numbers = random.Random(0).sample(range(len(rows)), min(len(rows), _MOST_PROMPTS))
    openings = (opening([(turn.role, turn.content) for turn in rows[number].messages[:-1]]) for number in numbers)
    prompts = [prompt_of(texts) for texts in openings]
    value = {"format": 1, "prompts": [[prompt.length, list(prompt.tokens)] for prompt in prompts]}
    write_text(path, json.dumps(value, separators=(",", ":")) + "\n")


def read_prompts(data: bytes, of: str) -> list[Prompt]:
    """The prompts of a ``prompts.json``; DataError if it is not one."""
    try:
        value = json.loads(data)
        if value["format"] != 1:
            raise ValueError(f"format {value['format']}")
        return [Prompt(int(length), tuple(map(int, tokens))) for length, tokens in value["prompts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{PROMPTS_FILE} of {of} cannot be read ({error}); release again") from error
