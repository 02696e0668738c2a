"""What a project measures by itself: functions, JSON, a judge, labels of equal prior; and gates on them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from graftline.data.rows import Row, rows_from_objects
from graftline.errors import DataError, EvaluationError
from graftline.evaluate.gates import judge
from graftline.evaluate.metrics import summarize
from graftline.evaluate.own import OwnMetrics, scores_of, with_label_prior
from graftline.evaluate.scores import AnswerScore, ItemScore, Scores, item_id, read_scores, write_scores
from graftline.settings import AnswerJudge, Answers
from tests.evaluate.test_gates import TEMPLATE
from tests.sections import evaluate_section, gate_section

NUM_ROWS = 120


def rows(number: int = NUM_ROWS) -> list[Row]:
    return rows_from_objects(
        [{"prompt": f"question {at}", "completion": json.dumps({"n": at})} for at in range(number)], origin="test"
    )


def scored(answers: list[str]) -> Scores:
    found = [
        AnswerScore(item_id(row), text, 0.0, 0.0, 0.0, 1, stop=True)
        for row, text in zip(rows(len(answers)), answers, strict=True)
    ]
    return Scores(TEMPLATE, answers=tuple(found))


def own(root: Path, *, digests: dict[str, str] | None = None, **answers: Any) -> OwnMetrics:
    section = evaluate_section(metric="f1", answers=Answers(max_new_tokens=4, **answers))
    return OwnMetrics(section=section, root=root, cache=root / "cache", digests=digests or {})


def script(folder: Path, code: str) -> Path:
    path = folder / "tone.py"
    path.write_text(code, encoding="utf-8")
    return path


def test_a_function_scores_each_answer_beside_its_row(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "from helper import longer\n\n\ndef score(rows, answers):\n"
        "    return [longer(row['prompt'], answer) for row, answer in zip(rows, answers, strict=True)]\n",
    )
    (tmp_path / "helper.py").write_text("def longer(a, b):\n    return len(b) > len(a)\n")
    assert scores_of(path, rows(2), ["a" * 20, "b"]) == [1.0, 0.0]


def test_a_function_sees_turns_and_completion(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "def score(rows, answers):\n    (row,) = rows\n    assert row['completion'] == row['messages'][-1]['content']\n"
        "    assert row['tools'] == []\n    yield 0.25\n",
    )
    assert scores_of(path, rows(1), ["x"]) == [0.25]


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ("[1.0]", "returned 1 numbers for 2 answers"),
        ("[1, 2, 3]", "returned 3 numbers for 2 answers"),
        ("[1.0, None]", "returned None; expected a finite number"),
        ("[1.0, '1']", "returned '1'; expected a finite number"),
        ("[1.0, float('nan')]", "returned nan; expected a finite number"),
        ("[1.0, float('inf')]", "returned inf; expected a finite number"),
        ("[1.0, [2.0]]", r"returned \[2.0\]; expected a finite number"),
        ("None", "returned NoneType"),
        ("0.5", "returned float"),
    ],
)
def test_what_is_not_a_number_for_each_answer_is_refused(tmp_path: Path, returned: str, problem: str) -> None:
    path = script(tmp_path, f"def score(rows, answers):\n    return {returned}\n")
    with pytest.raises((EvaluationError, DataError), match=problem):
        scores_of(path, rows(2), ["a", "b"])


def test_a_function_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    path = script(tmp_path, "def score(rows, answers):\n    return [1 / 0 for _ in rows]\n")
    with pytest.raises(DataError, match=r"tone\.py, line 2: score\(\) failed: ZeroDivisionError"):
        scores_of(path, rows(2), ["a", "b"])


def test_own_metrics_are_summarized_written_and_read_again(tmp_path: Path) -> None:
    script(tmp_path, "def score(rows, answers):\n    return [len(answer) for answer in answers]\n")
    (tmp_path / "schema.json").write_text("{}")
    measured = own(tmp_path, digests={"tone": "d"}, scores={"tone": "tone.py"}, json_schema="schema.json")
    found = measured.add(scored(['{"n": 0}', "no"]), rows(2))
    summary = summarize(found)
    assert (summary["tone"], summary["json_valid"], summary["field_recall"]) == (5.0, 0.5, 0.5)
    path = tmp_path / "scores.jsonl"
    write_scores(path, found)
    assert read_scores(path) == found
    # Measured anew, not added to.
    assert measured.add(found, rows(2)) == found


def test_scores_without_own_metrics_are_written_as_before(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.jsonl", scored(["a"]))
    text = (tmp_path / "scores.jsonl").read_text()
    assert "own" not in text
    assert "measured_by" not in text


def pair(root: Path, ours: list[str], theirs: list[str], **answers: Any) -> tuple[Scores, Scores]:
    measured = own(root, **answers)
    return measured.add(scored(ours), rows(len(ours))), measured.add(scored(theirs), rows(len(theirs)))


def test_a_gate_compares_own_metrics_row_by_row(tmp_path: Path) -> None:
    script(tmp_path, "def score(rows, answers):\n    return [float(answer) for answer in answers]\n")
    ours, theirs = pair(
        tmp_path, [f"{at % 7 + 2}" for at in range(NUM_ROWS)], [f"{at % 7 + (at % 3 > 0)}" for at in range(NUM_ROWS)],
        scores={"tone": "tone.py"},
    )  # fmt: skip
    rule = gate_section("tone", "higher", "superiority", margin=1.0, against="production")
    gate = judge({"tone": rule}, ours, {"production": theirs}).gates[0]
    assert (gate.outcome, gate.num_items) == ("pass", NUM_ROWS)
    assert gate.difference == pytest.approx(4 / 3)


def test_right_or_wrong_of_an_own_metric_is_compared_as_a_rate(tmp_path: Path) -> None:
    script(tmp_path, "def score(rows, answers):\n    return [answer == 'yes' for answer in answers]\n")
    ours, theirs = pair(tmp_path, ["yes"] * NUM_ROWS, ["yes"] * 80 + ["no"] * 40, scores={"yes": "tone.py"})
    rule = gate_section("yes", "higher", "superiority", margin=0.0, against="production")
    gate = judge({"yes": rule}, ours, {"production": theirs}).gates[0]
    assert gate.outcome == "pass"
    assert gate.method is not None
    assert "bootstrap" not in gate.method


def test_scores_of_two_versions_of_a_function_are_not_compared(tmp_path: Path) -> None:
    script(tmp_path, "def score(rows, answers):\n    return [1.0] * len(answers)\n")
    ours, theirs = pair(tmp_path, ["a"] * NUM_ROWS, ["a"] * NUM_ROWS, scores={"tone": "tone.py"})
    rule = gate_section("tone", "higher", "non-inferiority", margin=0.1, against="production")
    changed = replace(ours, measured_by={"tone": "sha256:1"})
    gate = judge({"tone": rule}, changed, {"production": theirs}).gates[0]
    assert gate.outcome == "fail"
    assert "tone was measured by sha256:1 for the candidate" in gate.reason


# Labels of equal prior.


def items(*pairs: tuple[float, float]) -> Scores:
    found = [
        ItemScore(f"i{at}", pair, int(pair[1] > pair[0]), at % 2, int(pair[1] > pair[0]) == at % 2, 1.0, 1)
        for at, pair in enumerate(pairs)
    ]
    return Scores(TEMPLATE, ("a", "b"), tuple(found))


def test_a_favoured_label_is_chosen_only_where_its_prompt_asks_for_it() -> None:
    # The model says "a" everywhere; behind each second prompt a little less surely.
    biased = items((-0.1, -3.0), (-0.5, -1.0), (-0.1, -3.0), (-0.5, -1.0))
    assert [item.correct for item in biased.items] == [True, False, True, False]
    even = with_label_prior(biased, uniform=True)
    assert [item.correct for item in even.items] == [True, True, True, True]
    assert [item.log_likelihoods for item in even.items] == [item.log_likelihoods for item in biased.items]


def test_labels_are_chosen_anew_where_the_setting_is_off_again(tmp_path: Path) -> None:
    biased = items((-0.1, -3.0), (-0.5, -1.0))
    section = evaluate_section(uniform_labels=True)
    measured = OwnMetrics(section=section, root=tmp_path, cache=tmp_path, digests={}).add(biased, [])
    assert [item.chosen for item in measured.items] == [0, 1]
    plain = OwnMetrics(section=evaluate_section(), root=tmp_path, cache=tmp_path, digests={})
    assert plain.add(measured, []) == biased


# A judge.


@contextmanager
def serving(decide: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible address whose model says what ``decide`` says of the texts."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            reply = decide(body["messages"][-1]["content"])
            data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(200 if reply is not None else 401)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def longest(texts: str) -> str:
    """A fair judge: the longer answer is better."""
    first, second = texts.split("<A>\n")[1].split("\n</A>")[0], texts.split("<B>\n")[1].split("\n</B>")[0]
    if len(first) == len(second):
        return "<think>A or B?</think>\nTie."
    return "A" if len(first) > len(second) else "Answer B"


def judge_section(root: Path, address: str, **more: Any) -> AnswerJudge:
    (root / "rubric.md").write_text("The longer answer is better.", encoding="utf-8")
    return AnswerJudge(address=address, model="judge-1", rubric="rubric.md", **more)


def test_a_judge_is_asked_in_both_positions_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTLINE_JUDGE_KEY", "secret")
    with serving(longest) as (address, seen):
        measured = own(tmp_path, judge=judge_section(tmp_path, address))
        answers = ["longer than expected", "x", '{"n": 9}', '{"n": 3}']
        found = measured.add(scored(answers), rows(4))
        assert [answer.own["judge"] for answer in found.answers] == [1.0, 0.0, 0.5, 0.5]
        assert len(seen) == 6  # what is written alike is not asked
        assert seen[0]["path"] == "/v1/chat/completions"
        assert (seen[0]["key"], seen[0]["temperature"], seen[0]["model"]) == ("Bearer secret", 0, "judge-1")
        assert "The longer answer is better." in seen[0]["messages"][0]["content"]
        assert measured.add(scored(answers), rows(4)) == found
        assert len(seen) == 6
        assert "secret" not in "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))


def test_a_judge_that_favours_a_position_finds_everything_alike(tmp_path: Path) -> None:
    with serving(lambda texts: "A") as (address, _):
        found = own(tmp_path, judge=judge_section(tmp_path, address)).add(scored(["a", "b"]), rows(2))
    assert [answer.own["judge"] for answer in found.answers] == [0.5, 0.5]


def human_labels(folder: Path, right: int, wrong: int) -> str:
    labels = [
        {"prompt": f"p{at}", "first": "long one", "second": "short", "better": "first" if at < right else "second"}
        for at in range(right + wrong)
    ]
    (folder / "people.jsonl").write_text("\n".join(map(json.dumps, labels)) + "\n", encoding="utf-8")
    return "people.jsonl"


@pytest.mark.parametrize(
    ("right", "wrong", "outcome"), [(38, 2, "pass"), (24, 16, "inconclusive"), (4, 0, "inconclusive")]
)
def test_a_judge_gates_only_if_it_is_shown_to_agree_with_people(
    tmp_path: Path, right: int, wrong: int, outcome: str
) -> None:
    with serving(longest) as (address, _):
        section = judge_section(tmp_path, address, human_labels=human_labels(tmp_path, right, wrong))
        measured = own(tmp_path, judge=section)
        ours = measured.add(scored(["longer than expected"] * NUM_ROWS), rows())
        theirs = measured.add(scored(["short"] * NUM_ROWS), rows())
        ours = replace(ours, numbers=measured.judge_numbers())
    assert ours.numbers["judge_agreement"] == right / (right + wrong)
    rule = gate_section("judge", "higher", "superiority", margin=0.1, against="production")
    gate = judge({"judge": rule}, ours, {"production": theirs}).gates[0]
    assert gate.outcome == outcome
    assert ("is reported and decides nothing" in gate.reason) == (outcome == "inconclusive")


def test_a_judge_whose_agreement_was_not_measured_fails_its_gate(tmp_path: Path) -> None:
    with serving(longest) as (address, _):
        ours = own(tmp_path, judge=judge_section(tmp_path, address)).add(scored(["longer than expected"]), rows(1))
    rule = gate_section("judge", "higher", "limit", limit=0.1)
    assert judge({"judge": rule}, ours, {}).gates[0].outcome == "fail"


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ("B.", "A", 0.0),
        ("Answer B", "A is better", 0.0),
        ("B seems better", "**A**, by far", 0.0),
        ("B", "A tie.", 0.5),
    ],
)
def test_a_reply_is_read_by_its_first_word(tmp_path: Path, first: str, second: str, value: float) -> None:
    with serving(lambda texts: first if "<A>\nours" in texts else second) as (address, _):
        found = own(tmp_path, judge=judge_section(tmp_path, address)).add(scored(["ours"]), rows(1))
    assert found.answers[0].own["judge"] == value


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("I cannot say.", r"replied 'I cannot say\.'; expected A, B or tie"),
        ("A better answer would be B.", r"replied 'A better answer would be B\.'; expected"),
        (None, "cannot be asked: .*401"),
    ],
)
def test_a_judge_that_does_not_decide_stops_the_evaluation(tmp_path: Path, reply: str | None, problem: str) -> None:
    with serving(lambda texts: reply) as (address, _):
        measured = own(tmp_path, judge=judge_section(tmp_path, address))
        with pytest.raises(EvaluationError, match=problem):
            measured.add(scored(["a"]), rows(1))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "are empty"),
        ("{", "line 1: "),
        ('{"prompt": "p", "first": "a", "second": "b"}', "line 1: KeyError"),
        ('{"prompt": "p", "first": "a", "second": "b", "better": "a"}', "line 1: .*better 'a'"),
        ('{"prompt": 1, "first": "a", "second": "b", "better": "tie"}', "line 1: texts"),
        ("[]", "line 1: "),
    ],
)
def test_human_labels_that_cannot_be_read_are_named_with_their_line(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "people.jsonl").write_text(line, encoding="utf-8")
    section = judge_section(tmp_path, "http://127.0.0.1:9/v1", human_labels="people.jsonl")
    with pytest.raises(EvaluationError, match=problem):
        own(tmp_path, judge=section).judge_numbers()
