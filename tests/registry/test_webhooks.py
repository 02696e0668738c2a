"""Webhooks: a real receiver over HTTP that checks signatures by itself, and everything that can go wrong on the way."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from graftline.registry import channel
from graftline.registry.channel import next_entry
from graftline.registry.log_checkpoints import recall
from graftline.registry.trust import Trust
from graftline.registry.webhooks import Teller, folder_of, read_secrets, sign
from graftline.retry import Retry
from graftline.settings import Channel, Webhook
from tests.ports import free_port
from tests.registry.people import NOW
from tests.registry.test_promotion import Stage, stage
from tests.registry.test_rollout import moved, started

__all__ = ["stage"]

SECRET = base64.b64encode(bytes(range(32))).decode()
VARIABLE = "GRAFTLINE_WEBHOOK_SECRET"


class Receiver:
    """Keeps the messages that it was sent; answers with ``statuses`` one after another, then with 204."""

    def __init__(self) -> None:
        self.messages: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/hook?token=secret-of-the-address"

    @property
    def types(self) -> list[str]:
        return [json.loads(body)["type"] for _, body in self.messages]

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.messages]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.messages.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
                self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv(VARIABLE, f"whsec_{SECRET}")
    made = Receiver()
    yield made
    made.close()


def teller(stage: Stage, *, hours: float = 1.0, trust: Trust | None = None, attempts: int = 4) -> Teller:
    retry = Retry(attempts=attempts, base_seconds=0.001)
    now = NOW + timedelta(hours=hours)
    return Teller(store=stage.store, pipeline="demo", trust=trust, now=lambda: now, retry=retry)


def is_genuine(headers: dict[str, str], body: bytes, secret: str = SECRET) -> bool:
    """As a receiver checks it, written anew from the specification."""
    text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.new(base64.b64decode(secret), text, hashlib.sha256).digest()).decode()
    return f"v1,{wanted}" in headers["webhook-signature"].split(" ")


def test_signatures_are_those_of_the_specification() -> None:
    # The example in the specification and in its libraries' tests.
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    made = sign([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_each_promotion_and_rollback_is_told_once_signed_and_in_order(stage: Stage, receiver: Receiver) -> None:
    first, _ = stage.hold("ab")
    stage.rollback()
    hook = Webhook(url=receiver.url)
    done = teller(stage).tell("production", [hook])
    assert done.problems == []
    assert len(done.told) == 3
    assert receiver.types == ["release.promoted", "release.promoted", "release.rolled_back"]
    assert all(is_genuine(headers, body) for headers, body in receiver.messages)
    entries = recall(stage.store, "demo", "production").entries
    assert receiver.ids == [f"msg_{entry.digest.hex}" for entry in entries]
    assert json.loads(receiver.messages[-1][1]) == {
        "type": "release.rolled_back",
        "timestamp": f"{entries[2].change.time:%Y-%m-%dT%H:%M:%SZ}",
        "data": {
            "pipeline": "demo",
            "channel": "production",
            "entry": 3,
            "entry_digest": str(entries[2].digest),
            "version": first.version,
            "release": str(first.digest),
            "actor": "ada",
            "reason": "errors rose",
        },
    }
    assert teller(stage).tell("production", [hook]).told == []
    assert len(receiver.messages) == 3


def test_a_receiver_that_is_down_gets_the_message_later_and_the_channel_is_as_it_was(
    stage: Stage, receiver: Receiver
) -> None:
    (manifest,) = stage.hold("a")
    url = f"http://127.0.0.1:{free_port()}/hook?token=secret-of-the-address"
    done = teller(stage, attempts=2).tell("production", [Webhook(url=url), Webhook(url=receiver.url)])
    assert len(receiver.messages) == 1, "the other receiver is told all the same"
    (problem,) = done.problems
    assert "was not told of entry 1 of production" in problem
    assert "graftline tell" in problem
    assert "secret-of-the-address" not in problem
    assert stage.versions() == [manifest.version]


def test_a_message_whose_receipt_was_not_noted_is_sent_again_under_the_same_id(
    stage: Stage, receiver: Receiver
) -> None:
    stage.hold("a")
    hook = Webhook(url=receiver.url)
    teller(stage).tell("production", [hook])
    for mark in stage.store.list(folder_of("demo", "production", hook)):
        stage.store.delete(mark)  # as if the process had died before it wrote it
    teller(stage).tell("production", [hook])
    assert len(receiver.messages) == 2
    assert len(set(receiver.ids)) == 1
    assert receiver.messages[0][1] == receiver.messages[1][1]


def test_a_mark_for_another_entry_of_that_number_does_not_hide_a_message(stage: Stage, receiver: Receiver) -> None:
    stage.hold("a")
    hook = Webhook(url=receiver.url)
    stage.store.put_bytes(f"{folder_of('demo', 'production', hook)}/0000000001.json", b"{}\n")
    assert len(teller(stage).tell("production", [hook]).told) == 1


def test_an_overloaded_receiver_is_asked_again(stage: Stage, receiver: Receiver) -> None:
    stage.hold("a")
    receiver.statuses = [503, 429]
    assert teller(stage).tell("production", [Webhook(url=receiver.url)]).problems == []
    assert len(receiver.messages) == 3
    assert len(set(receiver.ids)) == 1


@pytest.mark.parametrize(
    ("status", "advice"), [(400, "sent again"), (410, "remove it"), (302, "redirects are not followed")]
)
def test_a_refused_message_is_not_sent_at_once_again_and_does_not_keep_back_the_next(
    stage: Stage, receiver: Receiver, status: int, advice: str
) -> None:
    stage.hold("ab")
    receiver.statuses = [status]
    done = teller(stage).tell("production", [Webhook(url=receiver.url)])
    assert len(receiver.messages) == 2
    assert len(done.told) == 1
    (problem,) = done.problems
    assert f"answered {status} to entry 1" in problem
    assert advice in problem


def test_old_entries_are_not_told_to_a_new_receiver(stage: Stage, receiver: Receiver) -> None:
    stage.hold("a")
    done = teller(stage, hours=73).tell("production", [Webhook(url=receiver.url)])
    assert (done.told, done.problems, receiver.messages) == ([], [], [])


def test_an_entry_that_nobody_signed_is_not_told(stage: Stage, receiver: Receiver) -> None:
    trust = Trust(keys=stage.people.keys, policies={"production": Channel()})
    pia = stage.people.private_key("pia")
    manifest = stage.release("a")
    stage.promote(manifest, production=None, key=pia, trust=trust)
    log = channel.read(stage.store, "demo", "production")
    assert log.head
    forged = log.head.change.model_copy(update={"actor": "mallory", "reason": "mine"})
    channel.append(stage.store, next_entry(log, forged))
    done = teller(stage, trust=trust).tell("production", [Webhook(url=receiver.url)])
    assert receiver.messages == []
    (problem,) = done.problems
    assert "nobody was told about production of demo" in problem
    assert "not signed" in problem


def test_the_start_of_a_rollout_is_told_with_its_candidate_and_later_shares_are_not(
    stage: Stage, receiver: Receiver
) -> None:
    incumbent, candidate, first = started(stage)
    moved(stage, moved(stage, first))
    teller(stage).tell("production", [Webhook(url=receiver.url)])
    assert receiver.types == ["release.promoted", "release.rollout_started", "release.promoted"]
    data = json.loads(receiver.messages[1][1])["data"]
    assert data["version"] == incumbent.version
    assert data["candidate"] == {
        "version": candidate.version,
        "release": str(candidate.digest),
        "percent_of_keys": 5,
    }


def test_while_one_secret_replaces_another_both_sign(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = base64.b64encode(b"n" * 24).decode()
    monkeypatch.setenv(VARIABLE, f"whsec_{SECRET} whsec_{other}")
    stage.hold("a")
    teller(stage).tell("production", [Webhook(url=receiver.url)])
    ((headers, body),) = receiver.messages
    assert is_genuine(headers, body)
    assert is_genuine(headers, body, other)
    assert not is_genuine(headers, body + b" ")


@pytest.mark.parametrize(
    "value", [None, "", "hunter2", f"whsec_{SECRET} hunter2", "whsec_c2hvcnQ=", f"{SECRET}", "whsec_é"]
)
def test_a_secret_that_cannot_be_used_is_told_without_showing_it(
    stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, value)
    stage.hold("a")
    done = teller(stage).tell("production", [Webhook(url=receiver.url)])
    assert receiver.messages == []
    (problem,) = done.problems
    assert VARIABLE in problem
    assert "expected whsec_" in problem
    assert "hunter2" not in problem


def test_marks_that_cannot_be_read_are_told_and_nothing_is_sent_blindly(
    stage: Stage, receiver: Receiver, tmp_path: Path
) -> None:
    (manifest,) = stage.hold("a")
    (tmp_path / "store" / "told").write_text("a file where the folder would be", encoding="utf-8")
    done = teller(stage).tell("production", [Webhook(url=receiver.url)])
    (problem,) = done.problems
    assert "told" in problem
    assert receiver.messages == []
    assert stage.versions() == [manifest.version]


def test_secrets_are_read_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTLINE_WEBHOOK_OTHER", f"whsec_{SECRET}")
    assert read_secrets("GRAFTLINE_WEBHOOK_OTHER") == (bytes(range(32)),)
