from dataclasses import replace

import pytest

from flows.changes import Change
from flows.comment import PipelineResult, Side, render, spark, worst
from graftline.evaluate.verdict import GateResult, Outcome, Verdict

BASE, HEAD = "a" * 40, "b" * 40


def verdict(outcome: Outcome) -> Verdict:
    gate = GateResult(
        name="accuracy",
        outcome=outcome,
        reason="measured",
        metric="accuracy",
        test="non-inferiority",
        direction="higher",
        margin=0.02,
        limit=None,
        alpha=0.05,
        against="production",
        min_items=100,
        num_items=300,
        candidate=0.84,
        reference=0.80,
        difference=0.04,
        interval=(0.01, 0.07),
    )
    return Verdict(outcome, (gate,))


RESULT = PipelineResult(
    Change("pets", ("train",), ("train.steps",)),
    stages_run=("train", "evaluate"),
    verdict=verdict("pass"),
    verdict_text="### Gate: ✅ pass\n\nall is well",
    comparison=verdict("pass"),
    base=Side({"accuracy": 0.8, "steps": 8}, [3.0, 2.0]),
    head=Side({"accuracy": 0.84, "steps": 8}, [3.0, 1.0]),
)


def comment(*results: PipelineResult, link: str | None = None) -> str:
    return render(BASE, HEAD, results, num_pipelines=2, link=link)


def test_nothing_changed_is_said_in_two_lines() -> None:
    assert comment() == (
        "## graftline: nothing to evaluate\n\n`aaaaaaaaaaaa` → `bbbbbbbbbbbb`: 0 of 2 pipelines changed.\n"
        "No stage was run: nothing that a pipeline depends on differs.\n"
    )


def test_the_comment_tells_verdict_difference_interval_and_what_ran() -> None:
    text = comment(RESULT, link="https://ci.example/run/1")

    assert text.startswith("## graftline: ✅ pass\n")
    assert "### pets: ✅ pass\n\nChanged: `train.steps`.\nStages run: train, evaluate.\n" in text
    assert "#### Gate: ✅ pass" in text
    assert "| accuracy | 0.8 | 0.84 | +0.04 | [+0.010, +0.070] | ✅ pass |" in text
    assert "| accuracy | 0.8 | 0.84 | +0.04 |\n" in text
    assert "| steps |" not in text
    assert "after  █▁  3.000 → 1.000" in text
    assert "[Log and files of this run](https://ci.example/run/1)" in text


@pytest.mark.parametrize(
    ("own", "compared", "expected"),
    [
        ("pass", "pass", "pass"),
        ("pass", "inconclusive", "pass"),
        ("pass", "fail", "fail"),
        ("inconclusive", "pass", "inconclusive"),
        ("fail", "pass", "fail"),
    ],
)
def test_a_head_that_is_shown_to_be_worse_than_the_base_revision_fails(
    own: Outcome, compared: Outcome, expected: Outcome
) -> None:
    assert replace(RESULT, verdict=verdict(own), comparison=verdict(compared)).outcome == expected


def test_a_head_without_a_verdict_fails_and_says_why() -> None:
    result = replace(RESULT, verdict=None, comparison=None, problem="This revision could not be evaluated:\nno rows")

    assert result.outcome == "fail"
    assert "> This revision could not be evaluated: no rows\n" in comment(result)


def test_the_worst_pipeline_decides() -> None:
    unsure, bad = replace(RESULT, verdict=verdict("inconclusive")), replace(RESULT, verdict=verdict("fail"))

    assert worst([]) == "pass"
    assert worst([RESULT, unsure]) == "inconclusive"
    assert worst([unsure, bad, RESULT]) == "fail"


def test_many_reasons_are_counted_not_listed() -> None:
    many = replace(RESULT, change=Change("pets", ("train",), tuple(f"file-{i}" for i in range(20))))

    assert "`file-11` and 8 more." in comment(many)


def test_secrets_are_masked() -> None:
    text = comment(replace(RESULT, problem="cannot fetch https://user:hunter2@h.example/x?token=t0ps3cret"))

    assert "hunter2" not in text
    assert "t0ps3cret" not in text


def test_a_curve_has_at_most_40_bars() -> None:
    assert spark([1.0, 1.0]) == "▁▁"
    assert len(spark([float(i) for i in range(1000)])) == 40
