"""Seeded trials: each known-bad adapter is stopped by the gate that should stop it, and known-good ones pass."""

from dataclasses import replace

import pytest

from graftline.evaluate.gates import judge
from graftline.evaluate.scores import Scores
from graftline.evaluate.verdict import Outcome, Verdict
from studies.trials import BAD, GATES, GOOD, Recipe, World, evaluate, load_base, make_candidate, make_world

pytestmark = pytest.mark.slow

EACH_LANDING = ("noise added", "trained on evaluation rows", "end token unlearned")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def references(world: World) -> dict[str, Scores]:
    return {
        "base": evaluate(world, load_base(world)),
        "production": make_candidate(world, replace(GOOD, seed=100)),
    }


def verdict_of(world: World, recipe: Recipe, references: dict[str, Scores]) -> Verdict:
    return judge(GATES, make_candidate(world, recipe), references)


def outcomes(verdict: Verdict) -> dict[str, Outcome]:
    return {gate.name: gate.outcome for gate in verdict.gates}


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_known_good_adapter_passes_every_gate(world: World, references: dict[str, Scores], seed: int) -> None:
    verdict = verdict_of(world, replace(GOOD, seed=seed), references)
    assert outcomes(verdict) == dict.fromkeys(GATES, "pass")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind not in EACH_LANDING)) for kind in BAD]
)
def test_a_known_bad_adapter_is_stopped_by_its_gate(world: World, references: dict[str, Scores], kind: str) -> None:
    recipe, gate = BAD[kind]
    verdict = verdict_of(world, recipe, references)
    assert verdict.outcome == "fail"
    assert outcomes(verdict)[gate] == "fail"


def test_training_on_evaluation_rows_is_stopped_by_nothing_but_the_leakage_gate(
    world: World, references: dict[str, Scores]
) -> None:
    recipe, _ = BAD["trained on evaluation rows"]
    found = outcomes(verdict_of(world, replace(recipe, seed=2), references))
    assert [name for name, outcome in found.items() if outcome == "fail"] == ["leakage"]
