"""Which base an adapter belongs to: ``graftline.json`` beside PEFT's two files.

    {"format": 1, "base_digest", "quantizer", "template_digest", "method", "training_run", "initial_digest"}

An adapter on another base, or on the same base quantized otherwise, computes something else without any error (peft
#2105, #2270): so the base's digest is recorded, and another base is refused (METHODS.md §7.11).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.digest import Digest, write_json
from graftline.errors import AdapterError, BaseMismatchError, GraftlineError
from graftline.weights.identity import BaseIdentity, check_pair

IDENTITY_FILE = "graftline.json"
_FORMAT = 1
_KEYS = {"format", "base_digest", "quantizer", "template_digest", "method", "training_run", "initial_digest"}


@dataclass(frozen=True, kw_only=True)
class AdapterIdentity:
    """What an adapter was trained on."""

    base_digest: Digest
    """Of the base as it was in training (`graftline.weights.identity`): a 4-bit base has another digest. In
    older adapters it is of the weights alone."""
    quantizer: dict[str, Any] | None = None
    """The settings that made a quantized base; None for a dense one."""
    template_digest: Digest | None = None
    """Of the chat template and special tokens; None where the rows had none."""
    training_run: str | None = None
    """Names the run, for people."""
    initial_digest: Digest | None = None
    """Of the initial factors that it was started from, where the base was made together with them (LoftQ, QPiSSA)."""

    def check(self, base: BaseIdentity, template_digest: Digest | None) -> None:
        """Refuse a base or a template that the adapter was not trained on.

        Raises:
            BaseMismatchError: both digests are named.
        """
        if not base.is_called(self.base_digest):
            raise BaseMismatchError(
                f"the adapter was trained on the base {self.base_digest} ({_describe(self.quantizer)}) and was "
                f"given the base {base.digest} ({_describe(base.quantizer)}); give it the base that it was trained on "
                "(weights, config.json and tokenizer as they were then), or train it again"
            )
        if template_digest is not None and self.template_digest not in (None, template_digest):
            raise BaseMismatchError(
                f"the adapter was trained with the chat template {self.template_digest} and was given "
                f"{template_digest}; "
                "use the tokenizer of its base, or train it again"
            )
        check_pair(base, self.initial_digest)


def write_identity(folder: Path, identity: AdapterIdentity, *, method: str) -> None:
    """Write ``graftline.json``."""
    record = {
        "format": _FORMAT,
        "base_digest": str(identity.base_digest),
        "quantizer": identity.quantizer,
        "template_digest": _text(identity.template_digest),
        "method": method,
        "training_run": identity.training_run,
        "initial_digest": _text(identity.initial_digest),
    }
    write_json(folder / IDENTITY_FILE, record)


def read_identity(folder: Path) -> tuple[AdapterIdentity, str] | None:
    """The identity and the method's name; None for an adapter that another tool wrote.

    Raises:
        AdapterError: ``graftline.json`` is there and is damaged.
    """
    file = folder / IDENTITY_FILE
    if not file.exists():
        return None
    record = read_object(file)
    if record.keys() != _KEYS or record["format"] != _FORMAT or not isinstance(record["method"], str):
        raise AdapterError(
            f"{file} has format {record.get('format')!r} and the keys {', '.join(sorted(record))}; expected format "
            f"{_FORMAT} "
            f"with {', '.join(sorted(_KEYS))}; save the adapter again"
        )
    try:
        identity = AdapterIdentity(
            base_digest=Digest.parse(record["base_digest"]),
            quantizer=record["quantizer"],
            template_digest=_parse(record["template_digest"]),
            training_run=record["training_run"],
            initial_digest=_parse(record["initial_digest"]),
        )
    except (GraftlineError, TypeError) as error:
        raise AdapterError(f"{file}: {error}; save the adapter again") from error
    return identity, record["method"]


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterError: the file is missing, is not JSON, or holds no object.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {file}: {error}; an adapter's JSON file was expected there") from error
    if not isinstance(record, dict):
        raise AdapterError(f"{file} holds a {type(record).__name__}; a JSON object was expected")
    return record


def _describe(quantizer: dict[str, Any] | None) -> str:
    return "dense" if quantizer is None else "quantized: " + ", ".join(f"{k}={v}" for k, v in sorted(quantizer.items()))


def _parse(text: str | None) -> Digest | None:
    return None if text is None else Digest.parse(text)


def _text(digest: Digest | None) -> str | None:
    return None if digest is None else str(digest)
