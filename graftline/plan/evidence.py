"""The evidence study's results as defaults: adapters, bits and learning rates, in order of preference.

The study writes ``evidence.json`` beside this file (``python -m studies survey defaults``). `graftline init` proposes
its first arm, `graftline recommend` the first that fits a budget. Nothing here imports torch.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from graftline.errors import TrainError
from graftline.settings import Adapter
from graftline.settings.fields import Section, Text

EVIDENCE = Path(__file__).parent / "evidence.json"
DENSE_BITS = 16
"""Bits of an arm whose base is not quantized."""
_INIT = {"loftq": "loftq", "pissa": "qpissa"}
"""Methods whose initial values are made together with the quantized base."""
_NO_TEXT = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
"""Words that some YAML parsers do not read as text."""


class _Lenient(Section):
    """Validated like pipelines.yaml, but unknown keys are allowed, for later studies."""

    model_config = ConfigDict(extra="ignore")


class Arm(_Lenient):
    """A way to train that the study tried."""

    name: Text
    """The study's name for it."""
    adapter: Adapter
    """As in pipelines.yaml; only what the study set."""
    bits: Literal[16, 4, 3, 2]
    """Of the base's weights in training; 16: not quantized."""
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    """The best of those tried."""
    learning_rates_tried: tuple[float, ...]
    """The candidates; empty if no others were tried."""
    found: Text
    """The result in a sentence, with its interval."""
    claims: tuple[Annotated[int, Field(ge=1)], ...]
    """Numbers of the page's claims that it is based on."""

    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections ``quantize``, ``adapter`` and ``train`` of a pipeline that trains this way."""
        method = self.adapter.method
        quantize = {"method": "none" if self.bits == DENSE_BITS else f"nf{self.bits}"}
        if self.bits != DENSE_BITS and method in _INIT:
            quantize["init"] = _INIT[method]
        return {
            "quantize": quantize,
            "adapter": self.adapter.model_dump(exclude_unset=True),
            "train": {"learning_rate": self.learning_rate},
        }

    def describe(self) -> str:
        """Method, size, bits and learning rate on one line."""
        size = f" rank {self.adapter.rank}" if "rank" in self.adapter.model_fields_set else ""
        return f"{self.adapter.method}{size}, {self.bits}-bit base, learning rate {self.learning_rate:g}"


class Evidence(_Lenient):
    """The whole file."""

    format: Literal[1]
    page: Text
    """The study's page, relative to the project's root."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    """In order of preference."""

    @model_validator(mode="after")
    def _names_differ(self) -> "Evidence":
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"two arms have one name: {', '.join(names)}")
        return self

    def links(self, arm: Arm) -> tuple[str, ...]:
        """Links to the claims that an arm is based on, or to the page."""
        return tuple(f"{self.page}#claim-{number}" for number in arm.claims) or (self.page,)


def read_evidence(path: Path = EVIDENCE) -> Evidence:
    """Read the study's results; TrainError if the file is missing or not of this format."""
    try:
        return Evidence.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror}; install graftline again") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise TrainError(
            f"{path}: {place}: {first['msg']}; `python -m studies survey defaults` writes it from the study's results"
        ) from error


def yaml_lines(section: Mapping[str, Any]) -> list[str]:
    """A section's keys as lines of YAML."""
    return [f"{key}: {_yaml(value)}" for key, value in section.items()]


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    is_word = isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", value) and value not in _NO_TEXT
    return value if is_word else json.dumps(value, ensure_ascii=False)
