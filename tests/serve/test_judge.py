"""The judge of rollouts: wealth by hand, false rollbacks within alpha, bad candidates found, keys that count once."""

import numpy as np
import pytest

from graftline.serve.judge import COLUMNS, GUARDS, Bets, Contest, Floats, Guard, Rule, as_margin, judge
from studies.rollouts import ALPHA, CANDIDATES, INCUMBENT, MARGINS, SHARES, Truth, draw, roll_out, summary, upper_limit

RULE = Rule(share=0.25, num_shares=2, alpha=0.05, margins=MARGINS)


def figures_of(num_keys: int, **given: Floats) -> dict[str, Floats]:
    """Keys without any fault and of equal length, but for what is given."""
    usual = {"feedback": 0.5, "seconds": 1.0, "tokens": 100.0}
    return {name: given.get(name, np.full(num_keys, usual.get(name, 0.0))) for name in COLUMNS}


def by_hand(y: list[float], is_candidate: list[bool], *, share: float, margin: float, prior: float) -> list[float]:
    """The wealth of "worse", key by key, as the module's docstring writes it."""
    wealths, total, count = dict.fromkeys((0.8, 0.32, 0.128, 0.0512, 0.02), 1.0), prior, 1.0
    means = []
    for value, candidate in zip(y, is_candidate, strict=True):
        c = total / count
        d = (value - c) / share if candidate else -(value - c) / (1 - share)
        loss = max(c / share, (1 - c) / (1 - share)) + margin
        wealths = {f: wealth * (1 + f * (d - margin) / loss) for f, wealth in wealths.items()}
        means.append(sum(wealths.values()) / len(wealths))
        if not candidate:
            total, count = total + value, count + 1
    return means


def test_wealth_is_what_the_formula_says_whatever_the_blocks() -> None:
    rng = np.random.default_rng(0)
    y, is_candidate = rng.random((1, 60)), rng.random((1, 60)) < 0.25
    expected = by_hand(y[0].tolist(), is_candidate[0].tolist(), share=0.25, margin=0.02, prior=0.0)
    whole = Bets(Guard("errors"), share=0.25, margin=0.02).bet(y, is_candidate)
    np.testing.assert_allclose(whole[0][0], expected, rtol=1e-12)
    bets = Bets(Guard("errors"), share=0.25, margin=0.02)
    parts = [bets.bet(y[:, a:b], is_candidate[:, a:b]) for a, b in ((0, 1), (1, 1), (1, 37), (37, 60))]
    for side in (0, 1):
        np.testing.assert_allclose(np.concatenate([part[side] for part in parts], axis=1), whole[side], rtol=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("level", [0.0, 0.01, 0.5, 1.0])
def test_no_bet_can_ruin_even_on_the_worst_key(share: float, level: float) -> None:
    for guard in (Guard("errors"), Guard("feedback")):
        for values in ((0.0, 1.0), (1.0, 0.0)):
            y = np.array([[level] * 50 + [values[0], values[1]] * 20])
            for candidates in (0, 1):
                is_candidate = (np.arange(y.shape[1]) % 2 == candidates)[None]
                for wealth in Bets(guard, share=share, margin=0.02).bet(y, is_candidate):
                    assert (wealth > 0).all()


def test_an_expected_value_at_the_margin_leaves_the_wealth_where_it_is_on_average() -> None:
    """The martingale itself: the mean wealth over many rollouts stays 1 where the difference is exactly the margin."""
    rng = np.random.default_rng(1)
    is_candidate = rng.random((20_000, 40)) < 0.25
    y = (rng.random(is_candidate.shape) < np.where(is_candidate, 0.12, 0.1)).astype(float)
    for wealth in Bets(Guard("errors"), share=0.25, margin=0.02).bet(y, is_candidate):
        assert wealth[:, -1].mean() == pytest.approx(1.0, abs=4 * wealth[:, -1].std() / np.sqrt(20_000))


def test_false_rollbacks_stay_within_alpha_and_bad_candidates_do_not_pass_the_first_share() -> None:
    """A tiny version of `python -m studies rollouts`."""
    rng = np.random.default_rng(2)
    for name, truth in CANDIDATES.items():
        is_bad = ":" in name
        found = summary([roll_out(rng, truth, *((20, 8_000) if is_bad else (100, 1_500)))])
        if is_bad:
            assert found["promoted"] == 0, name
            assert found["rolled_back_at_first_share"] == 1, name
        else:
            assert found["rolled_back_upper_95"] <= ALPHA + 0.005, name


def test_many_requests_of_one_key_do_not_count_as_many_draws() -> None:
    """Half of the keys always fail and half never do. By request that would be sure evidence after three noisy keys."""
    rng = np.random.default_rng(3)
    back = 0
    for _ in range(60):
        is_candidate = rng.random((1, 400)) < 0.25
        contest = Contest(RULE)
        values = figures_of(400, errors=(rng.random(400) < 0.5).astype(float))
        back += contest.add({name: one[None] for name, one in values.items()}, is_candidate)[0].any()
    assert upper_limit(back, 60) <= 0.055


def test_traffic_that_gets_worse_for_everybody_is_not_held_against_the_candidate() -> None:
    """Errors rise from none to all: whoever compares the candidate's later keys with all of the incumbent's errs."""
    rng = np.random.default_rng(4)
    rate = np.linspace(0, 1, 3000)
    back = 0
    for _ in range(60):
        values = figures_of(3000, errors=(rng.random(3000) < rate).astype(float), seconds=np.exp(4 * rate))
        back += judge(values, rng.random(3000) < 0.25, RULE).decision == "back"
    assert upper_limit(back, 60) <= 0.055


def test_each_guard_alone_is_found_and_named() -> None:
    rng = np.random.default_rng(5)
    worse = {
        "errors": ("errors", 0.3),
        "slower": ("seconds", 3.0),
        "longer": ("tokens", 400.0),
        "shorter": ("tokens", 25.0),
        "refusals": ("refusals", 0.4),
        "unended": ("unended", 0.4),
        "feedback": ("feedback", 0.8),
    }
    assert worse.keys() == GUARDS.keys() == MARGINS.keys()
    for guard, (column, value) in worse.items():
        values, is_candidate = figures_of(3000), rng.random(3000) < 0.25
        values[column] = np.where(is_candidate, value, values[column])
        standing = judge(values, is_candidate, RULE)
        assert standing.decision == "back", guard
        assert standing.reason.startswith(f"{guard}: {column} {value:.3g} against"), standing.reason


def test_moving_on_needs_every_guard_to_be_shown_and_says_what_is_missing() -> None:
    rng = np.random.default_rng(6)
    figures, is_candidate = draw(rng, INCUMBENT, (1, 8000), first_key=0, share=0.25)
    one = {name: values[0] for name, values in figures.items()}
    few = judge({name: values[:300] for name, values in one.items()}, is_candidate[0, :300], RULE)
    assert few.decision == "hold"
    assert "errors" in few.reason
    assert judge(one, is_candidate[0], RULE).decision == "on"


def test_rollouts_judged_side_by_side_are_judged_as_each_alone() -> None:
    """What `studies.rollouts` simulates is what `flows.rollout` decides by, key for key."""
    rng = np.random.default_rng(8)
    for truth in (
        CANDIDATES["equal"],
        CANDIDATES["failing: one request in three"],
        CANDIDATES["slow: twice the seconds"],
    ):
        figures, is_candidate = draw(rng, truth, (6, 400), first_key=0, share=0.25)
        rule = Rule(share=0.25, num_shares=2, alpha=0.05, margins=MARGINS)
        contest, back, on = Contest(rule, 6), [], []
        for first in range(0, 400, 100):
            block = {name: values[:, first : first + 100] for name, values in figures.items()}
            went_back, moved_on = contest.add(block, is_candidate[:, first : first + 100])
            back.append(went_back.any(axis=1))
            on.append(moved_on.any(axis=1))
        for row in range(6):
            standing = judge({name: values[row] for name, values in figures.items()}, is_candidate[row], rule)
            alone = (standing.decision == "back", standing.decision == "on")
            assert alone == (bool(np.any(back, axis=0)[row]), bool(np.any(on, axis=0)[row]) and not alone[0])


def test_no_keys_decide_nothing() -> None:
    standing = judge(figures_of(0), np.zeros(0, dtype=bool), RULE)
    assert (standing.decision, standing.num_keys) == ("hold", (0, 0))
    assert standing.means["errors"] == (None, None)


def test_a_decision_does_not_depend_on_how_often_it_was_asked_for() -> None:
    rng = np.random.default_rng(7)
    figures, is_candidate = draw(rng, Truth(errors=0.5), (1, 2000), first_key=0, share=SHARES[0])
    rule = Rule(share=SHARES[0], num_shares=2, alpha=0.05, margins=MARGINS)
    once = judge({name: values[0] for name, values in figures.items()}, is_candidate[0], rule)
    contest, back = Contest(rule), False
    for at in range(2000):
        block = {name: values[:, at : at + 1] for name, values in figures.items()}
        back = back or bool(contest.add(block, is_candidate[:, at : at + 1])[0].any())
    assert back
    assert once.decision == "back"


def test_answers_that_never_came_have_no_length_and_are_no_evidence_of_short_ones() -> None:
    rng = np.random.default_rng(8)
    is_candidate = rng.random(500) < 0.25
    missing = np.where(rng.random(500) < 0.5, np.nan, 100.0)
    standing = judge(figures_of(500, tokens=missing, seconds=missing), is_candidate, RULE)
    assert standing.decision != "back"
    assert all(np.isfinite(value) for value in standing.worse.values())


def test_a_factor_is_the_margin_that_a_typical_answer_moves_by() -> None:
    assert as_margin(1.0) == 0
    assert as_margin(2.0) == pytest.approx(2 / 3 - 1 / 2)
