"""Fits find laws that are there, and none that are not."""

import itertools

import numpy as np
import pytest

from studies.survey import laws
from studies.survey.family import SIZES


def _points(law: object, *, noise: float = 0.0) -> laws.Points:
    keys = list(itertools.product(SIZES, (2, 8, 32), (320, 1280, 5120)))
    factors = np.array([[laws.weights_of(size), rank, rows] for size, rank, rows in keys], dtype=np.float64)
    disturbed = np.exp(np.random.default_rng(0).normal(0, noise, len(keys)))
    return laws.Points([key[0] for key in keys], factors, law(*factors.T) * disturbed)  # type: ignore[operator]


def test_a_power_law_is_recovered_and_its_intervals_hold_it() -> None:
    found = laws.fit_simple(_points(lambda n, r, d: 30 * n**-0.2 * r**-0.05 * d**-0.1, noise=0.02))
    for exponent, value in zip(found, (0.2, 0.05, 0.1), strict=True):
        assert exponent.low < value < exponent.high
        assert exponent.high - exponent.low < 0.05


def test_a_law_predicts_a_size_that_was_left_out() -> None:
    exact = _points(lambda n, r, d: 30 * n**-0.2 * r**-0.05 * d**-0.1)
    assert max(laws.leave_one_size_out(exact).values()) < 1e-9
    bent = _points(lambda n, r, d: np.where(n > 1e6, 3.0, 1.0))
    assert laws.leave_one_size_out(bent)["l"] == pytest.approx(np.log(3))


def test_directions_count_neighbours() -> None:
    falls = laws.directions(_points(lambda n, r, d: n**-0.2 * r**0.1 + 0 * d))
    assert [(one.factor, one.fell, one.compared) for one in falls] == [("N", 27, 27), ("r", 0, 24), ("D", 0, 24)]
    assert falls[0].p == pytest.approx(3 * 0.5**27)
    assert falls[1].p == 1


def test_the_floor_is_found() -> None:
    one_size = _points(lambda n, r, d: 0.7 + 20 / (r**0.2 * d**0.5))
    chosen = [at for at, size in enumerate(one_size.size) if size == "m"]
    found = laws.fit_floor(laws.Points(["m"] * len(chosen), one_size.factors[chosen], one_size.y[chosen]))
    assert found.floor == pytest.approx(0.7, abs=0.02)
    assert (found.rank.value, found.rows.value) == pytest.approx((0.2, 0.5), abs=0.03)
    assert found.error < 0.001


def test_a_floor_that_the_settings_do_not_tell_is_not_given_and_the_exponents_are_those_without_one() -> None:
    without = _points(lambda n, r, d: 30 / (r**0.05 * d**0.1), noise=0.05)
    chosen = [at for at, size in enumerate(without.size) if size == "m"]
    found = laws.fit_floor(laws.Points(["m"] * len(chosen), without.factors[chosen], without.y[chosen]))
    assert found.floor is None
    assert (found.rank.value, found.rows.value) == pytest.approx((0.05, 0.1), abs=0.03)
    for exponent in (found.rank, found.rows):
        assert exponent.low < exponent.value < exponent.high < exponent.low + 0.1
    assert found.error < 0.05


def test_weights_are_those_of_the_model() -> None:
    from transformers import LlamaForCausalLM

    from studies.survey.family import config

    model = LlamaForCausalLM(config("xs", vocabulary=64, stop=0, pad=1))
    inside = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and "norm" not in name)
    assert inside == laws.weights_of("xs")
