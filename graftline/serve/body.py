"""What all request bodies share: nulls are defaults, unsupported values are refused by name, nothing is converted."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from graftline.errors import ServingError

Neutral = Mapping[str, tuple[Any, ...]]


class FieldError(ServingError):
    """A field of a request has a value that this model cannot be asked with. ``param``: the field's name."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}")
        self.param = param


class Body(BaseModel):
    """A JSON object from a client."""

    model_config = ConfigDict(extra="forbid", strict=True)

    neutral: ClassVar[Neutral] = {}
    """Unsupported fields, with the values that are accepted because they ask for nothing."""
    labels: ClassVar[Mapping[str, type]] = {}
    """Fields that are accepted and ignored, and their types."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: given for name, given in value.items() if not (given is None or cls._asks_nothing(name, given))}

    @classmethod
    def _asks_nothing(cls, name: str, given: Any) -> bool:
        kind = cls.labels.get(name)
        if kind is not None and isinstance(given, kind):
            return True
        return any(type(given) is type(value) and given == value for value in cls.neutral.get(name, ()))


def contradiction(param: str, problem: str) -> PydanticCustomError:
    """The error of fields that do not go together; ``param`` is counted from the object that has them."""
    return PydanticCustomError("contradiction", "{problem}", {"problem": problem, "param": param})
