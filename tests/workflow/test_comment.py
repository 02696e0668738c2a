import json
import re
from dataclasses import replace
from typing import Any

import pytest

from graftline.evaluate.side_by_side import ShownAnswer, ShownRow
from graftline.evaluate.verdict import GateResult, Outcome, Verdict
from graftline.workflow.changes import PipelineChange
from graftline.workflow.comment import MAX_BYTES, Answer, PipelineResult, RevisionFigures, render, spark, worst
from graftline.workflow.deciding import DecidingSetting
from graftline.workflow.pull_request import as_json

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
    PipelineChange("pets", ("train",), ("train.steps",)),
    stages_run=("train", "evaluate"),
    verdict=verdict("pass"),
    verdict_text="### Gate: ✅ pass\n\nall is well",
    comparison=verdict("pass"),
    base=RevisionFigures({"accuracy": 0.8, "steps": 8}, [3.0, 2.0]),
    head=RevisionFigures({"accuracy": 0.84, "steps": 8}, [3.0, 1.0]),
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
        ("pass", "inconclusive", "inconclusive"),
        ("pass", "fail", "fail"),
        ("inconclusive", "pass", "inconclusive"),
        ("inconclusive", "fail", "fail"),
        ("fail", "pass", "fail"),
        ("fail", "inconclusive", "fail"),
    ],
)
def test_only_what_is_shown_by_its_own_gates_and_by_the_base_revision_s_passes(
    own: Outcome, compared: Outcome, expected: Answer
) -> None:
    assert replace(RESULT, verdict=verdict(own), comparison=verdict(compared)).outcome == expected


def lost(interval: tuple[float, float]) -> PipelineResult:
    """A head of 0.78 where the base revision had 0.89, as it was seen in use; production is the untrained base."""
    (gate,) = verdict("inconclusive").gates
    numbers = {"candidate": 0.78, "reference": 0.89, "difference": -0.11, "margin": 0.05, "more_items": 213}
    gate = replace(gate, interval=interval, against="base revision", **numbers)
    return replace(RESULT, comparison=Verdict("inconclusive", (gate,)))


def test_a_loss_beyond_chance_that_is_not_shown_to_be_small_fails_and_is_said_in_words() -> None:
    result = lost((-0.182, -0.046))

    assert result.outcome == "fail"
    assert "| accuracy | 0.89 | 0.78 | -0.11 | [-0.182, -0.046] | ❌ fail |" in comment(result)
    assert "- **accuracy**: worse by 0.11, not shown to be within the margin of 0.05\n" in comment(result)


def test_what_is_not_shown_either_way_is_inconclusive_and_says_how_many_rows_decide() -> None:
    result = lost((-0.23, 0.01))

    assert result.outcome == "inconclusive"
    assert comment(result).startswith("## graftline: ❔ inconclusive\n")
    assert "about 213 more rows would decide (513 in all)" in comment(result)


def test_a_small_loss_within_the_margin_passes_and_is_said_in_words() -> None:
    (gate,) = verdict("pass").gates
    gate = replace(gate, interval=(-0.015, -0.002), difference=-0.008, margin=0.02)
    result = replace(RESULT, comparison=Verdict("pass", (gate,)))

    assert result.outcome == "pass"
    assert "worse by 0.008, within the margin of 0.02" in comment(result)


def test_a_result_without_a_comparison_or_with_a_problem_does_not_pass_by_itself() -> None:
    assert replace(RESULT, comparison=None).outcome == "needs a look"
    assert replace(RESULT, problem="The base revision could not be evaluated").outcome == "needs a look"
    assert replace(RESULT, problem="x", verdict=verdict("fail")).outcome == "fail"


def test_the_base_revision_s_gates_count_where_the_head_has_others() -> None:
    result = replace(RESULT, former=verdict("fail"))

    assert result.outcome == "fail"
    assert "by the base revision's gates\n\n- **accuracy**: ❌ fail: measured\n" in comment(result)


def test_a_removed_pipeline_needs_a_look_and_ran_nothing() -> None:
    result = PipelineResult(
        PipelineChange("pets", ("train",), ("removed",), removed=True), problem="The pipeline is removed."
    )

    assert result.outcome == "needs a look"
    assert "Stages run" not in comment(result)


MARGIN = DecidingSetting("pets", "gates.accuracy.margin", "0.05", "0.5")


def test_what_decides_stands_first_side_by_side_and_never_passes() -> None:
    result = replace(RESULT, settings=(MARGIN,))

    text = comment(result)

    assert result.outcome == "needs a look"
    assert text.startswith("## graftline: 👀 needs a look\n")
    assert "| pets | `gates.accuracy.margin` | `0.05` | `0.5` |" in text
    assert text.index("gates.accuracy.margin") < text.index("### pets: 👀 needs a look")


def test_what_decides_does_not_hide_a_fail() -> None:
    assert worst([replace(RESULT, settings=(MARGIN,), comparison=verdict("fail"))], [MARGIN]) == "fail"


def test_a_channel_alone_needs_a_look_though_no_pipeline_changed() -> None:
    setting = DecidingSetting(None, "channels.production.approvals.count", "2", "0")

    text = render(BASE, HEAD, [], num_pipelines=2, link=None, settings=[setting])

    assert worst([], [setting]) == "needs a look"
    assert text.startswith("## graftline: 👀 needs a look\n")
    assert "| all | `channels.production.approvals.count` | `2` | `0` |" in text


def test_a_gate_that_many_pipelines_share_is_one_line() -> None:
    settings = [replace(MARGIN, pipeline=f"pets-{i}") for i in range(1000)]

    text = render(BASE, HEAD, [], num_pipelines=1000, link=None, settings=settings)

    assert "| pets-0, pets-1, pets-2, pets-3, pets-4 and 995 more | `gates.accuracy.margin` | `0.05` | `0.5` |" in text
    assert text.count("gates.accuracy.margin") == 1


def test_a_value_cannot_break_the_table_or_call_anybody() -> None:
    setting = DecidingSetting("pets", "data.labels", None, "a|b`c\n@everyone <!--")

    text = render(BASE, HEAD, [], num_pipelines=1, link=None, settings=[setting])

    assert "| pets | `data.labels` | – | `` a\\|b`c @everyone <!-- `` |" in text


def test_what_is_not_printable_is_escaped() -> None:
    """A server refuses a comment with a NUL, and turned letters show another value than the file's."""
    setting = DecidingSetting("pets", "data.labels", "cat", "do\u202eg\0")

    text = render(BASE, HEAD, [], num_pipelines=1, link=None, settings=[setting])

    assert "| pets | `data.labels` | `cat` | `do\\u202eg\\x00` |" in text


def test_a_reason_or_an_error_s_words_format_nothing_and_call_nobody() -> None:
    """Both quote what somebody wrote: keys of pipelines.yaml, names of files, rows."""
    change = PipelineChange("pets", ("train",), ("adapter.rank_pattern.`@everyone|<img src=x>",))

    text = comment(replace(RESULT, change=change, problem="given `a`, @everyone <img src=x> [x](http://x.example)"))

    assert "Changed: `` adapter.rank_pattern.`@everyone|<img src=x> ``." in text
    assert "> `` given `a`, @everyone <img src=x> [x](http://x.example) ``\n" in text


def test_a_head_without_a_verdict_fails_and_says_why() -> None:
    result = replace(RESULT, verdict=None, comparison=None, problem="This revision could not be evaluated:\nno rows")

    assert result.outcome == "fail"
    assert "> `This revision could not be evaluated: no rows`\n" in comment(result)


def test_the_worst_pipeline_decides() -> None:
    unsure, bad = replace(RESULT, verdict=verdict("inconclusive")), replace(RESULT, verdict=verdict("fail"))

    assert worst([]) == "pass"
    assert worst([RESULT, unsure]) == "inconclusive"
    assert worst([unsure, bad, RESULT]) == "fail"
    assert worst([unsure, replace(RESULT, settings=(MARGIN,))]) == "needs a look"


def test_the_worst_pipelines_stand_first() -> None:
    named = [
        replace(RESULT, change=replace(RESULT.change, pipeline=name), verdict=verdict(outcome))
        for name, outcome in (("good", "pass"), ("unsure", "inconclusive"), ("bad", "fail"))
    ]

    text = comment(*named)

    assert text.index("### bad") < text.index("### unsure") < text.index("### good")
    assert "3 of 2 pipelines changed: 1 ❌ fail, 1 ❔ inconclusive, 1 ✅ pass." in text


def test_many_reasons_are_counted_not_listed() -> None:
    many = replace(RESULT, change=PipelineChange("pets", ("train",), tuple(f"file-{i}" for i in range(20))))

    assert "`file-11` and 8 more." in comment(many)


def test_rows_stand_side_by_side_and_format_nothing() -> None:
    text = "line one\n| @everyone `code` <b>"
    row = ShownRow(7, text, "plant", {"production": ShownAnswer("plant", 1.0), "candidate": ShownAnswer("ani|mal", 0)})
    unasked = ShownRow(8, "short", "plant", {"production": None, "candidate": ShownAnswer("", 0.25)})
    lines = comment(replace(RESULT, worst_rows=(row, unasked))).splitlines()
    assert "<details><summary>2 held-out rows that this revision answered worst</summary>" in lines
    assert "| row | prompt | expected | production | this revision |" in lines
    assert "| 7 | `` line one \\| @everyone `code` <b> `` | `plant` | `plant` 1 | `ani\\|mal` 0 |" in lines
    assert "| 8 | `short` | `plant` | – |  0.25 |" in lines


def test_rows_whose_texts_are_hidden_show_scores_alone() -> None:
    row = ShownRow(7, None, None, {"production": ShownAnswer(None, 1.0), "candidate": ShownAnswer(None, 0.0)})
    lines = comment(replace(RESULT, worst_rows=(row,))).splitlines()
    assert "| row | production | this revision |" in lines
    assert "| 7 | 1 | 0 |" in lines


def test_secrets_are_masked() -> None:
    text = comment(replace(RESULT, problem="cannot fetch https://user:hunter2@h.example/x?token=t0ps3cret"))

    assert "hunter2" not in text
    assert "t0ps3cret" not in text


def test_the_result_for_programs_has_no_secrets_either() -> None:
    secret = "https://user:hunter2@h.example/x?token=t0ps3cret"
    gate = replace(verdict("fail").gates[0], reason=f"could not run: {secret}")
    result = replace(
        RESULT,
        change=PipelineChange("pets", ("train",), (f"{secret} (not in git)",)),
        problem=f"cannot fetch {secret}",
        comparison=Verdict("fail", (gate,)),
        former=Verdict("fail", (gate,)),
    )

    text = json.dumps(as_json(BASE, HEAD, [result], []))

    assert "hunter2" not in text
    assert "t0ps3cret" not in text
    assert text.count("https://***@h.example/x?token=***") == 4


def many(count: int, **changes: Any) -> list[PipelineResult]:
    results = [replace(RESULT, change=replace(RESULT.change, pipeline=f"pets-{i}"), **changes) for i in range(count)]
    return [*results, replace(RESULT, change=replace(RESULT.change, pipeline="broken"), verdict=verdict("fail"))]


@pytest.mark.parametrize("count", [1, 40, 300, 3000])
def test_a_comment_of_many_pipelines_fits_github_and_counts_what_it_leaves_out(count: int) -> None:
    text = render(BASE, HEAD, many(count), num_pipelines=count + 1, link="https://ci.example/run/1")

    # GitHub refuses 65,536 characters and more, and it does not matter how it counts them.
    assert len(text.encode()) <= MAX_BYTES < 65_536
    assert f"{count + 1} of {count + 1} pipelines changed: 1 ❌ fail, {count} ✅ pass." in text
    assert text.index("### broken: ❌ fail") < text.index("### pets-0: ✅ pass")
    shown = text.count("\n### pets-") + text.count("\n- pets-")
    counted = re.search(r"- and (\d+) more: \d+ ✅ pass", text)
    assert shown + (int(counted[1]) if counted else 0) == count
    assert text.endswith("[Log and files of this run](https://ci.example/run/1)\n")


HUGE = "x" * 200_000
MANY_METRICS = {f"metric_{i}": i for i in range(20_000)}


@pytest.mark.parametrize(
    "result",
    [
        replace(RESULT, head=RevisionFigures(MANY_METRICS, [3.0, 1.0])),
        replace(RESULT, verdict_text="### Gate\n\n```\n" + "line ▁\n" * 50_000 + "```\n"),
        replace(RESULT, verdict_text=HUGE),
        replace(RESULT, verdict=None, problem=HUGE),
        replace(RESULT, change=PipelineChange(HUGE, ("train",), (HUGE,) * 20)),
        replace(RESULT, settings=(DecidingSetting("pets", HUGE, HUGE, HUGE),)),
        replace(RESULT, settings=tuple(DecidingSetting("pets", f"key-{i}", "1", "2") for i in range(5_000))),
        replace(RESULT, comparison=Verdict("pass", verdict("pass").gates * 5_000)),
    ],
)
def test_one_huge_section_is_cut_and_what_it_opened_is_closed(result: PipelineResult) -> None:
    text = render(BASE, HEAD, [result, *many(2)], num_pipelines=4, link=None)

    assert len(text.encode()) <= MAX_BYTES
    assert text.count("<details>") == text.count("</details>")
    assert text.count("\n```") % 2 == 0
    assert "### pets-1: ✅ pass" in text  # The others are not pushed out by it.


def test_a_secret_at_the_cut_is_masked() -> None:
    for length in range(1_980, 2_010):
        problem = "x" * length + " https://user:hunter2@h.example/x"
        assert "hunter" not in comment(replace(RESULT, verdict=None, problem=problem))


def test_a_curve_has_at_most_40_bars() -> None:
    assert spark([1.0, 1.0]) == "▁▁"
    assert len(spark([float(i) for i in range(1000)])) == 40
