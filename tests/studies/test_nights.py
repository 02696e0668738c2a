"""A hundred nights: the kept results meet their targets, the page has them, a small run has the same effects."""

import json
from pathlib import Path

import pytest

from studies import nights
from studies.harness import RESULTS

FOUND = json.loads((RESULTS / "nights.json").read_text(encoding="utf-8"))
PAGE = (Path(RESULTS).parents[1] / "docs" / "promotion.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("metric", nights.METRICS)
def test_with_fresh_rows_and_an_anchor_every_target_is_met(metric: str) -> None:
    targets = FOUND[metric]["targets"]
    assert targets == nights.targets(FOUND[metric]["cells"])
    assert [target["target"] for target in targets if not target["met"]] == []
    assert [target["bound"] for target in targets] == [0.025, 0.01, 0.01, 0.01, 0.01]


@pytest.mark.parametrize("metric", nights.METRICS)
def test_the_page_has_every_line_of_the_tables(metric: str) -> None:
    lines = nights.markdown(FOUND[metric]["cells"])
    assert lines == FOUND[metric]["markdown"]
    assert "\n".join(lines) in PAGE


def worse(*, rows: nights.Rows, anchor: bool) -> nights.Json:
    regime = nights.Regime("worse", 300, rows, anchor)
    return nights.cell(regime, metric="accuracy", seed=7, runs=4, nights=60)


def test_fresh_rows_erode_without_an_anchor_and_the_same_rows_flatter() -> None:
    free, anchored, same = (
        worse(rows="fresh", anchor=False),
        worse(rows="fresh", anchor=True),
        worse(rows="same", anchor=False),
    )
    assert free["loss"] > 2 * nights.MARGIN > 2 * anchored["loss"] > 0
    assert same["bias"] > 0.03 > abs(free["bias"])


def test_of_one_seed_every_regime_meets_the_same_candidates() -> None:
    regimes = (nights.Regime("mixed", 50, "same", anchor=False), nights.Regime("mixed", 50, "fresh", anchor=True))
    ends = [nights.run(nights.METRICS["accuracy"], regime, 20, (0, 1)) for regime in regimes]
    assert ends[0].better == ends[1].better > 0
    assert ends[0] == nights.run(nights.METRICS["accuracy"], regimes[0], 20, (0, 1))
