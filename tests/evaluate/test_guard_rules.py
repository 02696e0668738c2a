"""Guards are on in every pipeline, are decided by what was observed, and cost the pipeline's own gates no power."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftline.digest import of_json
from graftline.errors import ConfigError, EvaluationError
from graftline.evaluate.gate_rules import GuardRule, pipeline_rules
from graftline.evaluate.gates import judge
from graftline.evaluate.guards import training_numbers
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Scores
from graftline.evaluate.verdict import GateResult, Verdict, verdict_from_dict, verdict_markdown, verdict_to_dict
from graftline.settings import Gate, Pipeline, load
from tests.settings.documents import changed, read

SOUND = {
    "training_steps": 10.0,
    "training_losses_not_finite": 0.0,
    "training_loss_start": 2.0,
    "training_loss_end": 0.5,
    "leaked_rows": 0.0,
    "template_mismatches": 0.0,
}
GATE: dict[str, Any] = {
    "metric": "accuracy",
    "direction": "higher",
    "test": "non-inferiority",
    "margin": 0.1,
    "against": "production",
}


def pipeline(**changes: Any) -> Pipeline:
    return read(changed(**{"demo.gates": {"accuracy": GATE}} | changes)).pipeline("demo")


def scores(
    num_items: int = 200, *, ends: int | None = None, nll: float = 0.3, right: int | None = None, **numbers: float
) -> Scores:
    """So many items, of which ``ends`` end and ``right`` are right (all when left out)."""
    ends, right = (num_items if given is None else given for given in (ends, right))
    items = (
        ItemScore(f"{i:04}", (-nll, -nll - 1), int(i >= right), 0, i < right, nll, 1, i < ends)
        for i in range(num_items)
    )
    return Scores(of_json("none"), ("cat", "dog"), tuple(items), numbers=SOUND | numbers)


def judged(
    candidate: Scores, production: Scores | None = None, base: Scores | None = None, /, **changes: Any
) -> Verdict:
    production = production or scores()
    return judge(pipeline_rules(pipeline(**changes)), candidate, {"production": production, "base": base or production})


def outcomes(verdict: Verdict) -> dict[str, str]:
    return {gate.name: gate.outcome for gate in verdict.gates}


def found(verdict: Verdict, name: str) -> GateResult:
    return next(gate for gate in verdict.gates if gate.name == name)


def test_a_minimal_pipeline_asks_for_its_gate_and_for_every_guard() -> None:
    rules = pipeline_rules(pipeline())
    assert list(rules) == [
        "accuracy",
        "guard: stops",
        "guard: stops against production",
        "guard: likelihood",
        "guard: training",
        "guard: leakage",
        "guard: template",
    ]
    assert [rule.guard for rule in rules.values() if isinstance(rule, GuardRule)] == [
        "stops",
        "stops",
        "likelihood",
        "training",
        "leakage",
        "template",
    ]


def test_free_answers_and_general_text_bring_guards_of_their_own() -> None:
    rules = pipeline_rules(
        pipeline(
            **{
                "demo.evaluate.answers": {"max_new_tokens": 4},
                "demo.evaluate.forgetting": {"source": "path:text.txt"},
            }
        )
    )
    assert {"guard: stops (free answers)", "guard: stops (free answers) against production", "guard: forgetting"} < set(
        rules
    )


@pytest.mark.parametrize("off", ["off", "Off", False])
@pytest.mark.parametrize("name", ["stops", "likelihood", "training", "leakage", "template", "forgetting"])
def test_a_guard_is_switched_off_by_its_name(name: str, off: object) -> None:
    text: dict[str, Any] = {"demo.evaluate.forgetting": {"source": "path:text.txt"}}
    rules = pipeline_rules(pipeline(**text, **{"demo.guards": {name: off}}))
    on = pipeline_rules(pipeline(**text, **{"demo.guards": {name: "on"}}))
    assert {rule.guard for rule in on.values() if isinstance(rule, GuardRule)} - {
        rule.guard for rule in rules.values() if isinstance(rule, GuardRule)
    } == {name}


def test_off_in_a_file_switches_a_guard_off(tmp_path: Path) -> None:
    """YAML 1.2 reads `off` as text, YAML 1.1 as false."""
    document = json.loads(changed())
    guards = "guards: {stops: off, leakage: false, template: on}"
    text = json.dumps(document["pipelines"]["demo"])
    channels = json.dumps(document["channels"])
    path = tmp_path / "pipelines.yaml"
    path.write_text(f"pipelines:\n  demo:\n    <<: {text}\n    {guards}\nchannels: {channels}\n", encoding="utf-8")
    read_back = load(path).pipeline("demo").guards
    assert (read_back.stops, read_back.leakage, read_back.template, read_back.training) == (False, False, True, True)


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        ({"stop": "off"}, r"guards\.stop: unknown key; did you mean `stops`\?"),
        ({"forgeting": False}, r"did you mean `forgetting`\?"),
        ({"accuracy": "off"}, "expected one of stops, likelihood, training, leakage, template, forgetting"),
        ({"stops": "never"}, r'guards\.stops: given "never"; expected true or false\. Answers end'),
        ({"stops": 0}, "given 0; expected true or false"),
    ],
)
def test_an_unknown_guard_or_switch_is_refused_with_what_is_known(guards: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(**{"demo.guards": guards})


def test_a_sound_candidate_passes_every_guard() -> None:
    assert set(outcomes(judged(scores())).values()) == {"pass"}


def test_answers_that_never_end_fail_a_pipeline_that_only_asks_for_accuracy() -> None:
    verdict = judged(scores(ends=0))
    assert verdict.outcome == "fail"
    assert found(verdict, "accuracy").outcome == "pass"
    stops = found(verdict, "guard: stops")
    assert (stops.outcome, stops.candidate, stops.guard) == ("fail", 0.0, "stops")
    assert outcomes(judged(scores(ends=0), **{"demo.guards": {"stops": "off"}}))["accuracy"] == "pass"
    assert judged(scores(ends=0), **{"demo.guards": {"stops": "off"}}).outcome == "pass"


@pytest.mark.parametrize(
    ("ours", "theirs", "limit", "against"),
    [
        (180, 180, "pass", "pass"),
        (179, 179, "fail", "pass"),
        (190, 200, "pass", "pass"),  # 5 points below: 0.95 - 1 < -0.05 in binary fractions
        (189, 200, "pass", "fail"),
        (200, 0, "pass", "pass"),  # the first run: a base that never stops stands in for production
    ],
)
def test_answers_end_as_often_as_asked_and_as_in_production(ours: int, theirs: int, limit: str, against: str) -> None:
    verdict = judged(scores(ends=ours), scores(ends=theirs))
    assert (found(verdict, "guard: stops").outcome, found(verdict, "guard: stops against production").outcome) == (
        limit,
        against,
    )


@pytest.mark.parametrize(("ours", "outcome"), [(1.3, "pass"), (1.31, "fail"), (7.98, "fail"), (0.01, "pass")])
def test_the_likelihood_may_not_collapse(ours: float, outcome: str) -> None:
    assert found(judged(scores(nll=ours)), "guard: likelihood").outcome == outcome


@pytest.mark.parametrize("num_items", [1, 2, 10])
def test_few_rows_decide_a_guard_too(num_items: int) -> None:
    rules = {name: rule for name, rule in pipeline_rules(pipeline()).items() if isinstance(rule, GuardRule)}
    for candidate, outcome in ((scores(num_items), "pass"), (scores(num_items, ends=0), "fail")):
        verdict = judge(rules, candidate, {"production": scores(num_items), "base": scores(num_items)})
        assert verdict.outcome == outcome
        assert verdict_from_dict(json.loads(json.dumps(verdict_to_dict(verdict)))) == verdict


@pytest.mark.parametrize(
    ("numbers", "outcome", "reason"),
    [
        ({"training_loss_end": 2.0}, "fail", "asked: the mean loss at the end below that at the start"),
        (
            {"training_loss_end": 2.1},
            "fail",
            r"training_loss_end 2\.100 against 2\.000 \(training_loss_start\): \+0\.100",
        ),
        ({"training_loss_end": 1.9}, "pass", "10 steps"),
        ({"training_losses_not_finite": 2.0}, "fail", "the training loss of 2 of 10 steps is not finite"),
        ({"training_steps": 1.0, "training_loss_end": 2.0}, "pass", "the loss of the only step is 2, which is finite"),
    ],
)
def test_the_training_loss_is_finite_and_falls(numbers: dict[str, Any], outcome: str, reason: str) -> None:
    guard = found(judged(scores(**numbers)), "guard: training")
    assert guard.outcome == outcome
    assert re.search(reason, guard.reason)


@pytest.mark.parametrize("name", ["leaked_rows", "template_mismatches"])
def test_one_leaked_row_or_mismatched_template_fails(name: str) -> None:
    found: dict[str, Any] = {name: 1.0}
    assert judged(scores(**found)).outcome == "fail"


def test_forgetting_more_than_a_nat_fails_where_a_text_is_given() -> None:
    def with_text(nll: float) -> Scores:
        return replace(scores(), documents=tuple(DocumentScore(f"{i}", nll, 1) for i in range(5)))

    text: dict[str, Any] = {"demo.evaluate.forgetting": {"source": "path:text.txt"}}
    assert judged(with_text(4.0), with_text(4.0), with_text(3.0), **text).outcome == "pass"
    assert found(judged(with_text(4.1), with_text(4.1), with_text(3.0), **text), "guard: forgetting").outcome == "fail"


def test_free_answers_that_do_not_end_fail() -> None:
    def answering(ends: bool) -> Scores:
        answers = tuple(AnswerScore(f"{i}", "x", 1.0, 1.0, 1.0, 1, ends) for i in range(20))
        return replace(scores(), answers=answers)

    verdict = judged(answering(False), answering(True), **{"demo.evaluate.answers": {"max_new_tokens": 4}})
    assert {gate.name for gate in verdict.gates if gate.outcome == "fail"} == {
        "guard: stops (free answers)",
        "guard: stops (free answers) against production",
    }


@pytest.mark.parametrize("missing", ["leaked_rows", "training_steps", "training_loss_end"])
def test_a_guard_whose_number_was_not_measured_fails(missing: str) -> None:
    candidate = scores()
    numbers = {name: value for name, value in candidate.numbers.items() if name != missing}
    verdict = judged(replace(candidate, numbers=numbers))
    (failed,) = [gate for gate in verdict.gates if gate.outcome == "fail"]
    assert failed.reason.startswith(f"could not run: {missing} was not measured for the candidate")


def test_a_gate_on_a_guard_s_metric_neither_replaces_nor_loosens_it() -> None:
    own = {"metric": "option_stop_rate", "direction": "higher", "test": "limit", "limit": 0.5}
    verdict = judged(scores(ends=150), **{"demo.gates": {"accuracy": GATE, "stops": own}})
    assert found(verdict, "stops").outcome == "pass"
    assert found(verdict, "guard: stops").outcome == "fail"


def test_guards_do_not_change_what_a_gate_s_p_value_is_corrected_to() -> None:
    rules = pipeline_rules(pipeline())
    alone = judge({"accuracy": rules["accuracy"]}, scores(right=190), {"production": scores(right=192)}).gates[0]
    together = found(judged(scores(right=190), scores(right=192)), "accuracy")
    assert together == alone
    assert alone.p_value is not None


def test_the_verdict_names_guards_and_shows_the_value_that_decided() -> None:
    verdict = judged(scores(ends=100, nll=0.4))
    page = verdict_markdown(verdict)
    assert "| guard: stops | ❌ fail | 0.500 | ≥ 0.900 |" in page
    assert "| guard: likelihood | ✅ pass | 0.400 | 0.300 (production) | +0.100 |" in page
    assert "decided by the value that was observed; asked: at most 1 above production" in page
    written = verdict_to_dict(verdict)["gates"]
    assert {gate["guard"] for gate in written} == {None, "stops", "likelihood", "training", "leakage", "template"}


def test_a_verdict_that_was_written_before_there_were_guards_is_read() -> None:
    old = copy.deepcopy(verdict_to_dict(judge({"a": Gate(**GATE)}, scores(), {"production": scores()})))
    for gate in old["gates"]:
        del gate["guard"]
    assert verdict_from_dict(old).gates[0].guard is None


@pytest.mark.parametrize(
    ("losses", "start", "end"),
    [
        ([3.0], 3.0, 3.0),
        ([3.0, 1.0], 3.0, 1.0),
        ([3.0, 2.0, 1.0], 3.0, 1.0),
        ([4.0, 3.0, 2.0, 1.0], 3.5, 1.5),
        ([float(n) for n in range(20, 0, -1)], 18.0, 3.0),
        ([float(n) for n in range(100, 0, -1)], 95.5, 5.5),
    ],
)
def test_start_and_end_of_a_training_are_means_of_its_edges(losses: list[float], start: float, end: float) -> None:
    numbers = training_numbers(losses)
    assert (numbers["training_loss_start"], numbers["training_loss_end"]) == (start, end)
    assert numbers["training_steps"] == len(losses)


def test_a_loss_that_is_not_finite_is_counted_and_gives_no_mean() -> None:
    assert training_numbers([1.0, float("nan"), float("inf")]) == {
        "training_steps": 3.0,
        "training_losses_not_finite": 2.0,
    }


def test_a_history_without_steps_is_refused() -> None:
    with pytest.raises(EvaluationError, match="run the train stage again"):
        training_numbers([])
