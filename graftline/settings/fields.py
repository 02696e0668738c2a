"""The building blocks of the sections of pipelines.yaml: their base class, and the types of names, texts and paths."""

from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=60)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
PythonFile = Annotated[str, StringConstraints(pattern=r"^[^/].*\.py$", max_length=1024)]
LocalFile = Annotated[str, StringConstraints(pattern=r"^[^/]", max_length=1024)]
LocalFolder = Annotated[str, StringConstraints(pattern=r"^[^/]", max_length=1024)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Item = TypeVar("Item")
Listed = Annotated[tuple[Item, ...], Field(strict=False)]
"""Python code may pass a list; its items are still checked strictly."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Interval = Annotated[int, Field(ge=0, le=1_000_000_000)]
# Columns may hold numbers and booleans besides text; a slice is named by how its value reads as text.
SliceValue = Annotated[
    Text,
    BeforeValidator(lambda given: slice_name(given) if isinstance(given, bool | int) else given),
    WithJsonSchema({"type": ["string", "integer", "boolean"]}),
]
# `on` and `off` are text in YAML 1.2 and booleans in YAML 1.1, so both spellings reach us.
Switch = Annotated[
    bool,
    BeforeValidator(lambda given: {"on": True, "off": False}.get(str(given).lower(), given)),
    WithJsonSchema({"enum": [True, False, "on", "off"]}),
]


class Section(BaseModel):
    """A section of pipelines.yaml: frozen, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def replace(self, **changes: Any) -> Self:
        """A copy with changed values, checked like the section itself."""
        return type(self)(**{**dict(self), **changes})


def slice_name(value: str | int | bool) -> str:
    """How a column's value is named: true and false as JSON writes them."""
    return str(value).lower() if isinstance(value, bool) else str(value)
