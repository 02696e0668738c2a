"""Settings by value: what a stage's record holds, and when a newer graftline's settings enter it."""

import json
from typing import Any

import pytest
from pydantic import create_model

from graftline import settings
from graftline.data.rows import Message, Row
from graftline.settings import Pipeline
from graftline.settings.model import Train
from graftline.workflow import fetching
from graftline.workflow.stage_settings import SECTIONS, Recorded, record
from tests.workflow.tiny_project import tiny_settings


def pipeline(**train: Any) -> Pipeline:
    given = tiny_settings()
    given["train"] |= train
    return Pipeline.model_validate_json(json.dumps(given))


def upgraded(default: float, **train: Any) -> Pipeline:
    """The same pipeline under a newer graftline whose `train` has one setting more."""
    newer = create_model("Train", __base__=Train, momentum=(float, default))
    old = pipeline()
    return old.model_copy(update={"train": newer(**(dict(old.train) | train))})


def test_a_default_that_is_written_down_is_the_same_value() -> None:
    default = settings.Train.model_fields["seed"].default
    assert record(pipeline(), Recorded()) == record(pipeline(seed=default), Recorded())


def test_a_changed_value_reaches_the_stages_that_take_it_alone() -> None:
    before, after = (record(pipeline(steps=steps), Recorded()).values for steps in (8, 9))
    assert [stage for stage in before if before[stage] != after[stage]] == ["train", "gate"]


def test_prices_make_the_package_again_and_nothing_else() -> None:
    plain = pipeline()
    priced = plain.replace(prices=settings.Prices(currency="EUR", gpu_hour=2.5))
    before, after = (record(each, Recorded()).values for each in (plain, priced))
    assert [stage for stage in before if before[stage] != after[stage]] == ["package"]


def test_a_new_setting_with_its_default_changes_no_record() -> None:
    before = record(pipeline(), Recorded())
    after = record(upgraded(0.9), before)
    assert after.values == before.values
    assert after.implied["train.momentum"] == 0.9


@pytest.mark.parametrize("second", [upgraded(0.8), upgraded(0.9, momentum=0.7)])
def test_it_enters_the_record_once_its_value_is_another(second: Pipeline) -> None:
    before = record(upgraded(0.9), record(pipeline(), Recorded()))
    after = record(second, before)
    assert after.values["train"]["train"]["momentum"] == second.train.momentum  # type: ignore[attr-defined]
    assert "train.momentum" not in after.implied


def test_a_new_setting_with_another_value_than_its_default_counts_at_once() -> None:
    after = record(upgraded(0.9, momentum=0.5), record(pipeline(), Recorded()))
    assert after.values["train"]["train"]["momentum"] == 0.5


def test_the_record_of_an_upgrade_is_stable() -> None:
    before = record(upgraded(0.9), record(pipeline(), Recorded()))
    assert record(upgraded(0.9), before) == before


def test_a_new_section_with_its_defaults_changes_no_record() -> None:
    full = record(pipeline(), Recorded())
    without = {stage: {k: v for k, v in values.items() if k != "guards"} for stage, values in full.values.items()}
    default = pipeline().model_copy(update={"guards": settings.Guards()})
    assert record(default, Recorded(without)).values["gate"].keys() == without["gate"].keys()
    assert "guards" in record(pipeline(), Recorded(without)).values["gate"]  # stops: off is not the default


def test_a_setting_that_is_gone_changes_the_record() -> None:
    old = record(upgraded(0.9), Recorded())
    assert record(pipeline(), old).values["train"] != old.values["train"]


def test_a_new_setting_of_one_gate_changes_no_record() -> None:
    full = record(pipeline(), Recorded())
    known = full.values["gate"]["gates"]["accuracy"]
    older = {name: value for name, value in known.items() if name != "alpha"}
    assert older != known
    values = full.values | {"gate": full.values["gate"] | {"gates": {"accuracy": older}}}
    assert record(pipeline(), Recorded(values)).values["gate"]["gates"]["accuracy"] == older


def calibrated(**changes: Any) -> Pipeline:
    given = tiny_settings()
    given["quantize"] = {"method": "nf4", "init": {"kind": "loftq", "weighting": "full"}}
    given["adapter"]["method"] = "loftq"
    for path, value in changes.items():
        section, name = path.split("__")
        given[section][name] = value
    return Pipeline.model_validate_json(json.dumps(given))


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"train__held_out_rows": 20, "train__evaluate_every": 2}, {"fetch", "train", "gate"}),
        ({"data__max_tokens": 48}, {"fetch", "validate", "init", "train", "evaluate", "gate"}),
        ({"base__template": "chatml"}, set(SECTIONS) - {"release"}),
        ({"quantize__init": "loftq"}, {"fetch", "init", "gate"}),
        ({"train__seed": 5}, {"init", "train", "gate"}),
    ],
)
def test_a_calibrated_start_depends_on_what_decides_its_rows(changes: dict[str, Any], stages: set[str]) -> None:
    before, after = (record(made, Recorded()).values for made in (calibrated(), calibrated(**changes)))
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def test_a_merge_depends_on_what_decides_its_rows_only_where_its_rounding_reads_them() -> None:
    def merge(**changes: Any) -> Any:
        given = {"quantize__init": "plain", "adapter__method": "lora", "package__requantize": True} | changes
        return record(calibrated(**given), Recorded()).values["merge"]

    changes = ({"train__held_out_rows": 20, "train__evaluate_every": 2}, {"data__max_tokens": 48}, {"data__seed": 3})
    for change in changes:
        assert merge(**change) != merge()
        assert merge(package__rounding="nearest", **change) == merge(package__rounding="nearest")
        assert merge(package__requantize=False, **change) == merge(package__requantize=False)


def test_other_starts_do_not_depend_on_the_rows() -> None:
    values = record(calibrated(quantize__init="loftq"), Recorded()).values
    assert set(values["init"]) == {"quantize", "adapter"}
    assert set(values["fetch"]) == {"base", "data"}
    assert values["init"]["quantize"]["init"] == "loftq"


def test_the_seed_reaches_a_start_that_draws_with_it_and_no_other() -> None:
    def init(**changes: Any) -> Any:
        return record(calibrated(**changes), Recorded()).values["init"]

    for kind in ("loftq", "qpissa"):
        method = {"loftq": "loftq", "qpissa": "pissa"}[kind]
        drawn = {"quantize__init": kind, "adapter__method": method}
        assert init(**drawn, train__seed=5) != init(**drawn, train__seed=6)
        assert init(**drawn, train__seed=0) == init(**drawn)
    plain = {"quantize__init": "plain", "adapter__method": "lora"}
    assert init(**plain, train__seed=5) == init(**plain)


def test_calibration_rows_are_told_apart_by_their_tools_too() -> None:
    def told(*tools: dict[str, Any]) -> dict[str, str]:
        turns = (Message("user", "How warm is Ulm?", False), Message("assistant", "Mild.", True))
        return fetching._calibration(calibrated(), [Row(turns, 1, tools)])

    assert told() != told({"name": "weather"}) != told({"name": "tides"})
    assert told({"name": "weather"}) == told({"name": "weather"})
