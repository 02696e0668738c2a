"""The table is true: every part is where it says."""

import importlib

from tests.cases.entry import MODULES, PARTS


def test_every_part_is_where_the_table_says() -> None:
    missing = [name for name, place in PARTS.items() if not hasattr(importlib.import_module(place), name)]
    assert not missing
    assert all(importlib.import_module(place) for place in MODULES.values())
