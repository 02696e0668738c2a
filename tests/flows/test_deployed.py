"""The project as it runs in production: a real Prefect server, schedules, workers that die, automations."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import IntervalSchedule

from graftline.workflow.stages import STAGES
from tests.flows.deployed import BIN, SECOND, Server, deploy, serve, wait_until, worker
from tests.workflow.tiny_project import PIPELINE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SILENT_SECONDS = "45"  # Runs say that they live every 30 seconds, Prefect's shortest; on a busy machine later.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("deployed")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def deployed(server: Server) -> Server:
    deploy(server)
    return server


class Receiver(BaseHTTPRequestHandler):
    """Takes messages as a chat does."""

    messages: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.messages.append(json.loads(body)["text"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def chat() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Receiver) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/"
        listening.shutdown()


def apply(server: Server, notify_url: str) -> list[str]:
    code = (
        "from graftline.workflow import automations; "
        f"print(automations.apply({notify_url!r}, silent_seconds={SILENT_SECONDS}))"
    )
    return sorted(set(eval(server.command(str(BIN / "python"), "-c", code)).values()))


def test_every_deployment_is_there_with_typed_and_explained_parameters(
    deployed: Server, client: SyncPrefectClient
) -> None:
    found = {deployment.name: deployment for deployment in client.read_deployments()}

    assert set(found) == {"nightly", "watch", "retrain", "promote", "rollout", "evaluate-pr", "sweep"}
    for deployment in found.values():
        assert "graftline" in deployment.tags
        assert deployment.enforce_parameter_schema
        described = deployment.parameter_openapi_schema["properties"]
        assert all(
            one.get("description") and ("type" in one or "anyOf" in one or "allOf" in one) for one in described.values()
        )
    assert found["retrain"].parameter_openapi_schema["properties"]["wait_seconds"]["type"] == "number"


def test_automations_can_be_applied_again(deployed: Server, client: SyncPrefectClient, chat: str) -> None:
    assert apply(deployed, chat) == ["created"]
    first = {automation.name for automation in client.read_automations()}

    assert apply(deployed, chat) == ["updated"]

    assert {automation.name for automation in client.read_automations()} == first
    assert len(client.read_automations()) == len(first) == 5


def test_a_night_fires_survives_its_worker_s_death_and_repeats_no_finished_stage(
    deployed: Server, client: SyncPrefectClient, chat: str
) -> None:
    (deployed.folder / "hold").touch()
    with worker(deployed, "first"):
        schedule_soon(client, "nightly")
        wait_until(lambda: any(stage.startswith("train@") for stage in deployed.started()), 400, "a training to start")
        training, before = deployed.process_of("train@"), deployed.started()
    # The worker and its runs are killed; the stage has to notice.
    wait_until(lambda: not psutil.pid_exists(training), 10, "the training of the dead run to end")
    abandoned = checkouts(deployed)
    (deployed.folder / "hold").unlink()

    with worker(deployed, "second"):
        wait_until(lambda: state_of(client, "nightly") == "Completed", 600, "the night to end on the second worker")

    after = deployed.started()[len(before) :]
    finished = [stage for stage in before if not stage.startswith("train@")]
    assert {PIPELINE, SECOND} == {stage.partition("@")[2] for stage in finished}, "both ran at once"
    assert set(finished).isdisjoint(after), "a finished stage ran again"
    for pipeline in (PIPELINE, SECOND):
        ran = [name for name in [*finished, *after] if name.endswith(f"@{pipeline}")]
        assert ran == [f"{stage}@{pipeline}" for stage in STAGES]
    check_pages(client)
    assert len(abandoned) == 3
    assert not set(abandoned) & set(checkouts(deployed)), "checkouts of killed runs are left"
    for text in ("died; the run starts again", "graftline: the night: "):
        wait_until(lambda text=text: any(text in message for message in Receiver.messages), 60, f"the message {text!r}")


def schedule_soon(client: SyncPrefectClient, name: str) -> None:
    deployment = client.read_deployment_by_name(f"{name}/{name}")
    soon = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC) + timedelta(seconds=3))
    client.create_deployment_schedules(deployment.id, [DeploymentScheduleCreate(schedule=soon, active=True)])


def runs_of(client: SyncPrefectClient, name: str) -> list[Any]:
    deployment = client.read_deployment_by_name(f"{name}/{name}")
    runs = [run for run in client.read_flow_runs() if run.deployment_id == deployment.id]
    return [run for run in runs if run.state and run.start_time]


def state_of(client: SyncPrefectClient, name: str) -> str:
    runs = runs_of(client, name)
    return runs[0].state.name if runs else ""


def checkouts(server: Server) -> list[Path]:
    return sorted((server.folder / "checkouts").glob("*prefect/repository*"))


def check_pages(client: SyncPrefectClient) -> None:
    pages = {artifact.key: artifact for artifact in client.read_latest_artifacts()}
    expected = {f"{page}-{PIPELINE}" for page in ("verdict", "gates", "stages", "outcome", "release", "progress")}
    assert expected | {"night", "nightly"} <= pages.keys()
    assert "2 released" in str(pages["night"].data)
    (train,) = [row for row in json.loads(pages[f"stages-{PIPELINE}"].data) if row["stage"] == "train"]
    assert train == {"stage": "train", "seconds": 1.5, "peak_rss_mb": 90, "tokens_per_second": 321.0}
    assert pages[f"progress-{PIPELINE}"].data == 100.0
    for run in (*runs_of(client, "nightly"), *runs_of(client, "retrain")):
        assert run.run_count == 2, "started again after its worker died"
        assert "graftline" in run.tags
