"""Whatever the bytes are: a configuration, or a ConfigError. Never another exception, never a hang."""

import copy
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.address import parse
from graftline.errors import ConfigError, SourceError
from graftline.settings import Config
from tests.settings.documents import RIGHT, read

YAML_PIECES = [
    "pipelines:", "channels:", "a: ", "- ", "&a ", "*a", "<<: ", "!!", "!t ", "%YAML 1.1\n", "---\n", "...\n", "{", "}",
    "[", "]", ", ", ": ", "? ", "|", ">", "'", '"', "#", "\n", "\n  ", "\t", "~", "1e5", "0x", "0o8", ".inf",
    "2026-01-01", "1:30", "\\ud800", "\u2028", "\x85", "\ufeff", "=", "0b12", "-", "+.5", "1_", "@", "`", "null", "yes",
]  # fmt: skip
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def read_or_refuse(data: bytes) -> Config | None:
    try:
        return read(data)
    except ConfigError:
        return None


@settings(max_examples=300, deadline=2000)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    read_or_refuse(data)


@settings(max_examples=500, deadline=2000)
@given(st.lists(st.sampled_from(YAML_PIECES) | st.text(max_size=5), max_size=25))
def test_any_yaml_looking_text_is_read_or_refused(pieces: list[str]) -> None:
    read_or_refuse("".join(pieces).encode("utf-8", "surrogatepass"))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


@settings(max_examples=400, deadline=2000)
@given(st.sampled_from(_places(RIGHT)[1:]), JSON_VALUES)
def test_any_value_at_any_place_is_read_or_refused(path: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(RIGHT)
    place: Any = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value

    config = read_or_refuse(json.dumps(document).encode())

    if config is not None:
        for name in config.names:
            json.dumps([setting.value for setting in config.show(name)])


@settings(max_examples=300, deadline=2000)
@given(
    st.text(max_size=80)
    | st.builds(
        "{}{}{}{}".format,
        st.sampled_from(["path:", "hf:", "https://", "http://", "s3://", "pypi:", "npm:"]),
        st.text(max_size=20),
        st.sampled_from(["@", "==", "/", "", "?token="]),
        st.text(max_size=20),
    )
)
def test_an_address_is_parsed_so_that_it_can_be_printed_and_parsed_again_or_refused(text: str) -> None:
    try:
        source = parse(text)
    except SourceError:
        return
    assert parse(str(source)) == source


def test_the_places_that_are_changed_cover_the_document() -> None:
    assert len(_places(RIGHT)) > 40
