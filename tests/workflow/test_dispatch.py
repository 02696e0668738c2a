"""Turns of many pipelines on a real server: what it keeps comes at least once, and keys name their occasion."""

import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.logging import disable_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Crashed, Failed, State
from prefect.testing.utilities import prefect_test_harness

from graftline import settings
from graftline.errors import GraftlineError
from graftline.workflow import checkout as project
from graftline.workflow import dispatch, shelf, watching
from graftline.workflow.outcome import Outcome, outcome_key
from tests.line.project import write_yaml
from tests.workflow.tiny_project import tiny_settings

OLD = Outcome("demo", "fail", "s", None, None, "r", ())
NEW = Outcome("demo", "pass", "s", "v1", "l", "r", ("train",))


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    template = {
        "job_configuration": {"command": "{{ command }}", "gpus": "{{ gpus }}"},
        "variables": {"properties": {"command": {"type": "string"}, "gpus": {"type": "string"}}},
    }
    with prefect_test_harness(server_startup_timeout=400), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="graftline", type="process", base_job_template=template))
        flow_id = client.create_flow_from_name("retrain")
        client.create_deployment(flow_id=flow_id, name="retrain", work_pool_name="graftline", work_queue_name="gpu")
        yield client


@flow
def showing(rows: list[Any]) -> str:
    for row in rows:
        create_table_artifact(row, key=outcome_key("demo"))
    return str(flow_run.id)


def outcome_of(client: SyncPrefectClient, *rows: Any) -> Outcome:
    return dispatch._read_outcome(client, showing(list(rows)), "demo")  # type: ignore[arg-type]  # any id


def test_of_an_outcome_that_is_shown_again_the_newest_counts(client: SyncPrefectClient) -> None:
    assert outcome_of(client, [asdict(OLD)], [asdict(NEW)]) == NEW
    assert outcome_of(client, [asdict(NEW)], [asdict(NEW)], [asdict(OLD)]) == OLD


@pytest.mark.parametrize("rows", [[], [{"other": 1}], [asdict(NEW)] * 2, [{**asdict(NEW), "more": 1}], [{}], [[1]]])
def test_an_outcome_that_is_missing_or_unreadable_is_explained(client: SyncPrefectClient, rows: list[Any]) -> None:
    with pytest.raises(GraftlineError, match=r"flow run .* (completed and shows no artifact|cannot be read: )"):
        outcome_of(client, *([rows] if rows else []))


def test_a_run_that_somebody_deleted_is_named(client: SyncPrefectClient) -> None:
    missing = uuid4()
    with pytest.raises(GraftlineError, match=f"its flow run {missing} was deleted in Prefect"):
        dispatch._wait(client, missing)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path)


def make_checkout(folder: Path) -> Path:
    """A repository with pipelines of which one trains on a CPU."""
    subprocess.run(["git", "init", "-q", folder], check=True)
    one = tiny_settings()
    on_cpu = {**one, "train": {**one["train"], "device": "cpu"}, "resources": {"train": {"memory_gb": 3}}}
    write_yaml(folder, {"pipelines": {"kinds": one, "late": one, "small": on_cpu}, "channels": {"production": {}}})
    return folder


def ask(root: Path, sources: str, pipeline: str = "kinds") -> str:
    return str(watching.ask(root, pipeline, sources, wait_seconds=0))


def test_content_that_comes_back_is_trained_again_and_what_was_asked_for_is_not(
    client: SyncPrefectClient, checkout: Path
) -> None:
    first = ask(checkout, "A")
    assert ask(checkout, "A") == first, "a second look finds the run"
    client.set_flow_run_state(first, Completed(), force=True)  # type: ignore[arg-type]  # any id
    assert ask(checkout, "A") == first, "a run on another machine leaves no record here"
    second = ask(checkout, "B")
    third = ask(checkout, "A")
    assert len({first, second, third}) == 3
    assert ask(checkout, "A") == third
    client.set_flow_run_state(third, Failed(), force=True)  # type: ignore[arg-type]
    assert ask(checkout, "A") == third, "what fails waits for the night"


def test_a_run_goes_into_the_queue_of_its_class_and_a_pod_on_the_cpu_asks_for_no_gpu(
    client: SyncPrefectClient, checkout: Path
) -> None:
    runs = [client.read_flow_run(UUID(ask(checkout, "A", name))) for name in ("kinds", "small")]
    assert [run.work_queue_name for run in runs] == ["gpu", "cpu"]
    assert [run.job_variables for run in runs] == [{}, {"gpus": "0"}], "this pool's jobs take no memory"


def test_a_deployment_without_workers_has_no_queues(client: SyncPrefectClient, checkout: Path) -> None:
    client.create_deployment(flow_id=client.create_flow_from_name("served"), name="served")
    pipeline = settings.load(checkout / settings.DEFAULT_FILE).pipeline("small")
    assert dispatch._place(client, pipeline, "served/served") == (None, {})


def test_content_that_a_run_did_not_see_is_asked_for_again(client: SyncPrefectClient, checkout: Path) -> None:
    first = ask(checkout, "A", "late")
    # Its clone was made a minute later, when the rows were others.
    shelf.keep_run(checkout, "late", inputs="sha256:B", outcome="pass", version="1")
    assert ask(checkout, "A", "late") != first


def test_pipelines_of_one_name_in_two_projects_are_two(
    client: SyncPrefectClient, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_checkout(tmp_path_factory.mktemp("other"))
    assert ask(checkout, "A") != ask(other, "A")


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def test_a_project_is_known_by_where_its_commits_come_from(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "first")
    git(checkout, "clone", "-q", f"file://{checkout}", "one")
    git(checkout, "clone", "-q", str(checkout / "one"), "two")
    git(checkout, "worktree", "add", "-q", "tree")
    assert len({project.project_key(checkout / name) for name in (".", "one", "two", "tree")}) == 1

    keys = {}
    for address in (
        "https://u:secret@host/team/a.git",
        "git@Host:team/a",
        "ssh://git@host/team/a/",
        "https://host/team/b",
    ):
        git(checkout, "remote", "remove", "origin") if keys else None
        git(checkout, "remote", "add", "origin", address)
        keys[address] = project.project_key(checkout)
    *same, other = keys.values()
    assert len(set(same)) == 1
    assert other not in same
    assert project.project_key(checkout / "one") == other


def test_projects_that_name_their_servers_by_the_same_relative_path_are_two(tmp_path: Path) -> None:
    keys = {}
    for team in ("one", "two"):
        work = tmp_path / team / "work"
        work.mkdir(parents=True)
        git(tmp_path, "init", "-q", "--bare", f"{team}/server.git")
        git(work, "init", "-q")
        git(work, "remote", "add", "origin", "../server.git")
        keys[team] = project.project_key(work)
        git(tmp_path, "clone", "-q", f"{team}/server.git", f"{team}/clone")
        assert project.project_key(tmp_path / team / "clone") == keys[team]
    assert keys["one"] != keys["two"]


ENDS = {
    "key": lambda: Failed(data=KeyError("x")),
    "crash": lambda: Crashed(message="Flow run infrastructure exited\nwith 137"),
    "cancel": lambda: Cancelled(message=""),
    "nothing": lambda: Completed(data=None),
    "blank": lambda: Failed(data=GraftlineError("\n \n")),
    "good": lambda: Completed(data=NEW),
}


def test_an_error_of_any_kind_is_its_pipelines_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def end(pipeline: str, wait_seconds: float, *, return_state: bool) -> State[Any]:
        if pipeline == "raise":
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        if pipeline == "exit":
            raise SystemExit(3)
        return ENDS[pipeline]()

    with disable_run_logger():
        lines = dispatch.run_all([*ENDS, "raise", "exit", "good"], retrain=end, wait_seconds=0, at_once=1)

    assert [line.pipeline for line in lines if line.outcome] == ["good", "good"]
    problems = {line.pipeline: line.problem for line in lines if line.problem}
    assert problems["key"].startswith("KeyError: 'x'")
    assert problems["raise"].startswith("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff")
    assert "tests/workflow/test_dispatch.py:" in problems["raise"], "where it happened"
    assert problems["exit"].startswith("SystemExit: 3")
    assert set(problems) == {"key", "crash", "cancel", "nothing", "blank", "raise", "exit"}
    rows = {line.pipeline: line.as_row() for line in lines}
    assert rows["key"]["investigate with"] == "python -m flows.retrain key"
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] != []


def test_an_interrupt_ends_the_night(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> State[Any]:
        raise KeyboardInterrupt

    with disable_run_logger(), pytest.raises(KeyboardInterrupt):
        dispatch.run_all(["one"], retrain=interrupted, wait_seconds=0, at_once=1)
