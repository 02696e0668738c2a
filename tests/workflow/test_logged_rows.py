"""Rows of a request log: reviewed answers only, each once, in a file that a pipeline reads as it is."""

import csv
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graftline.cli.application import app
from graftline.data.rows import read_rows
from graftline.errors import ConfigError, DataError
from graftline.registry.file_store import FileStore
from graftline.registry.request_log import LoggedRating, LoggedRequest, LogPlace
from graftline.settings import Base
from graftline.workflow.logged_rows import COLUMNS, Made, make_rows, read_reviews, write_logged, write_review
from tests.settings.documents import changed

PLAIN = Base(source="path:base", template="none")
CHAT = Base(source="path:base", template="tokenizer")
NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def place(tmp_path: Path) -> LogPlace:
    return LogPlace(FileStore(tmp_path / "log"), "demo", "production", retention_days=30)


def request(number: int, text: str = "a tall plant", said: str = "tree", **given: Any) -> LoggedRequest:
    values: dict[str, Any] = {
        "id": f"chatcmpl-{number}",
        "time": NOW + timedelta(seconds=number),
        "model": "demo@production",
        "release": "demo@v1",
        "digest": "sha256:" + "0" * 64,
        "key": f"{number:064x}",
        "messages": [{"role": "user", "content": text}],
        "prompt": None,
        "tools": [],
        "answer": {"role": "assistant", "content": said},
        "ended": "answered",
        "finish_reason": "stop",
        "seconds": 0.5,
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "removed_from_prompt": 0,
        "removed_from_answer": 0,
    }
    return LoggedRequest(**values | given)


def rating(number: int, value: Any, *, after: int = 0) -> LoggedRating:
    return LoggedRating(id=f"chatcmpl-{number}", time=NOW + timedelta(hours=1, seconds=after), rating=value)


def log(place: LogPlace, *logged: LoggedRequest | LoggedRating) -> None:
    data = "".join(one.model_dump_json() + "\n" for one in logged)
    place.store.put_bytes(place.part_key("server", len(place.store.list("requests")), NOW), data.encode())


def reviewed(place: LogPlace, file: Path, marks: dict[str, tuple[str, str]]) -> Path:
    """The file that a person gives back: verdict and correction by id, the rest as it was written."""
    write_review(place, file, limit=100)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = list(csv.DictReader(stream))
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for line in lines:
            verdict, correction = marks.get(line["id"], ("", ""))
            writer.writerow(line | {"verdict": verdict, "correction": correction})
    return file


def made(
    place: LogPlace, file: Path, marks: dict[str, tuple[str, str]], base: Base = CHAT, *, rated: bool = False
) -> Made:
    return make_rows(place, read_reviews([reviewed(place, file, marks)]), base, rated=rated)


def why(made: Made) -> dict[str, int]:
    return {reason: number for reason, number in made.left_out.items() if number}


def test_what_a_reviewer_calls_good_or_corrects_becomes_a_row_and_nothing_else(place: LogPlace, tmp_path: Path) -> None:
    log(place, request(1), request(2, "a pet", "plant"), request(3, "a fish", "tree"), request(4, "a bird", "bird"))
    log(place, rating(4, "good"))
    marks = {"chatcmpl-1": ("Good ", ""), "chatcmpl-2": ("", " dog"), "chatcmpl-3": ("bad", "")}
    found = made(place, tmp_path / "review.csv", marks)
    assert [(row.prompt, row.answer) for row, _ in found.rows] == [("a tall plant", "tree"), ("a pet", " dog")]
    assert [about["log_review"] for _, about in found.rows] == ["review", "correction"]
    assert why(found) == {"bad": 1}
    with_ratings = made(place, tmp_path / "again.csv", marks, rated=True)
    assert [row.answer for row, _ in with_ratings.rows] == ["tree", " dog", "bird"]


def test_the_file_is_read_as_rows_with_their_provenance_and_one_format(place: LogPlace, tmp_path: Path) -> None:
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "nobody reviewed this"},
        {"role": "user", "content": "and a pet?"},
    ]
    log(place, request(1), request(2, messages=conversation))
    found = made(place, tmp_path / "a.csv", {"chatcmpl-1": ("good", "")})
    write_logged(tmp_path / "plain.jsonl", found)
    [line] = (tmp_path / "plain.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "prompt": "a tall plant",
        "completion": "tree",
        "log_id": "chatcmpl-1",
        "log_key": f"{1:064x}",
        "log_release": "demo@v1",
        "log_time": (NOW + timedelta(seconds=1)).isoformat(),
        "log_review": "review",
    }
    found = made(place, tmp_path / "b.csv", {"chatcmpl-1": ("good", ""), "chatcmpl-2": ("good", "")})
    write_logged(tmp_path / "chat.jsonl", found)
    one, two = read_rows(tmp_path / "chat.jsonl")
    assert (one.prompt, one.answer) == ("a tall plant", "tree")
    assert [turn.supervised for turn in two.messages] == [False, False, False, False, True]
    with pytest.raises(DataError, match="exists"):
        write_logged(tmp_path / "chat.jsonl", found)


def test_tools_and_calls_survive_the_way_to_a_row(place: LogPlace, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    answer = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    log(place, request(1, tools=tools, answer=answer, finish_reason="tool_calls"))
    write_logged(tmp_path / "rows.jsonl", made(place, tmp_path / "a.csv", {"chatcmpl-1": ("good", "")}))
    [row] = read_rows(tmp_path / "rows.jsonl")
    assert list(row.tools) == tools
    assert row.messages[-1].fields["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert row.messages[-1].fields["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("base", "given", "reason"),
    [
        (CHAT, {"finish_reason": "length"}, "cut at its length"),
        (CHAT, {"ended": "left", "finish_reason": None}, "not answered to the end"),
        (CHAT, {"removed_from_answer": 1}, "with removed text in the answer"),
        (CHAT, {"messages": None, "prompt": "x"}, "a plain completion, which the template would enclose"),
        (PLAIN, {"messages": None, "prompt": "x"}, None),
        (CHAT, {"removed_from_prompt": 1}, None),
        (CHAT, {"answer": {"role": "assistant", "content": ""}}, "no row"),
    ],
)
def test_an_answer_that_would_teach_something_wrong_is_left_out(
    place: LogPlace, base: Base, given: dict[str, Any], reason: str | None
) -> None:
    log(place, request(1, **given), rating(1, "good"))
    found = make_rows(place, {}, base, rated=True)
    assert len(found.rows) == (reason is None)
    assert all(told.startswith(reason or "") for told in why(found))
    assert bool(why(found)) == (reason is not None)


def test_the_same_answer_becomes_one_row_and_what_is_called_good_and_bad_none(place: LogPlace) -> None:
    log(place, request(1), request(2), request(3, "a pet", "tree"), request(4, "a pet", "tree"), request(5, "x", "y"))
    log(place, *(rating(number, "good") for number in (1, 2, 3, 5)), rating(4, "bad"), rating(5, "bad", after=1))
    found = make_rows(place, {}, CHAT, rated=True)
    assert [about["log_id"] for _, about in found.rows] == ["chatcmpl-1"]
    assert why(found) == {"the same as another": 1, "called good and bad": 1, "bad": 2}
    with pytest.raises(DataError, match=r"no reviewed answer can become a row \(none was reviewed\)"):
        write_logged(Path("never.jsonl"), make_rows(place, {}, CHAT, rated=False))


def test_a_review_shows_rated_answers_first_each_once_and_no_formulas(place: LogPlace, tmp_path: Path) -> None:
    log(
        place,
        *(request(number, f"=HYPERLINK({number})", "-1") for number in range(20)),
        request(20, "=HYPERLINK(1)", "-1"),
    )
    log(place, rating(7, "bad"), request(30, ended="left", finish_reason=None))
    assert write_review(place, tmp_path / "a.csv", limit=5) == 5
    with (tmp_path / "a.csv").open(encoding="utf-8-sig", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert (lines[0]["id"], lines[0]["rating"]) == ("chatcmpl-7", "bad")
    assert {line["prompt"][:2] + line["answer"][:1] for line in lines} == {"'='"}
    others = write_review(place, tmp_path / "b.csv", limit=100, reviewed=[line["id"] for line in lines])
    assert others in (15, 16), "the twenty-first repeats the second"
    with pytest.raises(DataError, match="perhaps with somebody's marks"):
        write_review(place, tmp_path / "a.csv", limit=5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,c,ok,", "line 3: verdict 'ok' was given; expected good, bad, or nothing"),
        ("x,c,good,better", "line 3: the answer is good and has a correction"),
        ("1,c,bad,", "line 3: .*line 2 says otherwise"),
    ],
)
def test_a_mark_that_is_not_clear_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "review.csv"
    file.write_text(f"id,content,verdict,correction\n1,c,good,\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_reviews([file])
    file.write_text("id;content;verdict;correction\n1;c;good;\n", encoding="utf-8")
    with pytest.raises(DataError, match="separated by commas"):
        read_reviews([file])


def test_an_answer_that_was_exchanged_after_its_review_is_refused(place: LogPlace, tmp_path: Path) -> None:
    log(place, request(1))
    reviews = read_reviews([reviewed(place, tmp_path / "a.csv", {"chatcmpl-1": ("good", "")})])
    [key] = place.store.list("requests")
    place.store.put_bytes(key, request(1, said="poison").model_dump_json().encode() + b"\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2: answer chatcmpl-1 is not the one that was reviewed"):
        make_rows(place, reviews, CHAT, rated=False)
    place.store.delete(key)
    assert why(make_rows(place, reviews, CHAT, rated=False)) == {"no longer in the log": 1}


def test_the_command_writes_a_review_and_then_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipelines.yaml").write_bytes(changed(**{"channels.production.request_log": {"store": "logs"}}))
    monkeypatch.chdir(tmp_path)
    place = LogPlace(FileStore(tmp_path / "logs"), "demo", "production", retention_days=30)
    log(place, request(1))

    def run(*given: str) -> str:
        return CliRunner().invoke(app, ["rows", "demo", *given], catch_exceptions=False).output

    assert "review.csv: 1 answer; write good or bad" in run("--from-log", "--review", "review.csv")
    text = (tmp_path / "review.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "review.csv").write_text(text.replace("tree,,,,", "tree,,good,,"), encoding="utf-8")
    assert "rows.jsonl: 1 row" in run("--from-log", "--reviewed", "review.csv", "--out", "rows.jsonl")
    assert len(read_rows(tmp_path / "rows.jsonl")) == 1
    for wrong in (["--review", "a.csv"], ["--from-log"], ["--from-log", "--out", "b.jsonl"]):
        with pytest.raises(ConfigError):
            run(*wrong)
    with pytest.raises(ConfigError, match=r"channels\.staging of pipelines\.yaml has no `request_log`"):
        run("--from-log", "--rated", "--out", "b.jsonl", "--channel", "staging")
