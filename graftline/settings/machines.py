"""What a stage takes of its machine, and what machines cost: the sections `resources` and `prices`."""

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from graftline.settings.fields import Section

Price = Annotated[float, Field(ge=0, le=1e6)]


class Resources(Section):
    """What one stage takes of its machine while it runs; a stage waits until that is free.

    `graftline plan PIPELINE` shows what every stage takes and where each figure comes from. A stage that asks for more
    than the machine has is refused before any stage starts. Changing these runs nothing again.
    """

    gpus: Annotated[int, Field(ge=0, le=1024)] | None = None
    """GPUs that the stage has for itself. When left out: one where the machine has GPUs, `train.device` is not cpu and
    the stage computes with a model; `train` and `evaluate` have one for each of their processes."""
    cores: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """CPU cores that the stage has for itself; it starts no more threads than that. When left out, a stage that
    computes with a model on the CPU has all of the machine's, and the other stages are not counted."""
    memory_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Main memory in GB of 10^9 bytes that is counted for the stage. When left out, none is counted; `graftline plan`
    says what a training on the CPU is expected to take."""


class Prices(Section):
    """What the machines cost, so that the model card names the cost of a release in money beside its energy.

    Changing these makes the package again, and nothing else.
    """

    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
    """Three capital letters, as in ISO 4217: EUR."""
    gpu_hour: Price | None = None
    """Of one GPU that a stage has for itself, for one hour. Where this includes electricity, leave out
    `kilowatt_hour`."""
    kilowatt_hour: Price | None = None
    """Of the energy that stages use, measured or estimated."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gpu_hour is None and self.kilowatt_hour is None:
            raise PydanticCustomError("prices", "`gpu_hour`, `kilowatt_hour` or both beside `currency`")
        return self
