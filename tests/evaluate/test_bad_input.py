"""What an evaluation refuses, word for word: what was given, what was expected, what to do."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftline.data.rows import Message, Row
from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.gates import judge
from graftline.evaluate.items import completion_items, option_items
from graftline.evaluate.scores import ItemScore, Scores, read_scores, require_comparable, write_scores
from tests.sections import gate_section

LABELS = ("cat", "dog")
GATE = gate_section("accuracy", "higher", "non-inferiority", margin=0.02, against="production")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def row(line: int, answer: str) -> Row:
    messages = (Message("user", f"row {line}:", supervised=False), Message("assistant", answer, supervised=True))
    return Row(messages, line)


def scores(count: int, *, template: str = "none") -> Scores:
    items = tuple(ItemScore(f"i{number}", (-1.0, -2.0), 0, 0, True, 1.0, 1, True) for number in range(count))
    return Scores(of_json(template), LABELS, items)


def refusal(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(EvaluationError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return str(caught.value)


def test_an_empty_evaluation_set(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = "the evaluation set is empty; at least one row is needed: check data.evaluation_rows"
    assert refusal(option_items, [], tokenizer, template="none", labels=LABELS) == expected
    assert refusal(completion_items, [], tokenizer, template="none") == expected


def test_a_label_that_is_not_declared(tokenizer: PreTrainedTokenizerBase) -> None:
    assert refusal(option_items, [row(1, " cat"), row(7, " bird")], tokenizer, template="none", labels=LABELS) == (
        "line 7: the answer is 'bird' by assistant; expected one of cat, dog: correct the row or add the label to "
        "data.labels"
    )


def test_scores_missing_for_some_items() -> None:
    message = refusal(require_comparable, scores(5), scores(3), "items")
    assert re.sub(r"sha256:\w+", "…", message) == (
        "the candidate was scored on items … (5), the reference on … (3): 2 missing in the reference, such as i3, i4; "
        "a paired comparison needs the same items: score both on one evaluation set"
    )


def test_a_scores_file_that_lost_lines(tmp_path: Path) -> None:
    path = tmp_path / "candidate.jsonl"
    write_scores(path, scores(5))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert re.sub(r"sha256:\w+", "…", refusal(read_scores, path)) == (
        f"the scores {path} hold 3 items (…), its header says 5 (…); the file was cut or edited: evaluate again"
    )


def test_a_value_missing_for_some_items() -> None:
    items = scores(200).items
    half = replace(scores(0), items=(*items[:-1], replace(items[-1], stop=None)))
    rule = gate_section("option_stop_rate", "higher", "limit", limit=0.9)
    (gate,) = judge({"stops": rule}, half, {}).gates
    assert (gate.outcome, gate.reason) == (
        "fail",
        "could not run: option_stop_rate was not measured (items: 1 of 200 items have none, such as i199); evaluate "
        "it, or drop the gate",
    )


def test_a_version_with_another_template() -> None:
    (gate,) = judge({"task": GATE}, scores(200), {"production": scores(200, template="chatml")}).gates
    assert gate.outcome == "fail"
    assert re.sub(r"sha256:\w+", "…", gate.reason) == (
        "could not run: the candidate was scored with template …, the reference with …; scores of two templates cannot "
        "be compared: score the reference again with the candidate's template"
    )


def test_a_version_with_other_items() -> None:
    other = replace(scores(0), items=tuple(replace(item, item_id=f"x{item.item_id}") for item in scores(200).items))
    (gate,) = judge({"task": GATE}, scores(200), {"production": other}).gates
    assert gate.outcome == "fail"
    assert re.sub(r"sha256:\w+", "…", gate.reason) == (
        "could not run: the candidate was scored on items … (200), the reference on … (200): 200 missing in the "
        "reference, such as i0, i1, i10; 200 missing in the candidate, such as xi0, xi1, xi10; a paired comparison "
        "needs the same items: score both on one evaluation set"
    )


def test_a_version_that_was_not_scored() -> None:
    (gate,) = judge({"task": GATE}, scores(200), {"base": scores(200)}).gates
    assert (gate.outcome, gate.reason) == (
        "fail",
        "could not run: there are no scores of 'production' to compare with; there is base",
    )
