import pytest

from graftline.evaluate.statistics.error_rates import equivalence_p_value, holm


def test_holm_equals_the_worked_example() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert list(adjusted.values()) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_keeps_a_single_test() -> None:
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.04}) == {"a": 0.04}
    assert holm({}) == {}


def test_equivalence_takes_the_larger_of_two_p_values() -> None:
    assert equivalence_p_value(0.2, 0.01) == equivalence_p_value(0.01, 0.2) == 0.2
