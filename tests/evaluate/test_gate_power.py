"""How often an equal candidate passes: the stated power is what the real test gives; weak gates say what would do."""

import itertools
import random
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binom, norm

from graftline.digest import of_json
from graftline.evaluate.comparisons import gate_power, weakness
from graftline.evaluate.gate_rules import METRICS, pipeline_rules
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import DocumentScore, ItemScore, Scores
from graftline.evaluate.statistics.error_rates import (
    Power,
    enough,
    equal_candidate_power,
    equal_discordant_share,
    equal_mean_power,
)
from graftline.evaluate.statistics.proportions import PairedCounts, difference_p_value
from graftline.evaluate.verdict import GateResult
from graftline.settings import load
from graftline.settings.model import Gate
from tests.sections import gate_section

ROOT = Path(__file__).resolve().parents[2]


def scores(right: list[bool], documents: int = 0) -> Scores:
    items = (ItemScore(f"{i:05}", (-1.0, -2.0), int(not ok), 0, ok, 0.3, 1, True) for i, ok in enumerate(right))
    texts = tuple(DocumentScore(f"{i:05}", 3.0 + i % 7 / 10, 1) for i in range(documents))
    return Scores(of_json("none"), ("a", "b"), tuple(items), documents=texts)


def equal_pair(rng: random.Random, num_items: int, *, rate: float, share: float) -> tuple[list[bool], list[bool]]:
    """Two models that are right equally often, and differ on ``share`` of the items."""
    ours, theirs = [], []
    for _ in range(num_items):
        draw = rng.random()
        both = rate - share / 2
        ours.append(draw < both or both + share / 2 <= draw < both + share)
        theirs.append(draw < both + share / 2)
    return ours, theirs


def rule(margin: float, test: str = "non-inferiority") -> Gate:
    return gate_section("accuracy", "higher", test, margin=margin, against="production", min_items=1)  # type: ignore[arg-type]


def judged(margin: float, ours: list[bool], theirs: list[bool]) -> GateResult:
    return judge({"gate": rule(margin)}, scores(ours), {"production": scores(theirs)}).gates[0]


@pytest.mark.parametrize(
    ("margin", "num_items", "share", "test"),
    [
        (0.02, 300, 0.05, "non-inferiority"),
        (0.05, 300, 0.1, "non-inferiority"),
        (0.05, 100, 0.05, "non-inferiority"),
        (0.06, 300, 0.1, "equivalence"),
    ],
)
def test_the_power_is_how_often_the_gate_passes_an_equal_candidate(
    margin: float, num_items: int, share: float, test: str
) -> None:
    rng, nights = random.Random(0), 200
    passed = 0
    for _ in range(nights):
        ours, theirs = equal_pair(rng, num_items, rate=0.87, share=share)
        verdict = judge({"gate": rule(margin, test)}, scores(ours), {"production": scores(theirs)})
        passed += verdict.outcome == "pass"
    expected = equal_candidate_power(
        margin, num_items, discordant_share=share, alpha=0.05, two_sided=test == "equivalence"
    )
    assert abs(passed / nights - expected) < 3.5 * (expected * (1 - expected) / nights) ** 0.5


@pytest.mark.parametrize(("pipeline", "num_items"), [("wordnet-category", 300), ("wordnet-animal-or-plant", 100)])
def test_an_equal_candidate_passes_the_demo_s_gates_in_8_of_10_nights(pipeline: str, num_items: int) -> None:
    settings = load(ROOT / "pipelines.yaml").pipeline(pipeline)
    assert settings.data.evaluation_rows == num_items
    # Guards hold by a wide margin for two equal models, and take no part in the correction.
    rules = {name: gate for name, gate in pipeline_rules(settings).items() if name in settings.gates}
    rng, nights = random.Random(0), 100
    base = scores([index % 5 < 2 for index in range(num_items)], documents=100)
    passed = 0
    for _ in range(nights):
        ours, theirs = equal_pair(rng, num_items, rate=0.87, share=0.05)
        references = {"production": scores(theirs, documents=100), "base": base}
        passed += judge(rules, scores(ours, documents=100), references).outcome == "pass"
    assert passed / nights >= 0.8


def test_the_demo_s_former_margin_is_called_too_narrow_with_what_would_do() -> None:
    found = gate_power("rate", "non-inferiority", 0.02, 300, spread=0.05, alpha=0.05)
    assert found.value == pytest.approx(0.395, abs=0.001)
    assert found.margin == 0.035
    assert found.num_items == pytest.approx(820, abs=20)
    assert weakness(found, 0.02, 300) == (
        "a candidate that is exactly as good passes this gate 40% of the time; a margin of 0.035 with 300 items or "
        f"about {found.num_items} items with the margin of 0.02 would make it 8 of 10"
    )
    assert equal_candidate_power(0.035, 300, discordant_share=0.05, alpha=0.05) >= 0.8
    assert equal_candidate_power(0.02, found.num_items or 0, discordant_share=0.05, alpha=0.05) >= 0.8


def test_few_differing_items_are_tested_exactly() -> None:
    """149 items without a loss exclude 2 % (0.98^149 < 0.05); with 148 nothing can be shown."""
    assert equal_candidate_power(0.02, 148, discordant_share=1e-12, alpha=0.05) == 0
    assert equal_candidate_power(0.02, 149, discordant_share=1e-12, alpha=0.05) == pytest.approx(1)


def test_the_exact_power_is_the_sum_over_all_ways_to_differ() -> None:
    expected = sum(
        binom.pmf(differing, 60, 0.2) * binom.pmf(gained, differing, 0.5)
        for differing in range(61)
        for gained in range(differing + 1)
        if difference_p_value(PairedCounts(60 - differing, gained, differing - gained, 0), -0.15)[0] <= 0.05
    )
    assert equal_candidate_power(0.15, 60, discordant_share=0.2, alpha=0.05) == pytest.approx(expected, abs=1e-7)


def test_many_items_are_taken_as_normal() -> None:
    z = 0.02 * 3100**0.5 / 0.2**0.5 - norm.isf(0.05)
    assert equal_candidate_power(0.02, 3100, discordant_share=0.2, alpha=0.05) == pytest.approx(norm.cdf(z))


def test_the_power_for_a_mean_follows_from_the_observed_deviation() -> None:
    rng = np.random.default_rng(0)
    passed = 0
    gate = gate_section("nll", "lower", "non-inferiority", margin=0.1, against="production", min_items=1)
    for _ in range(60):
        noise = rng.normal(0, 0.4, 100)
        reference = [ItemScore(f"{i:03}", (-2.0, -3.0), 0, 0, True, 2.0, 1, True) for i in range(100)]
        ours = [ItemScore(f"{i:03}", (-2.0, -3.0), 0, 0, True, 2.0 + d, 1, True) for i, d in enumerate(noise.tolist())]
        pair = [Scores(of_json("none"), ("a", "b"), tuple(rows)) for rows in (ours, reference)]
        result = judge({"gate": gate}, pair[0], {"production": pair[1]}).gates[0]
        passed += result.outcome == "pass"
    expected = equal_mean_power(0.1, 100, deviation=0.4, alpha=0.05)
    assert expected == pytest.approx(0.8, abs=0.01)
    assert abs(passed / 60 - expected) < 0.16
    assert result.power == pytest.approx(expected, abs=0.15)


def test_an_equivalence_of_means_has_the_power_of_two_tests_one_to_each_side() -> None:
    """Schuirmann's two one-sided tests: 2 Φ(m √n / σ − z) − 1, and never below 0."""
    margin, num_items, deviation = 0.1, 100, 0.3
    reach = NormalDist().inv_cdf(0.95)
    expected = 2 * NormalDist().cdf(margin * 10 / deviation - reach) - 1
    found = equal_mean_power(margin, num_items, deviation=deviation, alpha=0.05, two_sided=True)
    assert found == pytest.approx(expected)
    assert 0.9 < found < 0.92
    assert equal_mean_power(0.01, num_items, deviation=deviation, alpha=0.05, two_sided=True) == 0.0


@pytest.mark.parametrize(("margin", "power"), [(0.0, 0.0), (0.01, 1.0), (0.5, 1.0)])
def test_differences_that_are_all_equal_pass_if_there_is_a_margin(margin: float, power: float) -> None:
    assert equal_mean_power(margin, 10, deviation=0.0, alpha=0.05) == power


@pytest.mark.parametrize(
    ("counts", "share"),
    [
        ((200, 8, 12, 80), 16 / 300),  # what was lost on balance is left out
        ((100, 150, 8, 42), 16 / 300),  # far better than the base: what went the other way tells how much rows churn
        ((290, 0, 0, 10), 10 / 300),  # too few to know the share: 10 items, or 5 %
        ((90, 0, 0, 10), 0.05),
        ((2900, 20, 20, 60), 40 / 3000),
    ],
)
def test_the_share_of_an_equal_candidate_is_read_from_the_rows_that_went_both_ways(
    counts: tuple[int, int, int, int], share: float
) -> None:
    assert equal_discordant_share(PairedCounts(*counts)) == pytest.approx(share)


def test_a_paired_gate_states_its_power_and_a_weak_one_warns() -> None:
    theirs = [index % 10 < 9 for index in range(300)]
    ours = [ok if 8 <= index < 292 else not ok for index, ok in enumerate(theirs)]
    weak, strong = judged(0.02, ours, theirs), judged(0.08, ours, theirs)
    assert weak.power is not None
    assert weak.power < 0.8
    assert weak.power_margin is not None
    assert weak.power_items is not None
    assert f"⚠ a candidate that is exactly as good passes this gate {weak.power:.0%} of the time" in weak.reason
    assert strong.power is not None
    assert strong.power >= 0.8
    assert (strong.power_margin, strong.power_items) == (None, None)
    assert "⚠" not in strong.reason


@pytest.mark.parametrize("test", ["superiority", "limit"])
def test_a_gate_that_asks_for_more_than_equality_has_no_power_for_an_equal_candidate(test: str) -> None:
    right = [True] * 100
    asked = (
        gate_section("accuracy", "higher", "limit", limit=0.5)
        if test == "limit"
        else gate_section("accuracy", "higher", "superiority", margin=0.0, against="production")
    )
    assert judge({"gate": asked}, scores(right), {"production": scores(right)}).gates[0].power is None


def test_no_number_of_items_shows_a_margin_of_nothing() -> None:
    assert enough(lambda margin, n: equal_mean_power(margin, n, deviation=0.5, alpha=0.05), 0.0, 100) == Power(
        pytest.approx(0.05), margin=pytest.approx(0.125, abs=0.002), num_items=None
    )


@cache
def power(margin: float, num_items: int) -> float:
    return equal_candidate_power(margin, num_items, discordant_share=0.05, alpha=0.05)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(("num_items", "margin"), [(30, 0.3), (60, 0.2), (60, 0.05)])
def test_the_power_is_the_sum_over_every_outcome_that_passes(num_items: int, margin: float, two_sided: bool) -> None:
    share, alpha, expected = 0.3, 0.05, 0.0
    for gained, lost in itertools.product(range(num_items + 1), repeat=2):
        if gained + lost > num_items:
            continue
        counts = PairedCounts(num_items - gained - lost, gained, lost, 0)
        mirrored = PairedCounts(num_items - gained - lost, lost, gained, 0)
        asked = (counts, mirrored) if two_sided else (counts,)
        if all(difference_p_value(each, -margin)[0] <= alpha for each in asked):
            expected += binom.pmf(gained + lost, num_items, share) * binom.pmf(gained, gained + lost, 0.5)
    found = equal_candidate_power(margin, num_items, discordant_share=share, alpha=alpha, two_sided=two_sided)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("two_sided", [False, True])
def test_with_many_items_the_power_is_that_of_means(two_sided: bool) -> None:
    found = equal_candidate_power(0.02, 2_001, discordant_share=0.2, alpha=0.05, two_sided=two_sided)
    assert found == equal_mean_power(0.02, 2_001, deviation=0.2**0.5, alpha=0.05, two_sided=two_sided)
    exact = equal_candidate_power(0.02, 2_000, discordant_share=0.2, alpha=0.05, two_sided=two_sided)
    assert exact == pytest.approx(found, abs=0.02)


def test_the_margin_that_would_do_is_told_in_tenths_of_the_gate_s_own_digit() -> None:
    def of(margin: float, num_items: int) -> float:
        return 0.8 if margin > 0.2555 or num_items >= 700 else 0.1

    assert enough(of, 0.2, 100) == Power(0.1, margin=0.26, num_items=pytest.approx(700, rel=0.02))
    assert enough(of, 0.3, 100) == Power(0.8)
    assert enough(lambda margin, n: 0.0, 0.2, 100) == Power(0.0, margin=None, num_items=None)


def test_power_grows_with_the_margin() -> None:
    found = [power(margin, 300) for margin in (0.01, 0.02, 0.03, 0.05, 0.1)]
    assert found == sorted(found)
    assert 0 <= found[0] < found[-1] <= 1


def test_every_metric_by_item_has_a_kind_whose_power_is_known() -> None:
    for metric in METRICS.values():
        assert 0 < gate_power(metric.kind, "non-inferiority", 0.1, 300, spread=0.1, alpha=0.05).value <= 1
