"""Every part of an evaluation on one small model, and its summary."""

import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.rows import Message, Row
from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.evaluation import AnswerItem, EvaluationPlan, evaluate_model, prepare
from graftline.evaluate.gate_rules import sample
from graftline.evaluate.gates import judge
from graftline.evaluate.metrics import summarize
from graftline.evaluate.option_tree import OptionItem
from graftline.settings.model import Answers, Harness
from tests.sections import evaluate_section, gate_section

LABELS = ("animal", "plant")


def row(number: int, answer: str) -> Row:
    prompt = f"Definition: number {number} of a list of living things\nCategory:"
    messages = (Message("user", prompt, supervised=False), Message("assistant", answer, supervised=True))
    return Row(messages, number + 1)


ROWS = [row(number, f" {LABELS[number % 2]}") for number in range(12)]


def test_labels_give_accuracy_confusion_and_calibration(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    scores = evaluate_model(
        model, tokenizer, EvaluationPlan(ROWS, "none", LABELS, ["a text of general words"], evaluate_section())
    )
    summary = summarize(scores)
    right = sum(item.correct for item in scores.items)
    assert summary["accuracy"] == right / 12
    assert sum(found["chosen"].get(label, 0) for label, found in summary["labels"].items()) == right
    assert sum(sum(found["chosen"].values()) for found in summary["labels"].values()) == 12
    assert {label: found["items"] for label, found in summary["labels"].items()} == {"animal": 6, "plant": 6}
    assert sum(found["items"] for found in summary["calibration"].values()) == 12
    distance = sum(
        found["items"] * abs(found["accuracy"] - found["confidence"]) for found in summary["calibration"].values()
    )
    assert summary["calibration_error"] == pytest.approx(distance / 12)
    assert summary["perplexity"] == pytest.approx(2.718281828 ** summary["nll"])
    assert {"macro_f1", "option_stop_rate", "forgetting_nll", "forgetting_perplexity"} <= summary.keys()
    assert not {"exact_match", "general_accuracy"} & summary.keys()


def test_rows_without_labels_give_the_nll_of_their_own_answers_and_free_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [row(number, f" it lives in place {number}") for number in range(4)]
    section = evaluate_section(metric="exact_match", answers=Answers(max_new_tokens=3, max_rows=2))
    scores = evaluate_model(model, tokenizer, EvaluationPlan(rows, "none", (), (), section))
    assert [len(item.log_likelihoods) for item in scores.items] == [1] * 4
    assert [answer.item_id for answer in scores.answers] == [item.item_id for item in scores.items[:2]]
    summary = summarize(scores)
    assert {"nll", "exact_match", "f1", "rouge_l", "stop_rate"} <= summary.keys()
    assert not {"accuracy", "labels", "calibration"} & summary.keys()


def test_a_row_s_own_answer_as_the_only_option_is_no_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    scores = evaluate_model(model, tokenizer, EvaluationPlan(ROWS[:3], "none", (), (), evaluate_section()))
    with pytest.raises(EvaluationError, match="accuracy was not measured"):
        sample(scores, "accuracy")
    gate = gate_section("accuracy", "higher", "non-inferiority", margin=0.1, against="base", min_items=1)
    verdict = judge({"task": gate}, scores, {"base": scores})
    assert verdict.outcome == "fail"
    assert "could not run: accuracy was not measured" in verdict.gates[0].reason


@pytest.mark.parametrize("batch_tokens", [64, 256])
def test_no_forward_pass_has_more_tokens_than_the_pipeline_allows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int
) -> None:
    sizes: list[int] = []

    def look(module: object, args: object, given: dict[str, object]) -> None:
        sizes.append(given["input_ids"].numel())  # type: ignore[attr-defined]

    section = evaluate_section(
        metric="exact_match", batch_tokens=batch_tokens, answers=Answers(max_new_tokens=2, max_rows=4)
    )
    texts = [f"text number {number}" for number in range(40)]
    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        evaluate_model(model, tokenizer, EvaluationPlan(ROWS, "none", (), texts, section))
    finally:
        hook.remove()
    assert batch_tokens // 2 < max(sizes) <= batch_tokens


def test_an_empty_evaluation_set_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    for labels in (LABELS, ()):
        with pytest.raises(EvaluationError, match=r"the evaluation set is empty.*check data\.evaluation_rows"):
            evaluate_model(model, tokenizer, EvaluationPlan([], "none", labels, (), evaluate_section()))


def test_harness_tasks_are_scored_as_general_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness is replaced by what it gives: instances. With it installed, test_harness.py compares scores."""

    class Task:
        OUTPUT_TYPE, multiple_input, multiple_target = "multiple_choice", False, False

        def build_all_requests(self, limit: int) -> None:
            self.instances = [
                SimpleNamespace(doc_id=number, idx=index, doc=number, args=(f"Question {number}:", f" {choice}"))
                for number in range(min(limit, 5))
                for index, choice in enumerate(("yes", "no"))
            ]

        def doc_to_target(self, doc: int) -> int:
            return doc % 2

    asked: dict[str, object] = {}

    class TaskManager:
        def __init__(self, include_path: Path | None) -> None:
            asked["folder"] = include_path

        def load(self, names: list[str]) -> dict[str, dict[str, Task]]:
            asked["names"] = names
            return {"tasks": {name: Task() for name in names}}

    module = ModuleType("lm_eval.tasks")
    module.TaskManager = TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)
    section = evaluate_section(harness=Harness(tasks=("quiz",), folder="tasks", max_items=4))
    plan = EvaluationPlan(ROWS[:2], "none", LABELS, (), section, task_folder=Path("tasks"))
    scores = evaluate_model(model, tokenizer, plan)
    assert asked == {"folder": Path("tasks"), "names": ["quiz"]}
    assert [item.gold for item in scores.general] == [0, 1, 0, 1]
    assert summarize(scores)["general_accuracy"] == sum(item.correct for item in scores.general) / 4


ITEM = OptionItem("i", (1, 2), ((3,), (4, 5)), 0)
OTHERS: dict[str, Any] = {
    "template": of_json("other"),
    "labels": ("plant", "animal"),
    "items": [ITEM],
    "general": [ITEM],
    "texts": ["a text of general words", ""],
    "answers": [AnswerItem("a", (1,), ("x",))],
    "stop_ids": (),
    "max_new_tokens": 1,
    "batch_tokens": 64,
}


def test_the_digest_of_what_is_scored_depends_on_each_part(tokenizer: PreTrainedTokenizerBase) -> None:
    plan = EvaluationPlan(ROWS, "none", LABELS, ["a text of general words"], evaluate_section())
    prepared = prepare(tokenizer, plan)
    assert {field.name for field in fields(prepared)} == OTHERS.keys()
    digests = {replace(prepared, **{name: other}).digest() for name, other in OTHERS.items()}
    assert len({prepared.digest(), *digests}) == 1 + len(OTHERS)
    assert prepare(tokenizer, replace(plan, template="chatml")).digest() != prepared.digest()
    assert prepare(tokenizer, replace(plan, rows=ROWS[:-1])).digest() != prepared.digest()
    assert prepare(tokenizer, replace(plan, evaluate=evaluate_section(processes=3))).digest() == prepared.digest()


@pytest.mark.parametrize(
    "other",
    [
        replace(ITEM, item_id="j"),
        replace(ITEM, prompt_ids=(1, 3)),
        replace(ITEM, option_ids=((3,), (4, 6))),
        replace(ITEM, gold=1),
        replace(ITEM, ended=True),
    ],
)
def test_the_digest_of_what_is_scored_depends_on_every_field_of_an_item(
    tokenizer: PreTrainedTokenizerBase, other: OptionItem
) -> None:
    plan = EvaluationPlan(ROWS, "none", LABELS, (), evaluate_section())
    prepared = replace(prepare(tokenizer, plan), items=[ITEM])
    assert replace(prepared, items=[other]).digest() != prepared.digest()
    # The same items in another section are something else.
    assert replace(prepared, items=[ITEM, other]).digest() != replace(prepared, general=[other]).digest()
