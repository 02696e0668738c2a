"""Whose clock counts: entries of several machines are compared, so what writes one compares its clock with the store's.

A promoter that is a day behind would enter a channel yesterday, and a day of soak would have passed at once. The
store's clock is the one that every machine can see: an S3 server dates its answers, a file system its files.
"""

from datetime import UTC, datetime, timedelta

from graftline.errors import PromotionError
from graftline.registry.channel import Entry
from graftline.registry.store import Store

TOLERANCE = timedelta(minutes=5)
"""By how much two clocks may differ: what NTP keeps is seconds, what nobody keeps is hours."""


def checked_now(store: Store) -> datetime:
    """The time by the store's clock, after this machine's was found to agree with it.

    Raises:
        PromotionError: they differ by more than minutes; both times are given.
        StoreError: the store cannot be asked.
    """
    own, there = datetime.now(UTC), store.now()
    if there is None:
        return own
    if abs(own - there) > TOLERANCE:
        raise PromotionError(
            f"this machine's clock says {own:%Y-%m-%d %H:%M:%S} UTC, that of {store.url} {there:%Y-%m-%d %H:%M:%S} "
            "UTC; what is entered on a wrong clock cannot be compared: set the clock that is wrong (NTP) and try again"
        )
    return there


def entry_time(head: Entry | None, now: datetime) -> datetime:
    """The time of a new entry, in whole seconds: never before that of the entry before it.

    Raises:
        PromotionError: the entry before is dated later than minutes from now; both times are given.
    """
    if head is None:
        return now.replace(microsecond=0)
    before = head.change.time
    if now + TOLERANCE < before:
        raise PromotionError(
            f"it is {now:%Y-%m-%d %H:%M:%S} UTC here, and entry {head.number} of {head.channel} was written at "
            f"{before:%Y-%m-%d %H:%M:%S} UTC; one of the two clocks is wrong: set it (NTP), or wait until then"
        )
    return max(now.replace(microsecond=0), before)
