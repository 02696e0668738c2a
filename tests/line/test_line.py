"""The whole line on the real base and real rows, smaller than the demo: fewer rows and steps, the same code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graftline.registry.releases import list_versions, verify
from graftline.registry.store import open_store
from tests.line.project import ROOT, copy_project, environment, kill_during, read_yaml, retrain, write_yaml

PIPELINE = "wordnet-animal-or-plant"
SMALLER = {"train.steps": 16, "train.checkpoint_every": 4, "data.evaluation_rows": 100, "data.max_rows": 400}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cache() -> Path:
    """The checkout's own cache: fetched once for `make demo` and for the tests."""
    return ROOT / ".cache" / "graftline"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("line") / "my project ü", SMALLER, PIPELINE)


@pytest.fixture(scope="module")
def killed(project: Path, cache: Path) -> str:
    """The first attempt: power fails in the middle of training."""
    return kill_during(project, cache, PIPELINE, r"train  [5-9]/16 steps")


@pytest.fixture(scope="module")
def first(project: Path, cache: Path, killed: str) -> subprocess.CompletedProcess[str]:
    """The second attempt, which goes on where the first one was killed."""
    done = retrain(project, cache, PIPELINE)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done


def load(project: Path, stage: str, name: str):
    return json.loads((project / "runs" / PIPELINE / stage / name).read_text())


def test_the_line_ends_in_a_verified_release(project: Path, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stdout + first.stderr
    store = open_store(str(project / "store"))
    version = load(project, "release", "release.json")["version"]
    assert list_versions(store, PIPELINE) == [version]
    assert verify(store, PIPELINE, version).verdict.outcome == "pass"
    assert version in first.stdout
    assert "report.html" in first.stdout


def test_a_run_after_a_kill_repeats_no_finished_stage_and_goes_on_with_the_training(
    killed: str, first: subprocess.CompletedProcess[str]
) -> None:
    log = first.stdout + first.stderr
    for stage in ("fetch", "validate"):
        assert f"Running stage '{stage}@{PIPELINE}'" in killed
        assert f"Running stage '{stage}@{PIPELINE}'" not in log
    # A checkpoint every four steps; the kill comes after a line that says 5 to 9, so the second may be written by then.
    assert re.search(r"resuming from step [48]\b", log)


def test_training_on_real_rows_made_the_model_better(project: Path, first: subprocess.CompletedProcess[str]) -> None:
    metrics = load(project, "evaluate", "metrics.json")
    assert metrics["candidate"]["accuracy"] > metrics["base"]["accuracy"] + 0.05
    assert metrics["candidate"]["nll"] < metrics["base"]["nll"]


def test_planned_and_measured_memory_are_written_and_shown(
    project: Path, first: subprocess.CompletedProcess[str]
) -> None:
    memory = load(project, "train", "memory.json")
    planned = {part["name"]: part["low_bytes"] for part in memory["planned"]["parts"]}
    assert memory["measured_parts_bytes"]["weights"] == pytest.approx(planned["weights"], rel=0.01)
    assert memory["measured_peak_bytes"] > planned["weights"] / 2  # of a process: its heap keeps and gives as it likes
    assert "Memory in training" in (project / "runs" / PIPELINE / "package" / "report.html").read_text()


def test_progress_was_shown_with_rate_and_time_left(first: subprocess.CompletedProcess[str]) -> None:
    log = first.stdout + first.stderr
    assert "steps/s" in log
    assert "s left" in log


def test_a_second_run_runs_no_stage(project: Path, cache: Path, first: subprocess.CompletedProcess[str]) -> None:
    again = retrain(project, cache, PIPELINE)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "none, all up to date" in again.stdout


@pytest.mark.long
def test_another_gate_margin_reruns_only_the_gate_and_what_follows(
    project: Path, cache: Path, first: subprocess.CompletedProcess[str]
) -> None:
    document = read_yaml(project)
    document["pipelines"][PIPELINE]["gates"]["accuracy"]["margin"] = 0.04
    write_yaml(project, document)
    again = retrain(project, cache, PIPELINE)
    assert again.returncode == 0, again.stdout + again.stderr
    for stage in ("gate", "package", "release"):
        assert f"Running stage '{stage}@{PIPELINE}'" in again.stdout + again.stderr
    for stage in ("fetch", "validate", "init", "train", "evaluate", "merge"):
        assert f"Running stage '{stage}@{PIPELINE}'" not in again.stdout + again.stderr


def test_a_misspelt_key_ends_with_exit_code_2_and_the_right_name(project: Path, cache: Path) -> None:
    document = read_yaml(project)
    document["pipelines"][PIPELINE]["adapter"]["rnak"] = 4
    broken = project.parent / "broken"
    broken.mkdir(exist_ok=True)
    write_yaml(broken, document)
    done = subprocess.run(
        [sys.executable, "-m", "tasks.gate", PIPELINE],
        cwd=broken,
        env=environment(project, cache),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "rnak" in done.stderr
    assert "rank" in done.stderr
    assert "Traceback" not in done.stderr
