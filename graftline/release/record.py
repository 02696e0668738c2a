"""Records: JSON documents whose bytes have a digest, and so only one way to be written.

Laws of every record type R: ``R.parse(r.to_bytes()) == r``, and ``R.parse(data).to_bytes() == data``: repeated keys,
other spacing or spellings of a value are refused, because they would give one content two digests.
"""

import json
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from graftline.digest import Digest, of_bytes
from graftline.errors import GraftlineError, ReleaseError


def _read_digest(value: Any) -> Any:
    try:
        return Digest.parse(value) if isinstance(value, str) else value
    except GraftlineError as error:
        raise ValueError(str(error)) from error  # what pydantic collects


DigestText = Annotated[Digest, BeforeValidator(_read_digest), PlainSerializer(str, return_type=str)]
"""A `Digest` that is text in JSON."""


class Part(BaseModel):
    """A frozen, strictly typed part of a record: no unknown fields, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class Record(Part):
    """A whole document. Subclasses add fields and the checks between them."""

    kind: ClassVar[str]
    """What errors call it."""

    @property
    def digest(self) -> Digest:
        """Digest of the record's bytes."""
        return of_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """JSON with sorted keys, two spaces, UTF-8 and a line end."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a record.

        Raises:
            ReleaseError: not JSON, a field missing, unknown or wrong, or not in canonical form.
        """
        try:
            record = cls.model_validate_json(data)
        except ValidationError as error:
            raise ReleaseError(
                f"{cls.kind} is not right: {_first_problem(error)}; fetch it again from its store"
            ) from error
        if record.to_bytes() != data:
            raise ReleaseError(
                f"{cls.kind} is not in canonical form (key order, spacing, repeated keys or spelling of a value): "
                "it was edited by hand; fetch it again from its store"
            )
        return record


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}" if where else f"{first['msg']}{more}"
