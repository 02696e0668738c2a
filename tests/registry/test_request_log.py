"""A request log's parts in every kind of store: written, read in order, and deleted when their time is over."""

import json
from datetime import UTC, datetime, timedelta

from graftline.registry.request_log import LogPlace
from graftline.registry.store import Store


def line(number: int) -> bytes:
    rated = {"format": 1, "kind": "rating", "id": f"{number}", "time": "2026-11-27T08:00:00Z", "rating": "good"}
    return json.dumps(rated).encode() + b"\n"


def test_parts_are_read_in_order_and_deleted_after_their_time(store: Store) -> None:
    place, now = LogPlace(store, "demo", "production", retention_days=7), datetime.now(UTC)
    other = LogPlace(store, "demo", "staging", retention_days=7)
    for days in (1, 8, 2):
        store.put_bytes(place.part_key("server", 0, now - timedelta(days=days)), line(days) + line(days * 10))
    store.put_bytes(other.part_key("server", 0, now), line(99))
    assert [logged.id for logged in place.read()] == ["2", "20", "1", "10"]
    assert place.expire() == 1
    assert len(store.list("requests")) == 3
    assert [logged.id for logged in other.read()] == ["99"]
