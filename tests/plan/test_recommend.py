"""The first arm that fits the budget of memory and time is recommended; boundaries, and what happens past them."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.plan.evidence import Evidence
from graftline.plan.preflight import duration, plan
from graftline.plan.recommend import Budget, Recommendation, document, recommend
from graftline.settings.model import Train
from graftline.weights.quant.scheme import Scheme
from tests.sections import adapter_section, train_section
from tests.tiny import tiny_llama_config
from tests.train.rows import make_rows

_CONFIG = tiny_llama_config(num_hidden_layers=4)
_ROWS = make_rows(40, longest=48)
_SETTINGS = train_section(steps=10, batch_size=8, learning_rate=1.0, device="cpu")


def _arm(name: str, bits: int = 16, **adapter: Any) -> dict[str, Any]:
    return {
        "name": name,
        "adapter": adapter,
        "bits": bits,
        "learning_rate": 0.001,
        "learning_rates_tried": [0.0005, 0.001],
        "found": f"what was found of {name}",
        "claims": [1],
    }


_FULL, _LORA = _arm("full", method="full"), _arm("lora", method="lora", rank=8)
_QLORA, _WIDE = _arm("qlora", bits=4, method="lora", rank=8), _arm("wide", method="lora", rank=256)


def _evidence(*arms: dict[str, Any]) -> Evidence:
    return Evidence.model_validate_json(json.dumps({"format": 1, "page": "docs/evidence.md", "arms": arms}))


def _recommend(
    *arms: dict[str, Any], settings: Train = _SETTINGS, barred: dict[str, str] | None = None, **budget: float
) -> Recommendation:
    return recommend(
        _CONFIG, _ROWS, evidence=_evidence(*arms), settings=settings, budget=Budget(**budget), barred=barred
    )


def _planned(method: str, *, rank: int = 8, quantization: Scheme | None = None) -> float:
    adapter = adapter_section(method, rank=rank)
    return plan(_CONFIG, _ROWS, settings=_SETTINGS, adapter=adapter, quantization=quantization).memory.total.expected


def _step_of(seconds: dict[str, float]) -> Callable[..., float]:
    """A measured micro-batch that takes so many seconds by method."""
    return lambda config, workload, limit_bytes: seconds[workload.adapter.method]


def test_the_first_arm_is_taken_where_it_fits() -> None:
    made = _recommend(_FULL, _LORA, _QLORA)
    assert made.choice is not None
    assert made.choice.arm.name == "full"
    assert made.choice.time is not None
    assert (made.choice.time.basis, made.num_steps) == ("measured", 10)
    assert 0 < made.choice.time.low < made.choice.time.high
    assert (made.passed_over, [arm.name for arm in made.not_looked_at]) == ((), ["lora", "qlora"])
    assert made.memory_limit == made.free_bytes


def test_an_arm_is_planned_as_its_training_is() -> None:
    made = _recommend(_QLORA)
    assert made.choice is not None
    assert made.choice.memory is not None
    assert made.choice.memory.total.expected == _planned("lora", quantization=Scheme("nf4", 64, True))


@pytest.mark.parametrize(("short", "name"), [(0.0, "full"), (1.0, "lora")])
def test_a_budget_of_memory_counts_to_the_byte(short: float, name: str) -> None:
    needed = _planned("full")
    made = _recommend(_FULL, _LORA, memory_bytes=needed - short)
    assert made.choice is not None
    assert made.choice.arm.name == name
    if short:
        assert made.passed_over[0].against is not None
        assert f"takes {needed / 1e9:.3f} GB, more than the" in made.passed_over[0].against


def test_a_budget_of_time_counts_by_the_upper_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.plan.recommend.measure_micro_batch", _step_of({"full": 60.0, "lora": 1.0}))
    unlimited = _recommend(_FULL, _LORA).choice
    assert unlimited is not None
    assert unlimited.time is not None
    high = unlimited.time.high
    just, short = (_recommend(_FULL, _LORA, seconds=limit) for limit in (high, high * (1 - 1e-9)))
    assert just.choice is not None
    assert short.choice is not None
    assert (just.choice.arm.name, short.choice.arm.name) == ("full", "lora")
    assert short.passed_over[0].against == f"may take {duration(high)}, more than the {duration(high)} of the budget"


def test_both_limits_are_named_where_both_are_missed() -> None:
    made = _recommend(_FULL, memory_bytes=1e3, seconds=1e-3)
    assert made.choice is None
    assert made.passed_over[0].against is not None
    assert "more than the 0.000 GB of the budget and may take" in made.passed_over[0].against


def test_what_comes_nearest_in_memory_is_named_with_what_makes_it_fit() -> None:
    without = recommend(
        _CONFIG,
        _ROWS,
        evidence=_evidence(_LORA),
        settings=_SETTINGS.replace(gradient_checkpointing=True),
    ).choice
    assert without is not None
    assert without.memory is not None
    made = _recommend(_FULL, _LORA, memory_bytes=without.memory.total.expected)
    assert (made.choice, made.nearest is not None) == (None, True)
    assert made.nearest is not None
    assert made.nearest.assessment.arm.name == "lora"
    assert (made.nearest.changes, made.nearest.missing) == (("train.gradient_checkpointing: true",), None)
    assert made.nearest.memory.expected == made.memory_limit


def test_a_budget_that_nothing_helps_into_is_said() -> None:
    made = _recommend(_FULL, _LORA, memory_bytes=1e3)
    assert made.nearest is not None
    assert any(change.startswith("train.batch_size: 1") for change in made.nearest.changes)
    assert made.nearest.missing is not None
    assert "take a smaller base or a larger device" in made.nearest.missing


@pytest.mark.parametrize(
    ("settings", "instead"),
    [(_SETTINGS, "10"), (_SETTINGS.replace(steps=None, epochs=2), "epochs: 2")],
)
def test_what_comes_nearest_in_time_is_named_with_the_steps_that_fit(
    monkeypatch: pytest.MonkeyPatch, settings: Train, instead: str
) -> None:
    monkeypatch.setattr("graftline.plan.recommend.measure_micro_batch", _step_of({"full": 60.0, "lora": 10.0}))
    unlimited = _recommend(_LORA, settings=settings).choice
    assert unlimited is not None
    assert unlimited.time is not None
    made = _recommend(_FULL, _LORA, settings=settings, seconds=0.35 * unlimited.time.high)
    assert made.nearest is not None
    assert made.nearest.assessment.arm.name == "lora"
    assert (made.nearest.changes, made.nearest.missing) == ((f"train.steps: 3 instead of {instead}",), None)


def test_time_in_which_no_step_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.plan.recommend.measure_micro_batch", _step_of({"lora": 100.0}))
    made = _recommend(_LORA, seconds=1)
    assert made.nearest is not None
    assert (made.nearest.changes, made.nearest.missing is not None) == ((), True)
    assert made.nearest.missing is not None
    assert "one step alone may take" in made.nearest.missing


def test_recomputation_is_counted_in_the_steps_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.plan.recommend.measure_micro_batch", _step_of({"lora": 10.0}))
    free = _recommend(_LORA).choice
    assert free is not None
    assert free.time is not None
    assert free.memory is not None
    made = _recommend(_LORA, memory_bytes=0.9 * free.memory.total.expected, seconds=1.001 * free.time.high)
    assert made.nearest is not None
    assert made.nearest.changes == ("train.gradient_checkpointing: true", "train.steps: 7 instead of 10")


def test_a_base_too_large_to_try_is_timed_by_relation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.plan.recommend.free_bytes", lambda device: int(1e9))
    large = tiny_llama_config(hidden_size=4096, intermediate_size=8192, num_hidden_layers=4)
    made = recommend(large, _ROWS, evidence=_evidence(_QLORA), settings=_SETTINGS, budget=Budget(memory_bytes=1e12))
    assert made.choice is not None
    assert made.choice.time is not None
    assert made.choice.time.basis == "relation"
    assert made.choice.time.high == 2 * made.choice.time.low


def test_a_time_that_cannot_be_known_is_no_reason_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.plan.recommend.free_bytes", lambda device: 1000)
    unlimited, limited = (_recommend(_LORA, memory_bytes=1e12, **more) for more in ({}, {"seconds": 3600.0}))
    assert unlimited.choice is not None
    assert unlimited.choice.time is None
    assert limited.choice is None
    assert limited.nearest is not None
    assert limited.nearest.missing is not None
    assert "takes an unknown time" in limited.nearest.missing


def test_arms_that_do_not_go_on_the_base_or_are_barred_are_passed_over() -> None:
    made = _recommend(_WIDE, _FULL, _LORA, barred={"full": "not with us"})
    assert made.choice is not None
    assert made.choice.arm.name == "lora"
    reasons = [assessment.against for assessment in made.passed_over]
    assert reasons[0] is not None
    assert "does not fit this base: " in reasons[0]
    assert reasons[1] == "not with us"
    nothing = _recommend(_WIDE)
    assert (nothing.choice, nothing.nearest) == (None, None)


@pytest.mark.parametrize(
    ("what", "value"), [("memory", 0.0), ("memory", float("nan")), ("time", -60.0), ("time", float("inf"))]
)
def test_a_budget_that_is_none_is_refused(what: str, value: float) -> None:
    with pytest.raises(TrainError, match=f"the budget of {what} is .*; expected a number above 0"):
        Budget(memory_bytes=value) if what == "memory" else Budget(seconds=value)


def test_rows_that_nothing_can_be_learned_from_are_refused() -> None:
    with pytest.raises(TrainError):
        recommend(_CONFIG, [Encoded([1, 2], [False, False])], evidence=_evidence(_LORA), settings=_SETTINGS)


def test_a_recommendation_is_json_too() -> None:
    evidence = _evidence(_FULL, _LORA, _QLORA)
    written = json.loads(
        json.dumps(document(_recommend(_FULL, _LORA, _QLORA, memory_bytes=_planned("full") - 1), evidence))
    )
    assert written["choice"]["arm"] == "lora"
    assert written["choice"]["train"] == {"learning_rate": 0.001}
    assert written["choice"]["evidence"] == ["docs/evidence.md#claim-1"]
    assert [assessment["arm"] for assessment in written["passed_over"]] == ["full"]
    assert (written["not_looked_at"], written["nearest"]) == (["qlora"], None)
    nothing = json.loads(json.dumps(document(_recommend(_LORA, memory_bytes=1e3), evidence)))
    assert (nothing["choice"], nothing["nearest"]["arm"]) == (None, "lora")
    assert nothing["budget"]["memory_from"] == "given"
