"""Sweeps end to end: stages that take no time in threads, and real stages on a Dask and a Ray cluster."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.task_runners import ThreadPoolTaskRunner
from prefect_dask import DaskTaskRunner
from prefect_ray import RayTaskRunner

from graftline.errors import ConfigError, GraftlineError
from graftline.workflow.sweeping import axis, task_runner
from tests.line.project import ROOT, environment
from tests.workflow import stand_in_project, tiny_project
from tests.workflow.tiny_project import PIPELINE, git


def sweep(folder: Path, cache: Path, *arguments: str, library: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in ``folder``; flows and library come from ``library``, each cell's tasks from its checkout."""
    command = [sys.executable, "-P", "-m", "flows.sweep", PIPELINE, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(library, cache), capture_output=True, text=True)


def results(folder: Path) -> dict[Path, dict[str, Any]]:
    return {path: json.loads(path.read_text()) for path in (folder / f"runs/{PIPELINE}/sweep/cells").glob("*.json")}


@pytest.mark.long
@pytest.mark.slow
def test_cells_that_are_done_are_not_run_again_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    folder = stand_in_project.make_repository(tmp_path / "my project")
    first = sweep(folder, tmp_path, "--set", "train.steps=8,40", "--seeds", "0", "--workers", "2", library=ROOT)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "train.steps=40      1  0.9" in first.stdout
    before = results(folder)
    assert [one["stages_run"][-2:] for one in before.values()] == [["train", "evaluate"]] * 2
    assert git(folder, "status", "--porcelain", "--untracked-files=no") == ""
    assert len(git(folder, "worktree", "list").splitlines()) == 1

    second = sweep(folder, tmp_path, "--set", "train.learning_rate=0.01,9.0", "--seeds", "0", library=ROOT)
    assert second.returncode == 2
    assert "1 of 1 cell failed" in second.stderr  # the other one is train.steps=8, done above under another name
    assert "train.learning_rate=9.0, seed 0: stage" in second.stderr
    assert "error: the loss is not finite" in second.stderr
    assert results(folder) == before

    third = sweep(folder, tmp_path, "--seeds", "0,1", "--minutes", "0", library=ROOT)
    assert third.returncode == 0, third.stderr
    assert "not done: 1 cell; run again to go on" in third.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_real_grid_runs_on_a_cluster(tmp_path: Path, runner: str) -> None:
    folder = tiny_project.make_repository(tmp_path / "project")
    cluster = ("--runner", runner, "--workers", "2")
    done = sweep(folder, tmp_path, "--set", "train.steps=2", "--seeds", "0,1", *cluster, library=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("Starting temporary server") == 1  # not one a worker
    found = list(results(folder).values())
    assert sorted(one["seed"] for one in found) == [0, 1]
    assert all(len(one["results"]["history"]) == 2 for one in found)
    assert found[0]["results"]["history"] != found[1]["results"]["history"]
    assert all(one["settings"]["train"]["steps"] == 2 for one in found)
    page = (folder / f"runs/{PIPELINE}/sweep/sweep.html").read_text()
    assert page.count('class="seed"') == 2
    assert 'class="interval seeds"' in page


@pytest.mark.slow
@pytest.mark.long
def test_cells_trained_side_by_side_have_the_results_that_they_have_alone(tmp_path: Path) -> None:
    found = []
    for trainings in ("1", "2"):
        folder = tiny_project.make_repository(tmp_path / trainings / "project")
        tiny_project.change(folder, "quantize", method="nf4")
        grid = ("--set", "train.steps=3,5", "--side-by-side", trainings)
        done = sweep(folder, tmp_path / trainings, *grid, library=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append({path.name: one["results"] for path, one in results(folder).items()})
    alone, beside = found
    assert len(alone) == 2
    for name, one in beside.items():
        assert one["side_by_side"]["cells"] == 2
        assert one["history"] == alone[name]["history"]
        assert one["evaluate"] == alone[name]["evaluate"]
        assert "side_by_side" not in alone[name]


def test_the_runner_is_bounded_and_an_address_is_for_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    local = task_runner("local", workers=3)
    assert isinstance(local, ThreadPoolTaskRunner)
    assert local._max_workers == 3
    dask = task_runner("dask", workers=3)
    assert isinstance(dask, DaskTaskRunner)
    assert dask.cluster_kwargs["n_workers"] == 3
    ray = task_runner("ray", workers=3)
    assert isinstance(ray, RayTaskRunner)
    assert ray.init_kwargs["num_cpus"] == 3
    with pytest.raises(GraftlineError, match=r"given address tcp://x:1 with runner local"):
        task_runner("local", workers=1, address="tcp://x:1")
    monkeypatch.setitem(sys.modules, "prefect_dask.task_runners", None)
    with pytest.raises(GraftlineError, match=r"runner dask needs .*; run: pip install 'graftline\[scale\]'"):
        task_runner("dask", workers=1)


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("adapter.rank=4,8", "adapter.rank", [4, 8]),
        ("train.learning_rate=1e-4,0.5", "train.learning_rate", [1e-4, 0.5]),
        ("adapter.targets=[q_proj, v_proj],all-linear", "adapter.targets", [["q_proj", "v_proj"], "all-linear"]),
        ("train.packing=true", "train.packing", [True]),
    ],
)
def test_values_of_an_axis_are_yaml(text: str, key: str, values: list[object]) -> None:
    assert axis(text) == (key, values)


@pytest.mark.parametrize("text", ["adapter.rank", "adapter.rank=", "=4"])
def test_an_axis_without_key_or_values_says_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        axis(text)


def test_the_command_line_has_examples() -> None:
    done = subprocess.run([sys.executable, "-m", "flows.sweep", "--help"], capture_output=True, text=True, check=True)
    assert "python -m flows.sweep wordnet-category --set adapter.rank=4,8,16" in done.stdout
