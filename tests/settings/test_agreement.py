"""What pipelines.yaml offers is what the library takes: names, choices and defaults are the same on both sides."""

import dataclasses
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from graftline.adapters.methods import METHODS
from graftline.adapters.spec import AdapterSpec
from graftline.data.template import TEMPLATES
from graftline.evaluate import gate_rules
from graftline.registry.policy import FreezeWindow, Policy
from graftline.settings import measured, model
from graftline.train import settings
from tests.settings.documents import changed, read


def choices(section: type[BaseModel], field: str) -> set[str]:
    return set(get_args(section.model_fields[field].annotation))


def defaults(section: type[BaseModel], library: type[Any]) -> dict[str, tuple[object, object]]:
    """Fields that both have with a default: what each says."""
    found = {}
    for field in dataclasses.fields(library):
        ours = section.model_fields.get(field.name)
        if ours is None or ours.is_required() or field.default is dataclasses.MISSING:
            continue
        found[field.name] = (ours.get_default(call_default_factory=True), field.default)
    return found


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (choices(model.Adapter, "method"), set(METHODS) - {method.on_quantized for method in METHODS.values()}),
        (choices(model.Adapter, "bias"), set(get_args(AdapterSpec.__annotations__["bias"]))),
        (choices(model.Adapter, "svd"), set(get_args(AdapterSpec.__annotations__["svd"]))),
        (choices(model.Base, "template"), set(TEMPLATES)),
        (choices(model.Train, "scheduler"), set(get_args(settings.Scheduler))),
        (choices(model.Train, "optimizer"), set(get_args(settings.Optimizer))),
        (choices(model.Train, "device"), set(get_args(settings.Device))),
        (choices(model.Train, "precision"), set(get_args(settings.Precision))),
        (set(get_args(get_args(model.Train.model_fields["report_to"].annotation)[0])), set(get_args(settings.Tracker))),
        (choices(model.Gate, "test"), set(get_args(gate_rules.Test))),
        (choices(model.Gate, "direction"), set(get_args(gate_rules.Direction))),
        ({name for name, found in measured.METRICS.items() if found.num_items}, set(gate_rules.METRICS)),
    ],
)
def test_every_choice_that_is_offered_is_known_and_every_known_one_is_offered(
    offered: set[str], known: set[str]
) -> None:
    assert offered == known


@pytest.mark.parametrize(
    ("section", "library"),
    [(model.Adapter, AdapterSpec), (model.Train, settings.TrainSettings), (model.Gate, gate_rules.GateRule)],
)
def test_a_section_has_the_fields_of_what_is_made_of_it(section: type[BaseModel], library: type[Any]) -> None:
    # The train stage sets the held-out rows aside and starts the processes.
    by_the_stage = {"held_out_rows", "processes"} if section is model.Train else set()
    assert set(section.model_fields) - by_the_stage == {field.name for field in dataclasses.fields(library)}


def test_adapter_defaults_are_the_library_s() -> None:
    assert all(ours == theirs for ours, theirs in defaults(model.Adapter, AdapterSpec).values())


def test_a_pipeline_s_sections_make_the_library_s_values() -> None:
    pipeline = read(changed()).pipeline("demo")

    assert AdapterSpec(**pipeline.adapter.model_dump()).rank == 8
    train = pipeline.train.model_dump(exclude={"held_out_rows", "processes"})
    assert settings.TrainSettings(**train | {"threads": 1}).steps == 10
    assert gate_rules.GateRule(**pipeline.gates["better"].model_dump()).margin == 0.02


def test_a_channel_s_policy_has_the_fields_of_the_registry_s() -> None:
    approvals = {"count": "approvals_count", "roles": "approvals_roles", "valid_hours": "approvals_valid_hours"}
    ours = (set(model.Channel.model_fields) - {"approvals"}) | {
        approvals.get(name, name) for name in model.Approvals.model_fields
    }

    assert ours == {field.name for field in dataclasses.fields(Policy)}
    assert set(model.FreezeWindow.model_fields) == {field.name for field in dataclasses.fields(FreezeWindow)}
