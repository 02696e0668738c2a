"""What each stage takes of a machine: as pipelines.yaml says, else by default; and whether a machine has that much.

Nothing here loads a model, so that flows can ask before they start anything.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import psutil

from graftline.errors import ConfigError
from graftline.limits import memory_limits, usable_cores, visible_gpus
from graftline.plain_text import count
from graftline.settings.loader import Config
from graftline.settings.machines import Resources
from graftline.settings.model import Pipeline, StageName
from graftline.train.distributed import processes_here

STAGES: tuple[StageName, ...] = get_args(StageName)
COMPUTING = frozenset({"init", "train", "evaluate", "merge", "package"})
"""Stages that compute with a model: on a GPU where there is one, else on all cores, unless ``resources`` says
otherwise."""
Class = Literal["cpu", "gpu"]
"""Kind of machine, and the Prefect work queue that its workers poll."""
Origin = Callable[[str, str], str]
"""Says of a stage and a key of its ``resources`` where the value was given."""
PLAN = "plan"
"""Origin of a default, as `graftline plan` shows it."""


def given(_stage: str, _key: str) -> str:
    """An `Origin` for settings that no file gave."""
    return "given"


@dataclass(frozen=True)
class Machine:
    """What this process may use: GPUs as ``CUDA_VISIBLE_DEVICES`` names them, cores, and memory in GB of 10^9 bytes."""

    gpus: tuple[str, ...]
    cores: int
    memory_gb: float


@dataclass(frozen=True)
class StageNeeds:
    """What a stage takes. None: nothing is counted for it."""

    stage: StageName
    gpus: int
    cores: int | None
    memory_gb: float | None
    origins: dict[str, str]
    """Where each of the three comes from: ``pipelines.yaml:<line>``, or `PLAN`."""

    def row(self) -> str:
        """A line of the table that `table` makes."""
        shown = (str(self.gpus), _figure(self.cores), _figure(self.memory_gb))
        cells = [f"{value} ({origin})" for value, origin in zip(shown, self.origins.values(), strict=True)]
        return f"  {self.stage:<10}" + "".join(f"{cell:<24}" for cell in cells).rstrip()

    def document(self) -> dict[str, Any]:
        """As JSON."""
        values = {"gpus": self.gpus, "cores": self.cores, "memory_gb": self.memory_gb}
        return {key: {"value": value, "origin": self.origins[key]} for key, value in values.items()}


def this_machine() -> Machine:
    """The machine that this process runs on, within the limits of a container, a scheduler or a shell."""
    memory = min([int(psutil.virtual_memory().total), *(limit.limit for limit in memory_limits())])
    return Machine(tuple(visible_gpus()), usable_cores(), memory / 1e9)


def needs(
    pipeline: Pipeline,
    machine: Machine,
    *,
    origin: Origin = given,
    training_gb: float | None = None,
) -> list[StageNeeds]:
    """What every stage of a pipeline takes of a machine, in the stages' order.

    Args:
        pipeline: the settings.
        machine: where it will run; what is left out follows from it.
        origin: where values of ``resources`` were given.
        training_gb: memory that the training is planned to take on a CPU, where that is known.
    """
    found = []
    for stage in STAGES:
        asked = pipeline.resources.get(stage, Resources())
        gpus = _gpus(stage, pipeline, machine) if asked.gpus is None else asked.gpus
        memory = training_gb if stage == "train" and not gpus else None
        values = {
            "gpus": gpus,
            "cores": _cores(stage, gpus, machine) if asked.cores is None else asked.cores,
            "memory_gb": memory if asked.memory_gb is None else asked.memory_gb,
        }
        origins = {key: PLAN if getattr(asked, key) is None else origin(stage, key) for key in values}
        found.append(StageNeeds(stage, **values, origins=origins))  # type: ignore[arg-type] # one dict of three types
    return found


def origins(config: Config, pipeline: str) -> Origin:
    """For `needs`: the line of pipelines.yaml that gives a stage's value."""
    return lambda stage, key: config.origin(("pipelines", pipeline, "resources", stage, key))


def table(found: Sequence[StageNeeds]) -> str:
    """What every stage takes and where each figure comes from, for a terminal."""
    head = f"  {'stage':<10}{'GPUs':<24}{'cores':<24}memory, GB"
    return "\n".join(["what each stage takes (- : not counted), and who says so", head, *(one.row() for one in found)])


def check_machine(found: Sequence[StageNeeds], machine: Machine, pipeline: str) -> None:
    """Refuse a pipeline that asks for more than the machine has, before any of its stages starts.

    Raises:
        ConfigError: with every stage that does: what it asks for, where that comes from, what is there, what to do.
    """
    problems = [problem for one in found for problem in _beyond(one, machine)]
    if problems:
        raise ConfigError(
            f"pipeline {pipeline} asks for more than this machine has:\n  "
            + "\n  ".join(problems)
            + "\nwrite less in `resources`, or run it where there is more; "
            f"`graftline plan {pipeline}` shows every figure"
        )


def class_of(pipeline: Pipeline) -> Class:
    """Which kind of machine a pipeline belongs on, by its settings alone: ``cpu`` if no stage of it may use a GPU."""
    declared = {stage: asked.gpus for stage, asked in pipeline.resources.items() if asked.gpus is not None}
    may_train_on_gpu = pipeline.train.device != "cpu" and declared.get("train") != 0
    return "gpu" if may_train_on_gpu or any(declared.values()) else "cpu"


def job_variables(pipeline: Pipeline) -> dict[str, str]:
    """What a pod for a whole run of a pipeline asks for: of each kind the most that one of its stages is given.

    Named as in ``infra/k8s/work-pool.json``; what no stage is given is left to the deployment.
    """
    found = {}
    for name, key in (("gpus", "gpus"), ("cpu_request", "cores"), ("memory", "memory_gb")):
        most = [value for asked in pipeline.resources.values() if (value := getattr(asked, key))]
        if most:
            found[name] = f"{math.ceil(max(most))}{'G' if name == 'memory' else ''}"
    return found | ({"gpus": "0"} if class_of(pipeline) == "cpu" else {})


def _gpus(stage: StageName, pipeline: Pipeline, machine: Machine) -> int:
    if stage not in COMPUTING or pipeline.train.device == "cpu" or not _may_use_gpu(stage, pipeline):
        return 0
    if not machine.gpus and pipeline.train.device == "auto":
        return 0
    if stage == "evaluate":
        return max(1, min(pipeline.evaluate.processes or 1, len(machine.gpus)))
    return processes_here(pipeline.train.processes) if stage == "train" else 1


def _may_use_gpu(stage: StageName, pipeline: Pipeline) -> bool:
    """Whether a stage has anything to compute on a GPU, as the pipeline is set; a calibrated start takes the CPU."""
    if stage == "init":
        return pipeline.quantize.method != "none" and pipeline.quantize.weighting == "none"
    return pipeline.package.merged if stage == "merge" else True


def _cores(stage: StageName, gpus: int, machine: Machine) -> int | None:
    # All of them even where train.threads is less: how much memory the stage takes is not known.
    return machine.cores if stage in COMPUTING and not gpus else None


def _beyond(one: StageNeeds, machine: Machine) -> Iterator[str]:
    asked = {"gpus": one.gpus, "cores": one.cores or 0, "memory_gb": one.memory_gb or 0}
    there = {"gpus": len(machine.gpus), "cores": machine.cores, "memory_gb": machine.memory_gb}
    shown = {
        "gpus": count(one.gpus, "GPU"),
        "cores": count(one.cores or 0, "core"),
        "memory_gb": f"{_figure(one.memory_gb)} GB of memory",
    }
    for key, value in asked.items():
        if value > there[key]:
            why = f"`resources.{one.stage}.{key}`, {one.origins[key]}"
            if one.origins[key] == PLAN:
                each = "for each of `train.processes` " if one.stage == "train" else ""
                why = f"one {each}unless `resources.{one.stage}.gpus` says otherwise"
            yield f"stage {one.stage} asks for {shown[key]} ({why}); expected at most {_figure(there[key])}"


def _figure(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.1f}"
