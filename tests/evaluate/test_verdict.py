import json
from dataclasses import replace

import pytest

from graftline.errors import EvaluationError
from graftline.evaluate.verdict import (
    GateResult,
    Verdict,
    combined_outcome,
    verdict_from_dict,
    verdict_markdown,
    verdict_to_dict,
)

PASSED = GateResult(
    name="task",
    outcome="pass",
    reason="shown | clearly",
    metric="accuracy",
    test="superiority",
    direction="higher",
    margin=0.0,
    limit=None,
    alpha=0.05,
    against="base",
    min_items=100,
    num_items=300,
    candidate=0.84,
    reference=0.447,
    difference=0.393,
    interval=(0.33, 0.45),
    p_value=1e-9,
    adjusted_p_value=2e-9,
    method="Tango score",
    smallest_effect=0.07,
)
LIMIT = replace(
    PASSED, name="stop", metric="stop_rate", test="limit", limit=0.98, against=None, reference=None, candidate=0.99
)
UNRUN = GateResult("size", "fail", "could not run: no", "bytes", "limit", "lower", 0.0, 1e9, 0.05, None, 100)


def test_a_verdict_survives_json() -> None:
    verdict = Verdict("fail", (PASSED, LIMIT, UNRUN))
    value = json.loads(json.dumps(verdict_to_dict(verdict), allow_nan=False))
    assert verdict_from_dict(value) == verdict
    assert value["format"] == 1
    assert value["outcome"] == "fail"


def test_the_summary_is_the_line_of_the_gate_that_decided() -> None:
    line = "accuracy 0.840 against 0.447 (base): +0.393 [+0.330, +0.450]"
    assert Verdict("pass", (PASSED,)).summary == line
    assert Verdict("fail", (PASSED, UNRUN)).summary == "bytes: not measured (1 of 2 gates pass)"
    assert Verdict("pass", (LIMIT,)).summary == "stop_rate 0.990 [0.330, 0.450], at least 0.980 asked"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "inconclusive"], "inconclusive"),
        (["inconclusive", "fail", "pass"], "fail"),
    ],
)
def test_the_worst_gate_decides(outcomes: list, expected: str) -> None:
    assert combined_outcome(tuple(replace(PASSED, outcome=outcome) for outcome in outcomes)) == expected


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value | {"format": 2}, "format 2"),
        (lambda value: value | {"outcome": "pass"}, "says 'pass', its 2 gates do not"),
        (lambda value: value | {"gates": []}, "its 0 gates"),
        (lambda value: value | {"gates": [{"name": "x"}]}, "not whole"),
        (lambda value: value | {"gates": [value["gates"][0] | {"outcome": "maybe"}]}, "maybe"),
        (lambda value: {"format": 1, "gates": value["gates"]}, "not whole"),
        (lambda value: [], "format 'list'"),
    ],
)
def test_verdicts_that_contradict_themselves_are_refused(edit, message: str) -> None:
    value = verdict_to_dict(Verdict("fail", (PASSED, UNRUN)))
    with pytest.raises(EvaluationError, match=message):
        verdict_from_dict(edit(value))


def test_markdown_has_one_table_line_a_gate_and_every_reason() -> None:
    text = verdict_markdown(Verdict("fail", (PASSED, LIMIT, UNRUN)))
    lines = text.splitlines()
    assert lines[0] == "### Gate: ❌ fail"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3
    assert table[2] == ("| task | ✅ pass | 0.840 | 0.447 (base) | +0.393 | [+0.330, +0.450] (90 %) | 300 | 0.070 |")
    assert table[3] == "| stop | ✅ pass | 0.990 | ≥ 0.980 | – | [0.330, 0.450] (90 %) | 300 | 0.070 |"
    assert table[4] == "| size | ❌ fail | – | ≤ 1e+09 | – | – | – | – |"
    assert "- **task**: shown \\| clearly" in lines
