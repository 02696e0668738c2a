"""A real Prefect server, real workers, and a scratch project that they deploy and run: all below one folder."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.flows.postgres import postgres
from tests.line.project import ROOT, read_yaml, write_yaml
from tests.ports import free_port
from tests.workflow.stand_in_project import make_repository
from tests.workflow.tiny_project import PIPELINE, commit

SECOND = "more-pets"
BIN = Path(sys.executable).parent
# As fast as the server's own checks allow; a day's defaults would only make the test wait.
QUICK = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "2",
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
    "PREFECT_SERVER_DEPLOYMENT_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.5)


@dataclass(frozen=True)
class Server:
    """A server with everything that it and its workers write below ``folder``."""

    folder: Path
    url: str
    database: str | None
    """PostgreSQL's address; None: SQLite, which locks itself for a minute now and then when several runs write."""

    @property
    def environment(self) -> dict[str, str]:
        """For whoever talks to it."""
        own = {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "DVC_NO_ANALYTICS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            # The deployment's first step calls `python`.
            "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
            "GRAFTLINE_REPOSITORY": str(self.folder / "repository"),
            "GRAFTLINE_BRANCH": "main",
            "GRAFTLINE_CACHE": str(self.folder / "cache"),
            "GRAFTLINE_DVC_CACHE": str(self.folder / "dvc-cache"),
            "TMPDIR": str(self.folder / "checkouts"),
            "STAND_IN_LOG": str(self.folder / "started"),
            "STAND_IN_HOLD": str(self.folder / "hold"),
        }
        if self.database:
            own["PREFECT_API_DATABASE_CONNECTION_URL"] = self.database
        return os.environ | QUICK | own

    def command(self, *arguments: str, **more: str) -> str:
        """Run a command in the repository; its output."""
        done = subprocess.run(
            arguments,
            cwd=self.folder / "repository",
            env=self.environment | more,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def started(self) -> list[str]:
        """Stages that were started, in order, as ``stage@pipeline``."""
        log = self.folder / "started"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.is_file() else []

    def process_of(self, stage: str) -> int:
        """The process that a stage was started as."""
        lines = (self.folder / "started").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0].startswith(stage))


@contextlib.contextmanager
def serve(folder: Path, make: Callable[[Path, Path], None] | None = None) -> Iterator[Server]:
    """A server and the project's repository, which ``make`` writes; by default `make_project`."""
    for name in ("checkouts", "prefect"):
        (folder / name).mkdir()
    (make or make_project)(folder / "repository", folder / "store")
    port = free_port()
    command = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with postgres() as database, (folder / "server.log").open("w") as log:
        server = Server(folder, f"http://127.0.0.1:{port}/api", database)
        process = subprocess.Popen(command, cwd=folder, env=server.environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: is_healthy(server.url), 400, "the Prefect server")
            yield server
        finally:
            kill_tree(process.pid)
            process.wait()


def is_healthy(url: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def make_project(folder: Path, store: Path) -> None:
    """The stand-in project with the real flows, two pipelines, and a store outside the checkout."""
    make_repository(folder)
    document = read_yaml(folder)
    pipeline = document["pipelines"][PIPELINE]
    pipeline["release"]["store"] = str(store)
    pipeline["train"]["steps"] = 40
    document["pipelines"][SECOND] = {**pipeline, "train": {**pipeline["train"], "steps": 41}}
    write_yaml(folder, document)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "flows", folder / "flows", ignore=ignored)
    write_deployments(folder)
    commit(folder, "flows")


def write_deployments(folder: Path) -> None:
    """The project's deployments; nothing runs by the clock."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    for deployment in deployments["deployments"]:
        deployment.pop("schedules", None)
    (folder / "prefect.yaml").write_text(yaml.safe_dump(deployments, sort_keys=False))


def deploy(server: Server) -> None:
    """Make the work pool and register every deployment."""
    prefect = str(BIN / "prefect")
    server.command(prefect, "--no-prompt", "work-pool", "create", "graftline", "--type", "process")
    server.command(prefect, "--no-prompt", "deploy", "--all")


@contextlib.contextmanager
def worker(server: Server, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker on the pool ``graftline``; what it started is gone with it."""
    command = [BIN / "prefect", "worker", "start", "--pool", "graftline", "--name", name]
    with (server.folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=server.folder, env=server.environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


def kill_tree(pid: int) -> None:
    """Kill -9 a process and what it started, except stages and what holds them: they have to notice by themselves."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                if not any("lifeline" in word or "tasks." in word or word == "dvc" for word in process.cmdline()):
                    process.kill()
