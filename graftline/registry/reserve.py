"""The reserve: rows that only promotions look at, and a count of how often that was done.

A release brings its reserve along (``reserve/``, kept back by the fetch stage). Before a promotion scores it, the look
is counted: ``looks/<pipeline>/<digest of the rows>/0000000007.json`` is the seventh look at these rows, whatever comes
of it, and no two promoters get one number. The result is in the entry (`ReserveVerdict`), signed by the promoter.
"""

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import AwareDatetime, Field

from graftline.digest import Digest
from graftline.errors import ConflictError, PromotionError
from graftline.plain_text import count
from graftline.registry.objects import check_name
from graftline.registry.store import Store
from graftline.release.manifest import DigestText, Manifest, Part, Record

ROWS = "reserve/evaluation.jsonl"
"""The file of a release with the rows."""
ROW_FILES = (ROWS, "reserve/general.jsonl")
"""The files of lines; the second, where evaluations have general text, is empty."""
MANY_LOOKS = 10
"""Number of looks from which on the doctor and the page warn (docs/promotion.md says why)."""
_LOOK_NAME = re.compile(r"[0-9]{10}\.json")
Outcome = Literal["pass", "fail", "inconclusive"]


class ReserveVerdict(Part):
    """What the gates say on the reserve."""

    outcome: Outcome
    rows: DigestText
    """The file of rows."""
    look: Annotated[int, Field(ge=1)]
    """How often promotions have looked at these rows, this one included."""
    against: str
    """Version of the release that it was compared with; ``base`` if there was none."""
    release: DigestText | None
    """Digest of that release's manifest."""
    anchor: DigestText | None
    """Digest of the anchor that it was compared with, too; None: with none."""
    evidence: str
    """Number of rows, gates, differences, in words."""


class Look(Record):
    """A promotion's look at the reserve, written before it."""

    kind: ClassVar[str] = "look at a reserve"
    format: Literal[1] = 1
    pipeline: str
    rows: DigestText
    number: Annotated[int, Field(ge=1)]
    version: str
    """The release that is to be promoted."""
    channel: str
    actor: str
    time: AwareDatetime
    nonce: str
    """Random, so that two promoters never write equal bytes, which a store takes for one look."""


@dataclass(frozen=True, kw_only=True)
class Looker:
    """Who looks, at what and what for."""

    pipeline: str
    rows: Digest
    version: str
    channel: str
    actor: str


def rows_of(manifest: Manifest) -> Digest:
    """The digest of a release's reserve; PromotionError if it has none."""
    found = next((entry.digest for entry in manifest.files if entry.path == ROWS), None)
    if found is None:
        raise PromotionError(
            f"{manifest.version} brings no rows that only promotions look at, and the channel asks for them "
            "(reserve: on); set data.reserve_rows and run the pipeline again"
        )
    return found


def count_look(store: Store, by: Looker, *, known: Iterable[ReserveVerdict | None], now: datetime) -> int:
    """Count a look at the reserve, before it is done; how many there are with it.

    Args:
        store: where looks are counted.
        by: who looks, at what.
        known: verdicts in the log, whose signed numbers outlast objects that somebody removed.
        now: the time.
    """
    number = max([looks(store, by.pipeline, by.rows), *(one.look for one in known if one and one.rows == by.rows)])
    while True:
        number += 1
        look = Look(number=number, time=now.replace(microsecond=0), nonce=secrets.token_hex(16), **vars(by))
        try:
            store.create(f"{_folder(by.pipeline)}/{by.rows.hex}/{number:010d}.json", look.to_bytes())
        except ConflictError:  # another promoter looks at the same time
            continue
        return number


def looks(store: Store, pipeline: str, rows: Digest) -> int:
    """How often promotions have looked at these rows."""
    return all_looks(store, pipeline).get(rows.hex, 0)


def all_looks(store: Store, pipeline: str) -> dict[str, int]:
    """How often promotions have looked at each reserve of a pipeline, by the digest of its rows."""
    found = dict[str, int]()
    for key in store.list(_folder(pipeline)):
        rows, _, name = key.removeprefix(f"{_folder(pipeline)}/").partition("/")
        if _LOOK_NAME.fullmatch(name):  # no other name is of a look, whoever wrote it
            found[rows] = max(found.get(rows, 0), int(name.removesuffix(".json")))
    return found


def looks_in_words(rows: str, number: int) -> str:
    """How often a reserve, by the digest of its rows, was looked at, and what follows from it."""
    told = f"rows {rows[:12]}, which only promotions look at: looked at {count(number, 'time')}"
    worn = "; by so many looks they have come to flatter what they let in (docs/promotion.md, a reserve)"
    return told + (worn if number >= MANY_LOOKS else "")


def _folder(pipeline: str) -> str:
    return f"looks/{check_name('pipeline', pipeline)}"
