import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.scores import (
    AnswerScore,
    DocumentScore,
    ItemScore,
    Scores,
    read_scores,
    require_comparable,
    write_scores,
)
from graftline.evaluate.verdict import DIGESTS, ScoredInputs, ScoredRelease

SCORES = Scores(
    template=of_json("chatml"),
    labels=("animal", "plant"),
    items=(
        ItemScore("a", (-1.0, -2.5), 0, 0, True, 1.0, 1, True),
        ItemScore("b", (-0.5, -0.75), 0, 1, False, 0.75, 2, None),
    ),
    general=(ItemScore("task-1", (-3.0, -1.5, -2.0), 1, 1, True, 1.5, 4),),
    documents=(DocumentScore("d", 12.5, 10),),
    answers=(AnswerScore("q", "ein Tier – 動物", 0.0, 0.5, 0.25, 4, False),),
    numbers={"leaked_rows": 0.0, "package_bytes": 1e6},
)


def test_scores_read_back_are_those_written_byte_for_byte(tmp_path: Path) -> None:
    digest = write_scores(tmp_path / "scores.jsonl", SCORES)
    assert read_scores(tmp_path / "scores.jsonl") == SCORES
    assert write_scores(tmp_path / "again.jsonl", SCORES) == digest


SCORED = ScoredInputs(
    base=of_json("base"),
    base_files=of_json("config"),
    tokenizer=of_json("tokenizer"),
    adapter=None,
    rows=of_json("rows"),
    texts=of_json("texts"),
    release=ScoredRelease("20261124T061800Z-0123456789ab", of_json("manifest")),
)


@pytest.mark.parametrize("scored", [SCORED, replace(SCORED, adapter=of_json("adapter"), release=None)])
def test_scores_say_which_bytes_were_scored(tmp_path: Path, scored: ScoredInputs) -> None:
    scores = replace(SCORES, scored=scored)
    write_scores(tmp_path / "scores.jsonl", scores)
    assert read_scores(tmp_path / "scores.jsonl") == scores
    header = json.loads((tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert header["format"] == 2
    assert header["scored"]["rows"] == str(scored.rows)


@pytest.mark.parametrize("name", [*DIGESTS, "release"])
def test_scores_that_leave_out_a_digest_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "scores.jsonl"
    write_scores(path, replace(SCORES, scored=SCORED))
    header, _, lines = path.read_text(encoding="utf-8").partition("\n")
    record = json.loads(header)
    del record["scored"][name]
    path.write_text(json.dumps(record) + "\n" + lines, encoding="utf-8")
    with pytest.raises(EvaluationError, match="header of the scores"):
        read_scores(path)


def test_a_number_of_the_header_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    write_scores(path, SCORES)
    header, _, lines = path.read_text(encoding="utf-8").partition("\n")
    record = json.loads(header) | {"numbers": {"leaked_rows": 10**400}}
    path.write_text(json.dumps(record) + "\n" + lines, encoding="utf-8")
    with pytest.raises(EvaluationError, match="header of the scores"):
        read_scores(path)


def test_a_number_that_was_changed_by_hand_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    write_scores(path, replace(SCORES, scored=SCORED))
    text = path.read_text(encoding="utf-8")
    assert '"nll":12.5' in text
    path.write_text(text.replace('"nll":12.5', '"nll":1.5'), encoding="utf-8")
    with pytest.raises(EvaluationError, match="are not those that were written"):
        read_scores(path)


def test_an_answer_may_hold_unicode_s_own_line_ends(tmp_path: Path) -> None:
    answer = replace(SCORES.answers[0], answer="two\u2028lines\x85and a third")
    write_scores(tmp_path / "scores.jsonl", replace(SCORES, answers=(answer,)))
    assert read_scores(tmp_path / "scores.jsonl").answers == (answer,)


def test_the_item_set_does_not_depend_on_order_but_on_ids_gold_and_labels() -> None:
    first = SCORES.item_set("items")
    assert replace(SCORES, items=SCORES.items[::-1]).item_set("items") == first
    assert replace(SCORES, labels=("animal", "tree")).item_set("items") != first
    assert replace(SCORES, items=SCORES.items[:1]).item_set("items") != first
    assert replace(SCORES, items=(SCORES.items[0], replace(SCORES.items[1], gold=0))).item_set("items") != first


def test_scores_of_another_template_are_refused_with_both_digests_named() -> None:
    other = replace(SCORES, template=of_json("none"))
    with pytest.raises(EvaluationError, match=rf"{SCORES.template}.*{other.template}"):
        require_comparable(SCORES, other, "items")
    require_comparable(SCORES, other, "documents")
    require_comparable(SCORES, other, "general")


def test_scores_of_other_items_are_refused_with_both_digests_and_the_missing_ids() -> None:
    other = replace(SCORES, items=SCORES.items[:1])
    with pytest.raises(
        EvaluationError, match=rf"{SCORES.item_set('items')} \(2\).*{other.item_set('items')}.*such as b"
    ):
        require_comparable(SCORES, other, "items")
    with pytest.raises(EvaluationError, match="gold answers or labels differ"):
        require_comparable(SCORES, replace(SCORES, labels=("x", "y")), "items")


def test_an_item_scored_twice_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="item a appears twice"):
        write_scores(tmp_path / "s.jsonl", replace(SCORES, items=(SCORES.items[0],) * 2))
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    bad = replace(SCORES, documents=(DocumentScore("d", float("nan"), 10),))
    with pytest.raises(EvaluationError, match="d hold a number that is not finite"):
        write_scores(tmp_path / "s.jsonl", bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:-1], "hold 0 answers .*header says 1"),
        (lambda lines: [*lines, lines[1]], "item a appears twice"),
        (lambda lines: [lines[0], lines[1].replace('"item_id":"a"', '"item_id":"z"'), *lines[2:]], "cut or edited"),
        (lambda lines: [lines[0], lines[1].replace("-1.0", "NaN"), *lines[2:]], "line 2 .*not finite"),
        (lambda lines: [lines[0], lines[1][:20], *lines[2:]], "line 2 .*not JSON"),
        (lambda lines: [lines[0], lines[1].replace('"chosen":0', '"chosen":7'), *lines[2:]], "chosen 7"),
        (lambda lines: [lines[0], lines[1].replace("true", "false", 1), *lines[2:]], "correct False"),
        (lambda lines: [lines[0], lines[1].replace('"num_tokens":1', '"num_tokens":0'), *lines[2:]], "0 tokens"),
        (lambda lines: [lines[0], lines[1].replace('"item_id":"a"', '"item_id":3'), *lines[2:]], "item_id 3"),
        (lambda lines: [lines[0], lines[1].replace("[-1.0,-2.5]", "null"), *lines[2:]], "line 2 .*not a score"),
        (lambda lines: [lines[0], "[]", *lines[2:]], "line 2 .*list"),
        (lambda lines: [lines[0], lines[1].replace('"nll"', '"loss"'), *lines[2:]], "line 2 .*not a score"),
        (lambda lines: [lines[0], lines[1].replace('"items"', '"x"'), *lines[2:]], "section 'x'"),
        (lambda lines: [lines[0].replace('"format":1', '"format":9'), *lines[1:]], "format 9"),
        (lambda lines: [lines[0].replace("sha256:", "md5:"), *lines[1:]], "header"),
        (lambda lines: ["{}"], "format None"),
        (lambda lines: [], "empty"),
    ],
)
def test_damaged_score_files_are_refused(tmp_path: Path, edit, message: str) -> None:
    path = tmp_path / "s.jsonl"
    write_scores(path, SCORES)
    path.write_text("\n".join(edit(path.read_text().splitlines())))
    with pytest.raises(EvaluationError, match=message):
        read_scores(path)


def test_a_missing_score_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"cannot read the scores .*gone.jsonl"):
        read_scores(tmp_path / "gone.jsonl")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2000), st.binary(min_size=0, max_size=6))
def test_a_file_with_any_bytes_overwritten_is_read_right_or_refused(tmp_path: Path, place: int, junk: bytes) -> None:
    path = tmp_path / "s.jsonl"
    write_scores(path, SCORES)
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] + junk + data[place + len(junk) :])
    try:
        scores = read_scores(path)
    except EvaluationError:
        return
    assert all(
        scores.item_set(section) == SCORES.item_set(section) for section in ("items", "general", "documents", "answers")
    )
