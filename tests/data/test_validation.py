"""The whole validation: report, Data Docs, and the stop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftline.data.checks import ModelLimits
from graftline.data.rows import Message, Row
from graftline.data.template import encode
from graftline.data.validation import marked_text, validate
from graftline.errors import DataError
from tests.sections import check_section, data_section

SECTION = data_section(max_tokens=60, overlength="truncate", labels=("animal", "plant"))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def row(prompt: str, answer: str, line: int) -> Row:
    return Row((Message("user", prompt, False), Message("assistant", answer, True)), line)


TRAINING = [
    row("a small animal in water", " animal", 1),
    row("tall with green leaves", " plant", 2),
    row("barks", " animal", 4),
]
EVALUATION = [row("has feathers and flies", " animal", 1)]


def test_the_report_says_what_was_found_and_is_written_with_the_data_docs(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    report = validate(TRAINING, EVALUATION, tokenizer=tokenizer, data=SECTION, template="none", out=tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(report.as_json()))
    assert written["passed"] is True
    assert written["training"]["answers"] == {"animal": 2, "plant": 1}
    tokens = [len(encode(one, tokenizer, template="none").input_ids) for one in TRAINING]
    found = written["training"]["tokens"]
    assert (found["minimum"], found["maximum"], found["total"]) == (min(tokens), max(tokens), sum(tokens))
    assert sum(found["counts"]) == 3
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert written["sample"] == "a small animal in water⟦ animal<|im_end|>⟧"
    assert written["sample_parts"] == [["a small animal in water", False], [" animal<|im_end|>", True]]
    assert written["stop_ids"] == [2]
    assert (tmp_path / "data_docs" / "index.html").is_file()


def test_failing_checks_stop_the_line_after_the_report_is_written(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    training = [*TRAINING, row("a small animal in water", " animal", 6), row("x" * 80, " plant", 8)]
    evaluation = [row("BARKS", " animal", 1), row("unlike", " mineral", 2)]
    length = check_section("expect_column_value_lengths_to_be_between", {"column": "prompt", "max_value": 70})
    with pytest.raises(DataError) as error:
        validate(
            training,
            evaluation,
            tokenizer=tokenizer,
            data=SECTION.replace(checks=(length,)),
            template="none",
            out=tmp_path,
        )
    message = str(error.value)
    for expected in (
        "every row has supervised tokens (training): 1 of 5",
        "no row twice (training)",
        "[line 6]",
        "answers are labels (evaluation): 1 rows answer 'mineral'",
        "no evaluation row in training (evaluation): 1 of 2",
        "expect_column_value_lengths_to_be_between",
        "[line 8]",
        "report.json",
        "index.html",
    ):
        assert expected in message
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is False
    assert report["training"]["truncated_lines"] == [8]
    assert "not passed" not in message
    page = next((tmp_path / "data_docs" / "validations").rglob("rows-training.html")).read_text()
    assert "Failed" in page


def test_warnings_do_not_stop_the_line(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    long = row("green", " plant " + "and so on " * 20, 9)
    report = validate(
        [*TRAINING, long], [], tokenizer=tokenizer, data=SECTION.replace(labels=None), template="none", out=tmp_path
    )
    assert report.passed
    assert [check.name for check in report.checks if not check.passed] == ["no row is too long"]
    assert report.evaluation.tokens is None


def test_no_training_rows_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training rows"):
        validate([], EVALUATION, tokenizer=tokenizer, data=SECTION, template="none", out=tmp_path)


def test_a_row_that_cannot_be_encoded_is_named_with_its_side(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    evaluation = [*EVALUATION, row("x" * 80, " plant", 3)]
    strict = SECTION.replace(overlength="error", max_tokens=40)
    with pytest.raises(DataError, match=r"evaluation rows: 1 of 2 rows have more than 40 tokens .*: line 3"):
        validate(
            TRAINING,
            evaluation,
            tokenizer=tokenizer,
            data=strict,
            template="none",
            out=tmp_path,
        )


def test_a_conversation_is_shown_with_marks_around_each_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = (*row("Q1", "A1", 1).messages, *row("Q2", "A2", 1).messages)
    text = marked_text(encode(Row(messages, 1), tokenizer, template="chatml"), tokenizer)
    assert text == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧"
    )


def pair(prompt: str, chosen: str, rejected: str, line: int) -> Row:
    return replace(row(prompt, chosen, line), rejected=rejected)


def test_a_rejected_answer_must_fit_as_a_chosen_one_does(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    long = " animal" * 30
    training = [pair("barks", " animal", " plant", 1), pair("has leaves", " plant", long, 2)]
    evaluation = [pair("has feathers and flies", " animal", long, 1)]

    def check(**given: Any) -> None:
        section = data_section(max_tokens=given.pop("max_tokens"), overlength="error")
        validate(training, evaluation, tokenizer=tokenizer, data=section, template="none", out=tmp_path, **given)

    with pytest.raises(DataError) as error:
        check(max_tokens=20)
    assert "training rows, rejected answers: " in str(error.value)
    assert "evaluation rows, rejected answers: " in str(error.value)
    limits = ModelLimits(num_tokens=len(tokenizer), num_positions=20)
    with pytest.raises(DataError) as error:
        check(max_tokens=500, limits=limits)
    name = "every row fits the model's positions: rejected answers"
    assert f"{name} (training): 1 rows need up to " in str(error.value)
    assert f"{name} (evaluation): 1 rows need up to " in str(error.value)
    assert "[line 2]" in str(error.value)
    check(max_tokens=500, limits=replace(limits, num_positions=500))
