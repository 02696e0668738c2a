"""Requests that are kept to learn from: what is written, what never is, and that nobody's request suffers."""

import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftline.digest import Digest
from graftline.errors import DataError, StoreError
from graftline.registry.file_store import FileStore
from graftline.registry.request_log import LoggedRating, LoggedRequest, LogPlace
from graftline.serve.app import Server
from graftline.serve.follower import Follower
from graftline.serve.removal import Remover
from graftline.serve.request_log import RequestLog, _Note
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Runtime
from graftline.settings.channels import RequestLog as RequestLogSettings
from tests.serve.conftest import run
from tests.serve.following import make_follower, make_release, promote

KEY = "sk-proj-abcdefghijklmnopqrstuvwxyz012345"


def make_log(place: LogPlace, *, max_bytes: int = 1 << 20, **given: Any) -> RequestLog:
    """Written only when a test says so."""
    settings = RequestLogSettings(**{"store": "unused"} | given)
    return RequestLog([(place, settings)], flush_seconds=1e6, max_bytes=max_bytes)


@pytest.fixture
def place(tmp_path: Path) -> LogPlace:
    return LogPlace(FileStore(tmp_path / "log"), "demo", "production", retention_days=30)


@pytest.fixture(scope="module")
def followed(tiny: Path, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> tuple[Follower, str, Digest]:
    """A follower whose channel holds a release, and which release."""
    folder = tmp_path_factory.mktemp("followed")
    store = FileStore(folder / "store")
    follower = make_follower(store, tiny, runtime, folder / "fetched")
    version, digest = make_release(store, tiny, folder, seed=1)
    promote(store, version, digest)
    follower.poll()
    return follower, version, digest


class Asked:
    """A client of a server with a request log."""

    def __init__(self, url: str, log: RequestLog) -> None:
        self.http, self.log = httpx.Client(base_url=url, timeout=60), log

    def chat(self, text: str, **more: Any) -> httpx.Response:
        body = {"model": "demo@production", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
        return self.http.post("/v1/chat/completions", json=body | {"temperature": 0} | more)

    def rate(self, answer: str, rating: str) -> bool:
        counted: bool = self.http.post("/v1/feedback", json={"id": answer, "rating": rating}).json()["counted"]
        return counted

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])


@pytest.fixture
def settings() -> dict[str, Any]:
    """Of the log; parametrized where a test needs others."""
    return {}


@pytest.fixture
def asked(followed: tuple[Follower, str, Digest], place: LogPlace, settings: dict[str, Any]) -> Iterator[Asked]:
    follower = followed[0]
    catalog = follower.catalog  # type: ignore[attr-defined]
    log = make_log(place, **settings)
    server = Server(catalog, Scheduler(Limits(max_batch=8, max_waiting=256)), None, request_log=log)
    with run(server) as url:
        yield Asked(url, log)


def requests_in(place: LogPlace) -> list[LoggedRequest]:
    return [one for one in place.read() if isinstance(one, LoggedRequest)]


def written_bytes(place: LogPlace) -> bytes:
    return b"".join(place.store.get(key) or b"" for key in place.store.list("requests"))


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_a_request_is_logged_with_its_release_its_answer_and_what_the_user_thought_of_it(
    asked: Asked, place: LogPlace, followed: tuple[Follower, str, Digest]
) -> None:
    answer = asked.chat("what is a tree?", user="zoe").json()
    assert asked.rate(answer["id"], "bad")
    assert asked.rate(answer["id"], "good")
    assert not asked.rate("chatcmpl-unknown", "good")
    asked.log.flush()
    logged, *ratings = place.read()
    assert isinstance(logged, LoggedRequest)
    assert logged.messages == [{"role": "user", "content": "what is a tree?"}]
    assert logged.answer == {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
    assert (logged.id, logged.model) == (answer["id"], "demo@production")
    assert (logged.release, logged.digest) == (f"demo@{followed[1]}", str(followed[2]))
    assert (logged.finish_reason, logged.ended) == (answer["choices"][0]["finish_reason"], "answered")
    counted = {"prompt_tokens": logged.prompt_tokens, "completion_tokens": logged.completion_tokens}
    assert counted.items() <= answer["usage"].items()
    assert 0 < logged.seconds < 60
    assert [one.rating for one in ratings if isinstance(one, LoggedRating)] == ["bad", "good"]
    assert b"zoe" not in written_bytes(place), "the user is a hash"
    assert asked.metric('graftline_request_log_lines_total{channel="demo@production"}') == 3


def test_streams_and_plain_completions_are_logged_as_they_were_answered(asked: Asked, place: LogPlace) -> None:
    whole = asked.chat("hello").json()["choices"][0]["message"]["content"]
    plain = {"model": "demo@production", "prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}
    said = asked.http.post("/v1/completions", json=plain).json()["choices"][0]["text"]
    asked.chat("hello", stream=True)
    while len(requests_in(place)) < 3:  # a stream is noted after its last byte was sent
        asked.log.flush()
    first, completed, streamed = sorted(requests_in(place), key=lambda one: (one.time, one.id))
    assert first.answer == streamed.answer == {"role": "assistant", "content": whole}
    assert first.key == streamed.key, "without a user, the conversation is the key"
    assert completed.messages is None
    assert completed.prompt
    assert completed.answer["content"] == said


def test_other_models_are_not_logged_and_nothing_is_by_default(asked: Asked, place: LogPlace) -> None:
    asked.http.post("/v1/completions", json={"model": "tiny", "prompt": [5], "max_tokens": 1})
    asked.log.flush()
    assert requests_in(place) == []
    assert next(iter(RequestLog(()).collect())).samples == []


@pytest.mark.parametrize("settings", [{"percent": 40.0}])
def test_all_of_a_key_s_requests_are_logged_or_none(asked: Asked, place: LogPlace, tmp_path: Path) -> None:
    for number in range(15):
        for _ in range(2):
            asked.chat("hello", user=f"user {number}", max_tokens=1)
    asked.log.flush()
    keys = [one.key for one in requests_in(place)]
    assert all(keys.count(key) == 2 for key in keys)
    assert 0 < len(set(keys)) < 15


# --- what never is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"remove": (r"[\w.]+@[\w.]+", r"(?i)project \w+")}])
def test_secrets_and_a_project_s_patterns_never_reach_the_store(asked: Asked, place: LogPlace) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": f"use {KEY}", "parameters": {}}}]
    body = {
        "messages": [
            {"role": "system", "content": f"the key is {KEY}"},
            {"role": "user", "content": "mail ada@example.org about PROJECT Heron, password: hunter22"},
        ]
    }
    asked.chat("", **body)
    asked.chat("", **body, tools=tools, tool_choice="none")
    plain = {"model": "demo@production", "prompt": f"{KEY} is mine", "max_tokens": 1}
    asked.http.post("/v1/completions", json=plain)
    asked.log.flush()
    logged = requests_in(place)
    assert len(logged) == 3
    assert logged[0].messages == [
        {"role": "system", "content": "the key is [removed]"},
        {"role": "user", "content": "mail [removed] about [removed], password: [removed]"},
    ]
    assert [one.removed_from_prompt for one in logged] == [4, 4, 1]
    for secret in (KEY, "ada@", "Heron", "hunter22"):
        assert secret.encode() not in written_bytes(place)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("AKIAIOSFODNN7EXAMPLE", "[removed]"),
        ("x ghp_0123456789abcdefghijABCDEFGHIJ012345 y", "x [removed] y"),
        ("Authorization: Bearer abcdefghij0123456789", "Authorization: Bearer [removed]"),
        ("'Authorization': 'Basic YWRhOmh1bnRlcjIyaHVudGVy'", "'Authorization': 'Basic [removed]'"),
        ("postgres://ada:hunter22@db.example.org/x", "postgres://[removed]@db.example.org/x".replace("@", "")),
        ('{"db_password": "correct horse battery"}', '{"db_password": [removed]}'),
        ("export AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "export AWS_SECRET_ACCESS_KEY=[removed]"),
        ("my password is hunter22", "my password is [removed]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----\nrest", "[removed]\nrest"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn", "[removed]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "[removed]"),
        ("a token of love, and the secret of tea", "a token of love, and the secret of tea"),
        ("see https://example.org/@ada?x=1", "see https://example.org/@ada?x=1"),
        ("\ud800 lone", "? lone"),
        ('{"password": "abc\\"def ghi", "x": 1}', '{"password": [removed], "x": 1}'),
        ('password = "cut before its end', "password = [removed]"),
        ("password: a,bcdefgh", "password: [removed]"),
        ("password=p&ssw0rd", "password=[removed]"),
        ("**Password:** hunter2", "**Password:** [removed]"),
        ("passphrase := 'x y'", "passphrase := [removed]"),
        ("my API key: abcd1234, yes", "my API key: [removed] yes"),
        ("the API key is abcd1234", "the API key is [removed]"),
        ("Secret access key: wJalrXUtnFEMI", "Secret access key: [removed]"),
        ("secret-key: abcdefgh1", "secret-key: [removed]"),
        ("db_pass = hunter22", "db_pass = [removed]"),
        ("mysql --password hunter2 -h db", "mysql --password [removed] -h db"),
        ("curl -u ada:hunter2 https://example.org", "curl -u ada:[removed] https://example.org"),
        ("<password>hunter 2</password>", "<password>[removed]</password>"),
        ("postgres://ada:p@ss@db/x", "postgres://[removed]db/x"),
        ("https://example.org/x?sv=1&sig=ab%2Bc&n=1", "https://example.org/x?sv=1&sig=[removed]&n=1"),
        ("https://example.org/x?token=abcd1234", "https://example.org/x?token=[removed]"),
        ("client-key-data: LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBLRVk", "client-key-data: [removed]"),
        ("PuTTY-User-Key-File-3: x\nPrivate-Lines: 1\nabc\nPrivate-MAC: 12ab\nrest", "[removed]\nrest"),
        ("Cookie: session=abc123", "Cookie: [removed]"),
        ("Authorization: Basic YWRhOmg=", "Authorization: Basic [removed]"),
        ('{"arguments": "{\\"api_key\\": \\"abc def\\"}"}', '{"arguments": "{\\"api_key\\": [removed]}"}'),
        ('{"token":null,"name":"joe doe"}', '{"token":[removed],"name":"joe doe"}'),
        ('"max_tokens": 1024, tokens: 12345', '"max_tokens": 1024, tokens: 12345'),
        ("compass: north, bypass: allowed", "compass: north, bypass: allowed"),
    ],
)
def test_what_looks_like_a_secret_is_replaced_and_other_text_stays(text: str, left: str) -> None:
    assert Remover().clean(text)[0] == left


def test_a_value_is_removed_by_its_name_wherever_it_stands() -> None:
    given = {"login": {"password": "x", "max_tokens": 5, "api_key": 123456}, "token ": True, "Authorization": "x y"}
    cleaned, number = Remover().clean(given)
    login = {"password": "[removed]", "max_tokens": 5, "api_key": "[removed]"}
    assert cleaned == {"login": login, "token ": True, "Authorization": "[removed]"}
    assert number == 3
    nested = {"credentials": {"user": "ada", "pin": 12}, "passwords": ["a", ["b"]], "secret": None}
    removed = {"credentials": {"user": "[removed]", "pin": "[removed]"}, "passwords": ["[removed]", ["[removed]"]]}
    assert Remover().clean(nested) == (removed | {"secret": None}, 4)
    assert Remover().clean({f"{KEY}": [KEY, None, 1.5]})[0] == {"[removed]": ["[removed]", None, 1.5]}


def test_a_tool_s_parameter_with_a_secret_s_name_stays_and_its_values_do_not() -> None:
    password = {"type": "string", "description": "the user's", "default": "hunter2", "enum": ["hunter2", "other"]}
    parameters = {"type": "object", "properties": {"password": password}, "required": ["password"]}
    cleaned, number = Remover().clean(parameters)
    left = password | {"default": "[removed]", "enum": ["[removed]", "[removed]"]}
    assert cleaned == parameters | {"properties": {"password": left}}
    assert number == 3


def test_a_project_s_patterns_see_numbers_too() -> None:
    given = {"account": 123456789, "ratio": 0.25, "number": 12, "is": True}
    assert Remover([r"\b\d{9}\b"]).clean(given) == (given | {"account": "[removed]"}, 1)


def test_a_secret_that_is_split_over_the_parts_of_a_message_is_found(asked: Asked, place: LogPlace) -> None:
    parts = [{"type": "text", "text": text} for text in (KEY[:12], KEY[12:], " is mine")]
    reasoning = {"role": "assistant", "content": "no", "reasoning_content": f"the key {KEY} is not asked for"}
    turns = [{"role": "user", "content": parts}, reasoning, {"role": "user", "content": "and now?"}]
    assert asked.chat("", messages=turns).status_code == 200
    asked.log.flush()
    [logged] = requests_in(place)
    assert (logged.messages or [{}])[0]["content"] == "[removed] is mine"
    assert KEY.encode() not in written_bytes(place)


def test_a_pattern_that_matches_everything_leaves_a_request_s_form() -> None:
    turn = {"role": "user", "content": "anything", "tool_calls": [{"type": "function", "function": {"name": "user"}}]}
    cleaned, number = Remover([r"\w+"]).clean(turn)
    assert cleaned == turn | {"content": "[removed]"}
    assert number == 1


# --- nobody waits -----------------------------------------------------------------------------------------------------


def test_a_store_that_refuses_is_told_once_and_every_request_is_answered(
    asked: Asked, place: LogPlace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "graftline.serve.request_log")
    (tmp_path / "log").write_text("a file where the store's folder should be", encoding="utf-8")
    for number in range(3):
        assert asked.chat(f"question {number}").status_code == 200
        asked.log.flush()
    assert asked.metric('graftline_request_log_failing{channel="demo@production"}') == 1
    assert asked.metric("graftline_request_log_pending_bytes") > 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (tmp_path / "log").unlink()
    asked.log.flush()
    assert len(requests_in(place)) == 3
    assert asked.metric('graftline_request_log_failing{channel="demo@production"}') == 0
    assert asked.metric("graftline_request_log_pending_bytes") == 0
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


class DoubtfulStore(FileStore):
    """Writes, and then says that it did not, as often as it is told: an answer that was lost on its way."""

    num_lost = 0

    def put_bytes(self, key: str, data: bytes) -> None:
        super().put_bytes(key, data)
        if self.num_lost:
            self.num_lost -= 1
            raise StoreError("the connection was closed before an answer came")


class LaterPlace(LogPlace):
    """Time passes between two writes."""

    def part_key(self, server: str, number: int, now: datetime) -> str:
        return super().part_key(server, number, now + timedelta(seconds=len(self.store.list("requests"))))


def test_a_part_that_was_written_before_the_connection_broke_is_not_written_again(tmp_path: Path) -> None:
    place = LaterPlace(DoubtfulStore(tmp_path / "log"), "demo", "production", retention_days=30)
    place.store.num_lost = 1  # type: ignore[attr-defined]
    log = make_log(place)
    for _ in range(2):
        rating = LoggedRating.model_validate_json(json.dumps(LINE))
        log.add(_Note(log._channels["demo@production"], 500, rating=rating))
        log.flush()
    assert len(list(place.read())) == 2
    pending = [metric for metric in log.collect() if metric.name == "graftline_request_log_pending_bytes"]
    assert pending[0].samples[0].value == 0


@pytest.mark.parametrize("settings", [{"max_bytes": 15_000}])
def test_what_does_not_fit_into_memory_is_dropped_and_counted(asked: Asked, place: LogPlace) -> None:
    for number in range(4):
        assert asked.chat(f"question {number}").status_code == 200
    asked.log.flush()
    assert len(requests_in(place)) == 2
    assert asked.metric('graftline_request_log_dropped_total{channel="demo@production",reason="full"}') == 2
    asked.chat("another")
    asked.log.flush()
    assert len(requests_in(place)) == 3, "what was written makes room"


def test_an_answer_that_cannot_be_written_as_a_line_costs_that_line_alone(asked: Asked, place: LogPlace) -> None:
    nested: Any = {}
    for _ in range(400):
        nested = {"a": nested}
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"x": float("nan")})}}
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "and now?"},
    ]
    asked.chat("", messages=turns)
    asked.chat("fine")
    asked.log.flush()
    assert "fine" in [(one.messages or [{}])[-1].get("content") for one in requests_in(place)]


def test_a_user_who_rates_one_answer_again_and_again_fills_no_log(asked: Asked, place: LogPlace) -> None:
    answer = asked.chat("hello").json()["id"]
    counted = [asked.rate(answer, "good" if number % 2 else "bad") for number in range(20)]
    assert counted == [True] * 5 + [False] * 15
    asked.log.flush()
    assert sum(isinstance(one, LoggedRating) for one in place.read()) == 5


def test_a_server_that_stops_writes_what_it_has(followed: tuple[Follower, str, Digest], place: LogPlace) -> None:
    catalog = followed[0].catalog  # type: ignore[attr-defined]
    log = make_log(place)
    with run(Server(catalog, Scheduler(Limits()), None, request_log=log)) as url:
        Asked(url, log).chat("hello")
    assert len(requests_in(place)) == 1


# --- reading and retention --------------------------------------------------------------------------------------------

LINE = {
    "format": 1,
    "kind": "rating",
    "id": "chatcmpl-1",
    "time": "2026-11-27T08:00:00Z",
    "rating": "good",
}


def put(place: LogPlace, data: bytes, *, at: datetime | None = None) -> str:
    key = place.part_key("server", 0, at or datetime.now(UTC))
    place.store.put_bytes(key, data)
    return key


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b"{", "EOF"),
        (b"", "EOF"),
        (b"\xff", "column 1"),
        (json.dumps(LINE | {"rating": "ugly"}).encode(), "'good' or 'bad'"),
        (json.dumps(LINE | {"time": "2026-11-27"}).encode(), "time"),
        (json.dumps(LINE | {"user": "ada"}).encode(), "user"),
        (json.dumps(LINE | {"format": 2}).encode(), "format"),
        (json.dumps(LINE | {"kind": "request"}).encode(), "Field required"),
        (json.dumps({"id": "x"}).encode(), "kind"),
    ],
)
def test_a_line_that_is_not_right_is_named(place: LogPlace, second: bytes, message: str) -> None:
    key = put(place, json.dumps(LINE).encode() + b"\n" + second + b"\n")
    with pytest.raises(DataError, match=rf"{re.escape(key)}, line 2.*{message}"):
        list(place.read())


def test_a_part_that_was_cut_or_copied_is_refused(asked: Asked, place: LogPlace) -> None:
    asked.chat("hello")
    asked.log.flush()
    [key] = place.store.list("requests")
    data = place.store.get(key) or b""
    copied = put(place, data, at=datetime.now(UTC) + timedelta(seconds=5))
    with pytest.raises(DataError, match=r"line 1: answer chatcmpl-\w+ is in .*line 1 already"):
        list(place.read())
    place.store.put_bytes(copied, data[:-1])
    place.store.delete(key)
    with pytest.raises(DataError, match="was cut"):
        list(place.read())


def test_what_is_older_than_the_retention_is_neither_read_nor_kept(place: LogPlace, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    line = json.dumps(LINE).encode() + b"\n"
    old = put(place, line, at=now - timedelta(days=31))  # written to the store today: it was copied there
    young = put(place, line, at=now - timedelta(days=29))
    other = "requests/demo/production/notes.txt"
    place.store.put_bytes(other, b"somebody's")
    assert len(list(place.read())) == 1
    assert place.expire() == 1
    assert place.store.list("requests") == sorted([young, other])
    assert old not in place.store.list("requests")
    killed = tmp_path / "log" / "requests" / "demo" / "production" / ".1.jsonl.abcdefgh.part"
    killed.write_bytes(line)
    assert place.expire(now=now + timedelta(days=2)) == 1
    assert killed.exists()
    place.expire(now=now + timedelta(days=31))
    assert not killed.exists()
