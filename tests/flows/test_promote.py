"""Promotion with a person at the run's page: a real Prefect server, its pause, and the answer as the page sends it."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_runs import resume_flow_run
from prefect.testing.utilities import prefect_test_harness

from flows import promote as promoting
from graftline.errors import ConfigError, PromotionError
from graftline.workflow import promotion as steps
from graftline.workflow.outcome import Outcome
from graftline.workflow.stages import StageFailedError
from tests.settings.documents import changed

# The server takes 10 seconds of CPU to start.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What the flow would run on the store; the line itself is up to date."""
    ran: list[list[str]] = []
    outcome = Outcome("demo", "pass", "", "v1", "store/demo/v1", "report.html", ())
    monkeypatch.setattr(promoting, "retrain", lambda pipeline: outcome)
    monkeypatch.setattr(steps.stages, "run_command", lambda command, **_: ran.append(command[3:]))
    monkeypatch.chdir(tmp_path)
    return ran


class Promotion(threading.Thread):
    """The flow, on its way."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended: Any = None

    def run(self) -> None:
        self.ended = promoting.promote("demo", "production", "nightly", ask=True, return_state=True)

    def answer(self, **decision: Any) -> Any:
        """Wait until the run is paused, check what the page asks, send the answer, wait for the end."""
        with get_client(sync_client=True) as client:
            for _ in range(600):
                paused = [run for run in client.read_flow_runs() if run.state and run.state.is_paused()]
                if paused:
                    break
                time.sleep(0.2)
            assert len(paused) == 1
        resume_flow_run(paused[0].id, run_input=decision)
        self.join(timeout=120)
        return self.ended


def test_the_page_asks_for_a_decision_an_actor_and_a_reason() -> None:
    asked = steps.Decision.model_json_schema()
    assert {name: field["type"] for name, field in asked["properties"].items()} == {
        "approve": "boolean",
        "actor": "string",
        "reason": "string",
    }
    assert set(asked["required"]) == {"approve", "actor", "reason"}


@pytest.mark.parametrize("key", ["/keys/prefect", pytest.param("", marks=pytest.mark.long)])
def test_a_yes_on_the_page_promotes_in_that_persons_name(
    prefect: None, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(steps.APPROVAL_KEY, key)
    promotion = Promotion()
    promotion.start()
    ended = promotion.answer(approve=True, actor="eve", reason="the report is good")
    assert ended.is_completed(), ended
    approval = ["approve", "demo", "v1", "--channel", "production", "--key", key]
    entry = ["promote", "demo", "v1", "--reason", "the report is good", "--channel", "production", "--as", "eve"]
    assert commands == ([approval, entry] if key else [entry])


@pytest.mark.long
def test_a_no_on_the_page_promotes_nothing_and_is_named(prefect: None, commands: list[list[str]]) -> None:
    promotion = Promotion()
    promotion.start()
    ended = promotion.answer(approve=False, actor="mia", reason="forgetting")
    assert ended.is_failed()
    with pytest.raises(PromotionError, match="mia declined v1 for production: forgetting"):
        ended.result()
    assert commands == []


@pytest.mark.long
def test_a_receiver_that_stays_down_does_not_fail_a_run_that_has_promoted(
    prefect: None, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hook = {"url": "https://hooks.example.org/x"}
    (tmp_path / "pipelines.yaml").write_bytes(changed(**{"channels.production.webhooks": [hook]}))

    def run_command(command: list[str], **_: Any) -> None:
        commands.append(command[3:])
        if command[3] == "tell":
            raise StageFailedError("tell", "demo", 1, ["warning: it was not told"], kills_before=0)

    monkeypatch.setattr(steps.stages, "run_command", run_command)
    monkeypatch.setattr(steps, "tell_receivers", steps.tell_receivers.with_options(retry_delay_seconds=0))
    ended = promoting.promote("demo", "production", "nightly", return_state=True)
    assert ended.is_completed(), ended
    tell = ["tell", "demo", "--channel", "production"]
    assert [command for command in commands if command[0] != "promote"] == [tell] * 3


@pytest.mark.long
def test_a_night_tells_receivers_what_is_outstanding_even_if_one_is_down(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(steps, "get_run_logger", lambda: logging.getLogger("night"))
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    steps.tell_all()
    assert commands == [], "nobody has to be told"
    hook = {"url": "https://hooks.example.org/x"}
    (tmp_path / "pipelines.yaml").write_bytes(changed(**{"channels.staging.webhooks": [hook]}))
    steps.tell_all()
    assert commands == [["tell"]]

    def fail(*_: Any, **__: Any) -> None:
        raise StageFailedError("tell", "", 1, ["warning: it was not told"], kills_before=0)

    monkeypatch.setattr(steps.stages, "run_command", fail)
    steps.tell_all()
    assert "warning: it was not told" in caplog.text


def test_a_mistyped_channel_is_refused_before_the_line_is_run(commands: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    with pytest.raises(ConfigError, match=r"channel 'prodution' is not in .* did you mean 'production'"):
        promoting.promote.fn("demo", "prodution", "nightly")
    assert commands == []
