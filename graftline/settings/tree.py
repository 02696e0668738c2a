"""YAML as a plain tree with line numbers: only mappings, lists, text, numbers, booleans and null.

Anchors, aliases and merge keys (``<<``) are allowed. Tags, directives, several documents, duplicate keys, keys that are
not text, deep nesting and aliases that expand to huge trees are refused, and the line is named.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from graftline.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 24
MAX_NODES, REPEATS = 50_000, 20
"""Budget of values repeated by aliases and merge keys: a constant, plus a number for each value written out."""

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Tree:
    """``value`` is JSON-like; ``lines`` gives the line, counted from 1, where the key or item at a path is written."""

    value: Any
    lines: dict[Path, int]

    def written(self, path: Path) -> Path:
        """The path itself if it is written in the file, otherwise its closest ancestor that is."""
        while path not in self.lines:
            path = path[:-1]
        return path

    def line(self, path: Path) -> int:
        """The line of `written`."""
        return self.lines[self.written(path)]


def key_of(path: Path) -> str:
    """A path as errors name it: ``pipelines.demo.train``, or ``file`` for the whole file."""
    return ".".join(map(str, path)) or "file"


class _RefusedError(Exception):
    """A construct that is not allowed, with its line."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def read_tree(data: bytes, name: str) -> Tree:
    """Read YAML 1.2.

    Args:
        data: the file's bytes, UTF-8.
        name: the file's name in errors.

    Raises:
        ConfigError: not UTF-8, not YAML, too large, or a construct that is not allowed; the line is named.
    """
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: {len(data)} bytes; expected at most {MAX_BYTES}; is this the right file?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    try:
        _check_events(text)
        node = YAML(typ="safe", pure=True).compose(text)
        if node is None:
            raise _RefusedError(1, "the file is empty; `graftline init NAME` makes a project with a commented one")
        return _Builder().build(node)
    except _RefusedError as error:
        raise ConfigError(f"{name}:{error.line}: {error}") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not YAML: {error.problem or error.context}") from error
    except YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from error


def _check_events(text: str) -> None:
    """Refuse what must not reach the composer. The parser is a state machine, so nesting uses no stack here."""
    depth = documents = 0
    anchors: dict[str, int] = {}
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _RefusedError(line, "a second document starts here; expected one; remove the `---`")
            if event.version or event.tags:
                raise _RefusedError(line, "a % directive was given; expected plain YAML 1.2; remove it")
        if isinstance(event, NodeEvent) and not isinstance(event, AliasEvent) and event.anchor:
            # The Python parser takes the last duplicate, libyaml refuses it.
            if event.anchor in anchors:
                first = anchors[event.anchor]
                raise _RefusedError(
                    line, f"&{event.anchor} is given twice, first on line {first}; give each its own name"
                )
            anchors[event.anchor] = line
        tag = getattr(event, "tag", None) if isinstance(event, NodeEvent) else None
        if tag:
            raise _RefusedError(line, f"tag {tag} was given; expected plain values; remove the tag")
        if isinstance(event, CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _RefusedError(line, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, CollectionEndEvent):
            depth -= 1


class _Builder:
    """Turns YAML nodes into a `Tree`, within a budget of nodes that aliases cannot escape."""

    def __init__(self) -> None:
        self._lines: dict[Path, int] = {}
        self._seen: set[int] = set()
        self._num_repeated = 0
        self._scalars = SafeConstructor(loader=YAML(typ="safe", pure=True))

    def build(self, root: Node) -> Tree:
        """The tree below ``root``, aliases and merge keys resolved."""
        value = self._value(root, ())
        return Tree(value, self._lines)

    def _value(self, node: Node, path: Path) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        self._count(node, line)
        if len(path) > MAX_DEPTH:
            raise _RefusedError(line, f"aliases expand to more than {MAX_DEPTH} levels; write them out")
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _count(self, node: Node, line: int, num_merged: int = 0) -> None:
        """Charge what aliases and merge keys repeat to the budget; values that are written out are free."""
        self._num_repeated += num_merged + (id(node) in self._seen)
        self._seen.add(id(node))
        budget = MAX_NODES + REPEATS * len(self._seen)
        if self._num_repeated > budget:
            raise _RefusedError(line, f"aliases expand to more than {budget} values; write them out")

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        result = {}
        for key, (key_node, value_node) in self._pairs(node, set()).items():
            self._lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = self._value(value_node, (*path, key))
        return result

    def _pairs(self, node: MappingNode, open_nodes: set[int]) -> dict[str, tuple[Node, Node]]:
        """Keys of a mapping with merge keys resolved: its own keys win, then the first merged mapping with the key."""
        line = node.start_mark.line + 1
        if id(node) in open_nodes:
            raise _RefusedError(line, "a mapping merges itself")
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, tuple[Node, Node]] = {}
        merging: int | None = None
        for key_node, value_node in node.value:
            if isinstance(key_node, ScalarNode) and key_node.value == "<<" and not key_node.style:
                if merging is not None:
                    raise _RefusedError(
                        key_node.start_mark.line + 1,
                        f"`<<` is given twice, first on line {merging}; write `<<: [*one, *other]`",
                    )
                merging = key_node.start_mark.line + 1
                for source in self._merge_sources(value_node):
                    merged = self._pairs(source, open_nodes | {id(node)}) | merged
                continue
            key = self._key(key_node)
            if key in own:
                first = own[key][0].start_mark.line + 1
                raise _RefusedError(
                    key_node.start_mark.line + 1, f"key {key!r} is given twice, first on line {first}; keep one"
                )
            own[key] = (key_node, value_node)
        self._count(node, line, num_merged=len(merged))
        return merged | own

    def _merge_sources(self, node: Node) -> Iterator[MappingNode]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, MappingNode):
                raise _RefusedError(
                    node.start_mark.line + 1, "`<<` takes a mapping or a list of mappings; write `<<: *name`"
                )
            yield source

    def _key(self, node: Node) -> str:
        line = node.start_mark.line + 1
        value = self._scalar(node) if isinstance(node, ScalarNode) else None
        if not isinstance(value, str):
            given = getattr(node, "value", "") if isinstance(node, ScalarNode) else "a list or mapping"
            raise _RefusedError(line, f"key {given} is not text; put it in quotes")
        return value

    def _scalar(self, node: Node) -> str | int | float | bool | None:
        line = node.start_mark.line + 1
        kind = str(node.tag).rpartition(":")[2]
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return bool(self._scalars.construct_yaml_bool(node))
            if kind == "int":
                return int(self._scalars.construct_yaml_int(node))
            if kind == "float":
                number = float(self._scalars.construct_yaml_float(node))
                if not math.isfinite(number):
                    raise _RefusedError(line, f"{node.value} is not a finite number")
                return number
            text = str(node.value)
            text.encode()
            if "\x85" in text:
                raise _RefusedError(
                    line, f"{text[:40]!r} holds U+0085, an old line end that DVC does not keep; remove it"
                )
        except UnicodeEncodeError as error:
            raise _RefusedError(
                line, f"{text[:40]!r} cannot be read as str: half a character; write it as itself"
            ) from error
        except (ValueError, KeyError, OverflowError) as error:
            raise _RefusedError(
                line, f"{str(node.value)[:40]!r} cannot be read as {kind}; put text in quotes"
            ) from error
        return text


# pipelines.yaml must mean the same to every tool that reads it, and stay the same when it is written back.
#
# We read it with ruamel.yaml's Python parser, which knows every node's line; DVC, like other tools that parse YAML in
# C, reads it with libyaml. The two differ: an unquoted ``path:rows.jsonl`` inside ``{…}`` or ``[…]`` stops libyaml, and
# an unquoted date stops DVC anywhere. Whatever they read differently is refused here, before a stage fails on it.


class _AsDvcReads(SafeConstructor):
    """libyaml's values without dates: DVC has no such type, and fails with an error that names no line."""

    def refuse_date(self, node: ScalarNode) -> None:
        """Report the line of a date, even of one that is not in the calendar."""
        raise ConstructorError(None, None, f"{node.value} is a date or a time to it, not text", node.start_mark)


_AsDvcReads.add_constructor("tag:yaml.org,2002:timestamp", _AsDvcReads.refuse_date)


def check_read_alike(data: bytes, tree: Tree, name: str) -> None:
    """Check that DVC reads the same values from a file as a tree has.

    Args:
        data: the file's bytes, UTF-8.
        tree: what `read_tree` made of them.
        name: the file's name in errors.

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
            f"{name}:{tree.line(path)}: {key_of(path)}: is {ours!r} here and {theirs!r} to DVC; "
            "put it in quotes, or write it in another way"
        )


def narrowed(data: bytes, pipelines: Sequence[str], name: str) -> str:
    """pipelines.yaml with only these pipelines; everything else keeps its meaning and order.

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
        raise ConfigError(
            f"{name}: {key_of(path)}: {was!r} would be written back as {reads!r}; write it in another way"
        )
    return text


def _write(value: Any) -> str:
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    # A layer takes the first entry of `quantize.bits` that matches: sorted keys would give another model.
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel declares no type but None's
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def _first_difference(one: Any, other: Any, path: Path) -> tuple[Path, Any, Any] | None:
    """The first difference of two values in type, content or order of keys; None if they are equal."""
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
