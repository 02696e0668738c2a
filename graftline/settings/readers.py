"""One meaning of pipelines.yaml for every tool that reads it, and what is written back reads as it was.

We read it with ruamel.yaml's Python parser, which knows every node's line; DVC, and whatever else parses YAML in C,
reads it with libyaml. The two differ: an unquoted ``path:rows.jsonl`` inside ``{…}`` or ``[…]`` stops libyaml, and an
unquoted date stops DVC anywhere. What they do not read the same is refused here, before a stage stops at it.
"""

import io
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode

from graftline.errors import ConfigError
from graftline.settings.tree import Path, Tree, read_tree


class _AsDvcReads(SafeConstructor):
    """libyaml's values without dates: DVC has no such type, and stops with an error that names no line."""

    def refuse_date(self, node: ScalarNode) -> None:
        """Say where a date stands, one of the calendar or not."""
        raise ConstructorError(None, None, f"{node.value} is a date or a time to it, not text", node.start_mark)


_AsDvcReads.add_constructor("tag:yaml.org,2002:timestamp", _AsDvcReads.refuse_date)


def check_read_alike(data: bytes, tree: Tree, name: str) -> None:
    """Compare a tree with what DVC reads in the same file.

    Args:
        data: the file's bytes, UTF-8.
        tree: what `read_tree` made of them.
        name: what errors call the file.

    Raises:
        ConfigError: DVC cannot read the file, or reads another value; the line is named.
    """
    yaml = YAML(typ="safe")
    yaml.Constructor = _AsDvcReads
    try:
        other = yaml.load(data.decode("utf-8-sig"))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            f"{name}:{mark.line + 1 if mark else 1}: DVC cannot read this line: {error.problem or error.context}; "
            'put the text in quotes (source: "path:rows.jsonl", starts: "2026-12-24T00:00:00Z")'
        ) from error
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: DVC cannot read it: {' '.join(str(error).split())}") from error
    if difference := _first_difference(tree.value, other, ()):
        path, ours, theirs = difference
        raise ConfigError(
            f"{name}:{_line(path, tree)}: {_key(path)}: is {ours!r} here and {theirs!r} to DVC; "
            "put it in quotes, or write it in another way"
        )


def narrowed(data: bytes, pipelines: Sequence[str], name: str) -> str:
    """pipelines.yaml with only these pipelines; everything that stays reads as it did, in the same order.

    Raises:
        ConfigError: the file cannot be read, lacks one of them, or cannot be written so that it reads the same.
    """
    value = read_tree(data, name).value
    known = value.get("pipelines") if isinstance(value, dict) else None
    there: dict[str, Any] = known if isinstance(known, dict) else {}
    if missing := [pipeline for pipeline in pipelines if pipeline not in there]:
        raise ConfigError(f"{name}: pipeline {', '.join(missing)} is not in it; expected some of {', '.join(there)}")
    value["pipelines"] = {pipeline: there[pipeline] for pipeline in pipelines}
    text = _write(value)
    tree = read_tree(text.encode(), name)
    check_read_alike(text.encode(), tree, name)
    if difference := _first_difference(value, tree.value, ()):
        path, was, reads = difference
        raise ConfigError(f"{name}: {_key(path)}: {was!r} would be written back as {reads!r}; write it in another way")
    return text


def _write(value: Any) -> str:
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    # The first entry of `quantize.bits` that matches a layer counts: sorted keys would be another model.
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel declares no type but None's
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def _first_difference(one: Any, other: Any, path: Path) -> tuple[Path, Any, Any] | None:
    """Where two values differ, in type, in content or in the order of their keys; None if nowhere."""
    pairs: list[tuple[str | int, Any, Any]]
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        pairs = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(index, *both) for index, both in enumerate(zip(one, other, strict=True))]
    else:
        is_same = not isinstance(one, dict | list) and type(one) is type(other) and one == other
        return None if is_same else (path, one, other)
    differences = (_first_difference(ours, theirs, (*path, key)) for key, ours, theirs in pairs)
    return next((found for found in differences if found), None)


def _key(path: Path) -> str:
    return ".".join(map(str, path)) or "file"


def _line(path: Path, tree: Tree) -> int:
    while path not in tree.lines:
        path = path[:-1]
    return tree.lines[path]
