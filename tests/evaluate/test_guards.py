import itertools
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from graftline.data.rows import Message, Row
from graftline.data.split import find_leaks
from graftline.errors import EvaluationError
from graftline.evaluate.guards import (
    folder_bytes,
    forbidden_answers,
    latency_numbers,
    leakage_numbers,
    parity_numbers,
    template_mismatches,
)
from graftline.evaluate.scores import AnswerScore
from graftline.merge.parity import ParityLimits, ParityReport


def row(prompt: str, answer: str = " animal", line: int = 1) -> Row:
    return Row((Message("user", prompt, supervised=False), Message("assistant", answer, supervised=True)), line)


def test_leaks_are_counted_by_kind_and_in_all() -> None:
    training = [row("a small animal that lives in water"), row("A tall plant with GREEN leaves", line=2)]
    evaluation = [training[0], row("a tall plant with green leaves"), row("a vehicle with four wheels")]
    assert leakage_numbers(find_leaks(training, evaluation)) == {
        "leaked_rows": 2.0,
        "leaked_rows_exact": 1.0,
        "leaked_rows_normalized": 1.0,
        "leaked_rows_near": 0.0,
    }


def test_serving_with_the_template_of_training_has_no_mismatch_and_with_another_every_row(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = [row("Definition: x"), row("Definition: y")]

    def mismatches(served: str) -> int:
        return template_mismatches(rows, tokenizer, tokenizer, template="chatml", served_template=served)

    assert mismatches("chatml") == 0
    assert mismatches("none") == 2


def test_a_served_tokenizer_whose_template_was_edited_is_noticed(tiny_llama: Path) -> None:
    trained, served = (AutoTokenizer.from_pretrained(tiny_llama) for _ in range(2))
    served.chat_template = "You are helpful." + served.chat_template
    rows = [row("Definition: x")]
    assert template_mismatches(rows, trained, served, template="tokenizer", served_template="tokenizer") == 1


def test_forbidden_answers_are_counted_once_each_in_any_case() -> None:
    answers = [
        AnswerScore(str(i), text, 0, 0, 0, 1, True) for i, text in enumerate(["My SSN is", "ssn password", "ok"])
    ]
    assert forbidden_answers(answers, ["ssn", r"pass\w+"]) == 2
    assert forbidden_answers(answers, []) == 0
    with pytest.raises(EvaluationError, match=r"'\(' is not a regular expression"):
        forbidden_answers(answers, ["("])


def test_a_folders_size_is_that_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"12345")
    (tmp_path / "y.bin").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 8
    with pytest.raises(EvaluationError, match="not a folder"):
        folder_bytes(tmp_path / "none")


class Clock:
    """A clock that the timed calls move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float):
        cycle = itertools.cycle(seconds)

        def run() -> None:
            self.now += next(cycle)

        return run


@pytest.mark.parametrize(
    ("answers", "change"), [((-0.00251, -0.00198), -0.00198), ((-0.001, 0.002), 0.002), ((0.01, 0.03), 0.03)]
)
def test_a_merged_model_s_answers_count_by_how_much_worse_they_may_be(
    answers: tuple[float, float], change: float
) -> None:
    """Better answers must not break a gate's limit, nor what happened to the prompts, which are no task."""
    report = ParityReport(
        num_sequences=100,
        num_tokens=5000,
        max_logit_difference=0.1,
        argmax_agreement=1.0,
        mean_kl=1e-6,
        nll_change=-0.2,
        nll_change_interval=(-0.3, -0.1),
        answer_nll_change=sum(answers) / 2,
        answer_nll_change_interval=answers,
        limits=ParityLimits(0.5, 0.985, 2e-5, 2.5e-3),
        failures=(),
    )

    assert parity_numbers(report)["merged_nll_change"] == change


def test_latency_is_a_median_and_a_ratio_with_limits() -> None:
    clock = Clock()
    numbers = latency_numbers(clock.work(1.1, 1.3), clock.work(1.0, 1.2), clock=clock)
    assert numbers["latency_seconds"] == pytest.approx(1.2)
    assert numbers["latency_ratio_low"] < 2.4 / 2.2 < numbers["latency_ratio"]
    assert numbers["latency_ratio"] < 1.11


def test_the_first_run_is_not_counted() -> None:
    clock = Clock()
    first = iter([100.0])

    def run() -> None:
        clock.now += next(first, 1.0)

    assert latency_numbers(run, clock=clock) == {"latency_seconds": pytest.approx(1.0)}


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(EvaluationError, match="at least 30"):
        latency_numbers(lambda: None, num_runs=5)
