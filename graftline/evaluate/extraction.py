"""Answers that are JSON: is an answer valid, is it the expected value, and which of its fields are right?

A field is a value at a leaf, named by the path to it: ``{"to": [{"city": "Ulm"}]}`` has the field ``to[].city`` =
``"Ulm"``. For fields, the items of a list may come in any order. Numbers are compared exactly (``1.0`` is ``1``, and
``0.1`` is not rounded to a binary fraction); ``true`` is not 1, and ``null`` is not a missing field.
"""

import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonschema import validators
from jsonschema.exceptions import SchemaError
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from graftline.errors import EvaluationError

_UNREADABLE = (ValueError, RecursionError, ArithmeticError)


@dataclass(frozen=True)
class JsonSchema:
    """A JSON Schema file and its content; `{}` allows any JSON value."""

    path: Path
    content: Any

    @classmethod
    def read(cls, path: Path) -> "JsonSchema":
        """Read and check a schema.

        Raises:
            EvaluationError: it is missing, not a JSON Schema, or refers to other files, which are never fetched.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            validators.validator_for(content, default=validators.Draft202012Validator).check_schema(content)
        except (OSError, *_UNREADABLE, SchemaError) as error:
            reason = error.message if isinstance(error, SchemaError) else error
            raise EvaluationError(f"{path} is not a JSON Schema: {reason}; expected one, or {{}}") from error
        own = Registry().with_resource("", Resource.from_contents(content, default_specification=DRAFT202012))
        for reference in _references(content):
            if not reference.startswith("#"):
                raise EvaluationError(f"{path} refers to {reference}; only its own parts (#/$defs/…) can be read")
            try:
                own.resolver("").lookup(reference)
            except Unresolvable as error:
                raise EvaluationError(f"{path} refers to {reference}, which it does not have") from error
        return cls(path, content)

    def allows(self, value: Any) -> bool:
        """Whether a value meets the schema."""
        try:
            return bool(self._validator.is_valid(value))
        except _UNREADABLE:  # such as a number too large for `multipleOf`
            return False

    @cached_property
    def _validator(self) -> Any:
        found = validators.validator_for(self.content, default=validators.Draft202012Validator)
        # An empty registry: the default one would ask the network for references.
        return found(self.content, registry=Registry())

    def score(self, answer: str, expected: str) -> dict[str, float]:
        """`json_valid`, `json_equal`, `field_precision`, `field_recall` and `field_f1` of an answer, each 0 to 1.

        An answer that is not JSON, or does not meet the schema, scores 0 in all of them.
        """
        ours, theirs = self.parse(answer), self.parse(expected)
        if theirs is None:
            raise EvaluationError(
                f"the row's own answer {expected.strip()[:80]!r} is not JSON that meets {self.path.name}; correct the "
                "row or the schema"
            )
        if ours is None:
            return dict.fromkeys(NAMES, 0.0)
        found, wanted = Counter(_fields(ours.value)), Counter(_fields(theirs.value))
        shared = (found & wanted).total()
        return {
            "json_valid": 1.0,
            "json_equal": float(_frozen(ours.value) == _frozen(theirs.value)),
            "field_precision": shared / found.total(),
            "field_recall": shared / wanted.total(),
            "field_f1": 2 * shared / (found.total() + wanted.total()),
        }

    def parse(self, text: str) -> "Parsed | None":
        """The value of a text; None if it is not JSON or does not meet the schema."""
        try:
            value = json.loads(
                text,
                parse_float=Decimal,
                parse_int=Decimal,
                parse_constant=_refuse,
                object_pairs_hook=_each_key_once,
            )
            return Parsed(value) if self.allows(json.loads(text)) else None
        except _UNREADABLE:
            return None


NAMES = ("json_valid", "json_equal", "field_precision", "field_recall", "field_f1")


@dataclass(frozen=True)
class Parsed:
    """A JSON value with exact numbers (`Decimal`)."""

    value: Any


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, Hashable]]:
    """The fields of a value; an empty object or list counts as a field."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _fields(item, f"{path}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        for item in value:
            yield from _fields(item, f"{path}[]")
    else:
        yield path, _frozen(value)


def _frozen(value: Any) -> Hashable:
    """A value that can be compared and hashed. Numbers are tagged, because in Python True equals 1."""
    if isinstance(value, dict):
        return "object", frozenset((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list):
        return "list", tuple(map(_frozen, value))
    if isinstance(value, Decimal):
        # Hashing 1e999999999 would take for ever; its normalized digits and exponent identify it as well.
        sign, digits, exponent = value.as_tuple()
        stripped = "".join(map(str, digits)).rstrip("0")
        places = int(exponent) + len(digits) - len(stripped)
        return ("number", sign, stripped.lstrip("0"), places) if stripped.strip("0") else ("number", 0, "", 0)
    return value


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for key, item in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(item, str):
                yield item
            else:
                yield from _references(item)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)
