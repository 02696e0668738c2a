"""A night: every pipeline has its turn, whatever became of the one before."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from prefect.states import Completed, Failed, State

from flows import nightly as night
from flows.retrain import Outcome
from graftline.errors import GraftlineError
from tests.flows.tiny_project import commit, make_repository, settings
from tests.line.project import ROOT, read_yaml, write_yaml

BIN = Path(sys.executable).parent


def outcome(pipeline: str, verdict: str) -> Outcome:
    version = f"{pipeline}-1" if verdict == "pass" else None
    return Outcome(pipeline, verdict, "", version, None, "report.html", ("train", "gate"))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, str]]:
    """The rows of the night's table; pipelines end as their names say."""

    def end(pipeline: str, wait_seconds: float, *, return_state: bool) -> State[Any]:
        assert return_state
        if pipeline == "broken":
            return Failed(data=GraftlineError("the source is gone\nmore about it"))
        return Completed(data=outcome(pipeline, pipeline))

    rows: list[dict[str, str]] = []
    monkeypatch.setattr(night, "retrain", end)
    monkeypatch.setattr(night, "create_table_artifact", lambda given, **_: rows.extend(given))
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pipelines.yaml", tmp_path)
    document = read_yaml(tmp_path)
    one = next(iter(document["pipelines"].values()))
    document["pipelines"] = {"pass": one, "broken": one, "fail": one}
    write_yaml(tmp_path, document)
    return rows


def test_a_pipeline_that_fails_does_not_stop_the_others_and_fails_the_night(table: list[dict[str, str]]) -> None:
    with (
        disable_run_logger(),
        pytest.raises(GraftlineError, match=r"1 of 3 pipelines failed\nbroken: the source is gone$"),
    ):
        night.nightly.fn()
    assert [(row["pipeline"], row["verdict"], row["release"]) for row in table] == [
        ("broken", "error", "none"), ("fail", "fail", "none"), ("pass", "pass", "pass-1"),
    ]  # fmt: skip
    assert table[0]["problem"] == "the source is gone"


def test_a_gate_that_says_no_is_no_error_of_the_night(table: list[dict[str, str]]) -> None:
    with disable_run_logger():
        lines = night.nightly.fn(["fail", "pass"])
    assert [line.pipeline for line in lines] == ["fail", "pass"]
    assert [row["stages run"] for row in table] == ["train, gate", "train, gate"]


def test_an_unknown_pipeline_is_refused_before_anything_runs(table: list[dict[str, str]]) -> None:
    with (
        disable_run_logger(),
        pytest.raises(GraftlineError, match=r"wordnet is not in pipelines.yaml; expected some of broken, fail, pass"),
    ):
        night.nightly.fn(["pass", "wordnet"])
    assert table == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a real Prefect server, a worker and a repository of two pipelines, one without its rows."""
    repository = make_repository(tmp_path / "repository")
    document = read_yaml(repository)
    # A clone has no store of its own: releases go to a folder beside the repository.
    good = settings() | {"release": {"store": str(tmp_path / "store"), "channel": "production"}}
    broken = good | {"data": settings()["data"] | {"source": "path:gone.jsonl"}}
    document["pipelines"] = {"broken": broken, "pets": good}
    write_yaml(repository, document)
    commit(repository, "two pipelines")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "GRAFTLINE_REPOSITORY": repository.as_uri(),
        "GRAFTLINE_BRANCH": "main",
        "GRAFTLINE_CACHE": str(tmp_path / "cache"),
        "GRAFTLINE_DVC_CACHE": str(tmp_path / "dvc"),
    }
    started = [start(["server", "start", "--host", "127.0.0.1", "--port", str(port)], tmp_path, environment)]
    try:
        wait_for(f"http://127.0.0.1:{port}/api/health")
        prefect("work-pool create graftline --type process", repository, environment)
        prefect("deploy --all", repository, environment)
        (tmp_path / "worker").mkdir()
        started.append(start(["worker", "start", "--pool", "graftline"], tmp_path / "worker", environment))
        yield environment
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def start(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log = (folder / f"{arguments[0]}.log").open("wb")
    command = [str(BIN / "prefect"), *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def prefect(arguments: str, folder: Path, environment: dict[str, str]) -> str:
    command = [str(BIN / "prefect"), "--no-prompt", *arguments.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(address: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return
    raise TimeoutError(address)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_deployed_night_runs_in_a_clone_and_releases_what_it_can(server: dict[str, str], tmp_path: Path) -> None:
    command = [str(BIN / "prefect"), "--no-prompt", "deployment", "run", "nightly/nightly", "--watch"]
    done = subprocess.run(command, cwd=tmp_path, env=server, capture_output=True, text=True)
    log = (tmp_path / "worker" / "worker.log").read_text()
    assert done.returncode != 0, done.stdout
    assert "1 of 2 pipelines failed" in log
    releases = list((tmp_path / "store" / "releases" / "pets").glob("*/manifest.json"))
    assert len(releases) == 1, log
    assert not (tmp_path / "store" / "releases" / "broken").exists()
    assert not (tmp_path / "repository" / "runs").exists()
