"""A team's week as it runs in production: a Prefect server, a worker, releases on an S3 server, people with keys.

The base is tiny and a stage takes seconds. One stage waits where the test asks it to, so that somebody else can be at
work in the middle of a run.
"""

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun

from graftline.digest import Digest
from graftline.registry import channel, releases
from graftline.registry.channel import Entry
from graftline.registry.store import Store, open_store
from graftline.release.manifest import GateVerdict
from graftline.workflow.worktree import write_cache_dir
from tests.flows.deployed import BIN, Server, deploy, serve, wait_until, worker, write_deployments
from tests.line.project import read_yaml, write_yaml
from tests.registry.people import People
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, ministack_server
from tests.workflow.tiny_project import PIPELINE, change, commit, git, make_repository, make_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STORE = f"s3://{BUCKET}/team"
BROKEN = "strays"
LIMIT = 1200.0
"""Seconds for one run; on a quiet machine it takes less than one."""
FIRST_ROWS, NEW_ROWS, OTHER_ROWS = 300, 360, 330

MAIN = '    stage.main("gate", run)\n'
WAIT = f"""\
    import os
    import time

    with open(os.environ["STAND_IN_LOG"], "a", encoding="utf-8") as log:
        log.write(f"gate {{os.getpid()}}\\n")
    while os.path.exists(os.environ["STAND_IN_HOLD"]):
        time.sleep(0.1)
{MAIN}"""


@dataclass(frozen=True)
class Week:
    """Everything that the week has: `server.folder` holds the repository and what the worker's machine keeps."""

    server: Server
    client: SyncPrefectClient
    people: People
    store: Store

    @property
    def repository(self) -> Path:
        """Where people work, and what the worker clones."""
        return self.server.folder / "repository"

    def command(self, *arguments: str, folder: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """A command of the project, as a person starts it."""
        return subprocess.run(
            [str(BIN / "python"), "-m", *arguments],
            cwd=folder or self.repository,
            env=self.server.environment | more,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def start(self, name: str) -> str:
        """Start a deployment by hand, wait until its run has ended, and return how."""
        deployment = self.client.read_deployment_by_name(f"{name}/{name}")
        run = self.client.create_flow_run_from_deployment(deployment.id)
        return self.ended(run)

    def ended(self, run: FlowRun) -> str:
        """How a run ended, when it has."""

        def has_ended() -> bool:
            state = self.client.read_flow_run(run.id).state
            return bool(state and state.is_final())

        wait_until(has_ended, LIMIT, f"the end of {run.name}")
        state = self.client.read_flow_run(run.id).state
        return f"{state.name}: {state.message}" if state and state.message else f"{state and state.name}"

    def retrainings(self) -> list[FlowRun]:
        """Every run of the deployment `retrain`, in the order in which they were started."""
        named = DeploymentFilter(name=DeploymentFilterName(any_=["retrain"]))
        return sorted(self.client.read_flow_runs(deployment_filter=named), key=lambda run: str(run.created))

    def releases(self) -> list[str]:
        """The pipeline's releases, oldest first."""
        return sorted(releases.list_versions(self.store, PIPELINE))

    def entries(self) -> tuple[Entry, ...]:
        """What production held, oldest first; every digest is checked."""
        return channel.read(self.store, PIPELINE, "production").entries

    def held(self) -> list[str]:
        return [entry.change.version for entry in self.entries()]

    def digest(self, version: str) -> Digest:
        return releases.load_manifest(self.store, PIPELINE, version).digest

    def verdict(self, version: str) -> GateVerdict:
        """What a release says of itself; every byte of it is read."""
        return releases.verify(self.store, PIPELINE, version).verdict

    def approve(self, version: str) -> None:
        """The reviewer's signature."""
        key = str(self.people.private_key("eve"))
        done = self.command("graftline.cli", "approve", PIPELINE, version, "--key", key)
        assert done.returncode == 0, done.stdout + done.stderr

    def promote(self, version: str) -> subprocess.CompletedProcess[str]:
        return self.command("graftline.cli", "promote", PIPELINE, version, "--as", "ada", "--reason", "reviewed")

    def clean(self) -> set[str]:
        """Remove what nobody needs, however young; the versions that went."""
        before = set(self.releases())
        done = self.command("graftline.cli", "gc", PIPELINE, "--days", "0", "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        return before - set(self.releases())

    def write_rows(self, count: int) -> None:
        """Other rows, committed on the branch that is checked out."""
        write_rows(self.repository, count)
        commit(self.repository, f"{count} rows")

    def branch(self, name: str, at: str = "main") -> None:
        git(self.repository, "checkout", "-q", "-b", name, at)

    def evaluate(self, head: str) -> tuple[int, str, dict[str, Any]]:
        """Exit code, comment and result of a pull request, as CI asks for them."""
        git(self.repository, "checkout", "-q", "main")
        out = self.server.folder / head
        done = self.command("flows.evaluate_pr", "--base", "main", "--head", head, "--out", str(out))
        assert done.returncode in (0, 1, 3), done.stdout + done.stderr
        result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
        return done.returncode, (out / "comment.md").read_text(encoding="utf-8"), result


def write_rows(folder: Path, count: int) -> None:
    text = "".join(json.dumps(row) + "\n" for row in make_rows(count))
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def make_project(folder: Path, people: People) -> None:
    """One pipeline that releases on S3, a channel that asks for a reviewer, and a gate that waits if it is told to."""
    make_repository(folder)
    # Forty steps teach a random base which words rows are made of: 5.2 nats a token instead of 6.3.
    change(folder, "train", steps=40, learning_rate=0.02)
    change(folder, "package", merged=False)
    change(folder, "release", store=STORE)
    document = read_yaml(folder)
    document["pipelines"][PIPELINE]["gates"] = {"answers": gate(margin=0.1)}
    approvals = {"count": 1, "roles": ["reviewer"], "other_than_builder": True}
    write_yaml(folder, {**document, "channels": {"production": {"approvals": approvals}}})
    write_rows(folder, FIRST_ROWS)
    (folder / "keys.yaml").write_text(people.text, encoding="utf-8")
    code = (folder / "tasks" / "gate.py").read_text(encoding="utf-8")
    assert MAIN in code
    (folder / "tasks" / "gate.py").write_text(code.replace(MAIN, WAIT), encoding="utf-8")
    write_deployments(folder)
    # The worker's machine is where people work, too: both find what the other has made.
    write_cache_dir(folder, folder.parent / "dvc-cache")
    commit(folder, "the team's project")


def gate(margin: float) -> dict[str, Any]:
    rule = {"metric": "nll", "direction": "lower", "test": "non-inferiority", "against": "production"}
    return {**rule, "margin": margin}


@pytest.fixture
def week(tmp_path: Path) -> Iterator[Week]:
    for name in ("keys", "prefect-home"):
        (tmp_path / name).mkdir()
    people = People(tmp_path / "keys")
    with pytest.MonkeyPatch.context() as patch, ministack_server() as endpoint:
        make_bucket(endpoint)
        absent = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), str(tmp_path / "absent"))
        own = {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
        signing = {
            "GRAFTLINE_SIGNING_KEY": str(people.private_key("bob")),
            "GRAFTLINE_CHANNEL_KEY": str(people.private_key("pia")),
        }
        for name, value in (CREDENTIALS | absent | own | signing).items():
            patch.setenv(name, value)
        (tmp_path / "machine").mkdir()
        with (
            serve(tmp_path / "machine", lambda folder, _: make_project(folder, people)) as server,
            SyncPrefectClient(server.url) as client,
        ):
            deploy(server)
            yield Week(server, client, people, open_store(STORE))


@pytest.mark.long
def test_a_week_of_a_team(week: Week) -> None:
    git(week.repository, "branch", "words")  # A pull request that will be behind main.
    with worker(week.server, "machine"):
        first = first_night(week)
        second = new_rows(week, first)
        third = production_moves_in_the_middle_of_a_run(week, first, second)
        fourth = second_night(week, second, third)
    pull_requests(week)
    the_week_ends(week, [first, second, fourth], third)


def first_night(week: Week) -> str:
    """The night releases; nobody promotes what no reviewer has signed."""
    assert week.start("nightly") == "Completed"
    (version,) = week.releases()
    assert (week.verdict(version).against, week.verdict(version).release) == ("base", None)

    refused = week.promote(version)
    assert refused.returncode == 2
    assert "needs 1 more" in refused.stderr
    assert week.entries() == ()

    week.approve(version)
    assert week.promote(version).returncode == 0
    (entry,) = week.entries()
    assert (entry.change.version, entry.change.release) == (version, week.digest(version))
    assert [signed.statement.approver for signed in entry.change.approvals] == ["eve"]
    return version


def new_rows(week: Week, first: str) -> str:
    """Rows that are new are trained on once, however often somebody looks."""
    before = len(week.retrainings())
    assert week.start("watch") == "Completed"
    assert len(week.retrainings()) == before, "nothing was new"

    week.write_rows(NEW_ROWS)
    for _ in range(2):
        assert week.start("watch") == "Completed"
    assert len(week.retrainings()) == before + 1
    assert week.ended(week.retrainings()[-1]) == "Completed"
    assert week.start("watch") == "Completed"
    assert len(week.retrainings()) == before + 1

    assert week.releases()[0] == first
    (second,) = week.releases()[1:]
    assert (week.verdict(second).against, week.verdict(second).release) == (first, week.digest(first))
    assert week.held() == [first], "a release is in no channel until somebody promotes it"
    assert week.clean() == set(), "one is in production, the other waits"
    return second


def production_moves_in_the_middle_of_a_run(week: Week, first: str, second: str) -> str:
    """The rows are the old ones again, which is new. The run's release says what it was scored against."""
    hold, log = week.server.folder / "hold", week.server.folder / "started"
    hold.touch()
    log.unlink()
    before = len(week.retrainings())
    week.write_rows(FIRST_ROWS)
    assert week.start("watch") == "Completed"
    assert len(week.retrainings()) == before + 1
    wait_until(lambda: week.server.started() == ["gate"], LIMIT, "the gate")
    week.approve(second)
    assert week.promote(second).returncode == 0
    assert week.held() == [first, second]
    assert week.clean() == set(), "one is in production, the other may be gone back to"
    hold.unlink()
    assert week.ended(week.retrainings()[-1]) == "Completed"

    assert week.releases()[:2] == [first, second]
    (third,) = week.releases()[2:]
    assert (week.verdict(third).against, week.verdict(third).release) == (first, week.digest(first))
    week.approve(third)
    refused = week.promote(third)
    assert refused.returncode == 2
    assert f"compared with {first}, but production holds {second} now" in refused.stderr
    assert week.held() == [first, second]
    assert week.clean() == set(), "it was approved"
    return third


def second_night(week: Week, second: str, third: str) -> str:
    """A pipeline whose store nobody has made fails by itself; the other is judged against what production holds now."""
    document = read_yaml(week.repository)
    stray = copy.deepcopy(document["pipelines"][PIPELINE])
    stray["data"]["source"] = f"path:{BROKEN}.jsonl"
    stray["release"]["store"] = f"s3://nobody-s-{BUCKET}/team"
    document["pipelines"][BROKEN] = stray
    shutil.copy(week.repository / "rows.jsonl", week.repository / f"{BROKEN}.jsonl")
    write_yaml(week.repository, document)
    commit(week.repository, "another pipeline")

    assert week.start("nightly").startswith("Failed: ")

    (page,) = [page for page in week.client.read_latest_artifacts() if page.key == "night"]
    failed = str(page.data).partition("### Released")[0]
    assert "1 failed, 0 stopped by a gate, 1 released" in failed
    assert f"| {BROKEN} |" in failed
    assert f"nobody-s-{BUCKET}" in failed
    (fourth,) = week.releases()[3:]
    assert fourth > third
    assert (week.verdict(fourth).against, week.verdict(fourth).release) == (second, week.digest(second))
    return fourth


def pull_requests(week: Week) -> None:
    """What people propose meanwhile, by the command that CI calls."""
    git(week.repository, "checkout", "-q", "words")
    (week.repository / "README.md").write_text("other words\n", encoding="utf-8")
    commit(week.repository, "words")
    week.branch("ruined")
    change(week.repository, "train", learning_rate=0.003)
    commit(week.repository, "ruined")
    week.branch("excused", "ruined")
    git(week.repository, "reset", "-q", "--soft", "main")
    change(week.repository, "gates", answers=gate(margin=0.5))
    commit(week.repository, "ruined, and a gate that lets it pass")
    week.branch("rows")
    week.write_rows(OTHER_ROWS)

    code, comment, result = week.evaluate("words")
    assert (code, result["outcome"], result["pipelines"]) == (0, "pass", [])
    assert comment.startswith("## graftline: nothing to evaluate")

    code, comment, result = week.evaluate("ruined")
    (found,) = result["pipelines"]
    assert (code, found["pipeline"], found["outcome"], result["settings"]) == (1, PIPELINE, "fail", [])
    assert {each["name"]: each["outcome"] for each in found["comparison"]}["answers"] == "fail", comment

    code, comment, result = week.evaluate("excused")
    (found,) = result["pipelines"]
    assert (code, found["outcome"], found["stages_run"]) == (1, "fail", ["gate"]), comment
    assert "#### Gate: ✅ pass" in comment, "by its own margin it would pass"
    (setting,) = result["settings"]
    assert (setting["pipeline"], setting["key"].endswith("margin")) == (PIPELINE, True)
    assert comment.index(setting["key"]) < comment.index(f"### {PIPELINE}")

    code, comment, result = week.evaluate("rows")
    (found,) = result["pipelines"]
    assert (code, found["pipeline"], found["outcome"]) == (3, PIPELINE, "needs a look"), comment
    assert any("rows" in setting["key"] for setting in result["settings"]), result["settings"]
    assert git(week.repository, "status", "--porcelain") == ""


def the_week_ends(week: Week, promoted: list[str], passed_over: str) -> None:
    """One history, which a machine that has never seen it reads from the store; what nobody needs can go."""
    week.approve(promoted[-1])
    assert week.promote(promoted[-1]).returncode == 0

    assert week.clean() == {passed_over}
    assert week.releases() == promoted

    elsewhere = week.server.folder / "elsewhere"
    git(week.repository, "clone", "-q", str(week.repository), str(elsewhere))
    cache = str(week.server.folder / "another-cache")
    shown = week.command("graftline.cli", "history", PIPELINE, "--json", folder=elsewhere, GRAFTLINE_CACHE=cache)
    history = json.loads(shown.stdout)
    assert [(each["number"], each["change"]["version"]) for each in history] == list(enumerate(promoted, start=1))
    chain = [None, *(str(entry.digest) for entry in week.entries())]
    assert [each["previous"] for each in history] == chain[:-1]
    assert [each["change"]["release"] for each in history] == [str(week.digest(version)) for version in promoted]
    verified = week.command("graftline.cli", "verify", PIPELINE, promoted[-1], folder=elsewhere, GRAFTLINE_CACHE=cache)
    assert verified.returncode == 0, verified.stderr
    assert "signed by bob" in verified.stdout
