"""Stages that hand their work over: real processes and a real base, in a project whose stages only load that base."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from graftline import handover
from graftline.workflow.environment import for_child
from graftline.workflow.stage_worker import StageWorkers
from tests.line.project import ROOT, write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.tiny_project import PIPELINE, tiny_settings

pytestmark = pytest.mark.slow

STAGE = '''\
"""A stage that does what TOLD says."""

import os
import sys
import time

from graftline.errors import GraftlineError
from graftline.train.preemption import Preemption
from graftline.errors import PreemptedError
from graftline.workflow import stage

print("imported by", os.getpid(), flush=True)


def run(pipeline, at):
    """Load the base, then do it."""
    told = os.environ["TOLD"]
    print("told", told, "in", at.root.name, "by", os.getpid(), flush=True)
    if told == "sleep":
        time.sleep(600)
    if told == "train":
        with Preemption() as preemption:
            while not preemption.is_asked:
                time.sleep(0.05)
        (at.root / "kept").touch()
        raise PreemptedError("kept")
    if told == "die":
        os._exit(9)
    if told == "refuse":
        raise GraftlineError("a reason")
    if told == "fail":
        raise ZeroDivisionError("a bug")
    from graftline.weights import kept_base

    kept_base.load_base(at.root / "base")
    print("loads", kept_base._kept and kept_base._kept.num_loads, file=sys.stderr)


def main():
    stage.main(os.path.basename(sys.argv[0]).removesuffix(".py"), run)


if __name__ == "__main__":
    main()
'''


KEPT = "train: the base is in memory already\nloads 1\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, and another one of the same code beside it: ``cell``."""
    folder = tmp_path_factory.mktemp("sweep") / "code"
    (folder / "tasks").mkdir(parents=True)
    shutil.copyfile(ROOT / "tasks" / "__init__.py", folder / "tasks" / "__init__.py")
    for name in handover.STAGES:
        (folder / "tasks" / f"{name}.py").write_text(STAGE, encoding="utf-8")
    write_yaml(folder, {"pipelines": {PIPELINE: tiny_settings()}, "channels": {"production": {}}})
    make_tiny_llama(folder / "base")
    shutil.copytree(folder, folder.with_name("cell"))
    return folder


@pytest.fixture(scope="module")
def workers(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageWorkers]:
    made = StageWorkers(project, tmp_path_factory.mktemp("w"))
    yield made
    made.close()


def start(folder: Path, told: str, worker: Mapping[str, str], stage: str = "train") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"tasks.{stage}", PIPELINE],
        cwd=folder,
        env=for_child(folder) | {"TOLD": told} | worker,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(workers: StageWorkers, folder: Path, told: str) -> tuple[int, str, str]:
    """Exit code and outputs of a stage that hands its work over."""
    with workers.borrow() as worker:
        wait_for(Path(worker[handover.VARIABLE]))
        process = start(folder, told, worker)
        out, errors = process.communicate()
    return process.returncode, out, errors


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def test_stages_of_several_checkouts_run_in_one_process_with_one_base(project: Path, workers: StageWorkers) -> None:
    cell = project.with_name("cell")
    code, out, errors = run(workers, project, "load")
    assert (code, errors.splitlines()[-1]) == (0, "loads 1")
    assert "imported" not in out  # neither here nor again there
    worker = out.split()[-1]
    assert run(workers, cell, "load") == (0, f"told load in cell by {worker}\n", KEPT)
    assert (cell / "runs" / PIPELINE / "train" / "stage.json").is_file()
    assert run(workers, cell, "refuse") == (2, f"told refuse in cell by {worker}\n", "error: a reason\n")
    code, _, errors = run(workers, cell, "fail")
    assert (code, errors.splitlines()[-1]) == (1, "ZeroDivisionError: a bug")
    assert run(workers, cell, "load") == (0, f"told load in cell by {worker}\n", KEPT)


@pytest.mark.long
def test_where_the_process_dies_the_stage_fails_and_the_next_one_gets_another(
    project: Path, workers: StageWorkers
) -> None:
    code, out, errors = run(workers, project, "die")
    assert (code, errors) == (137, "error: the process that runs this sweep's trainings and evaluations was ended\n")
    before = out.split()[-1]
    wait_until_none_is_idle(workers)
    code, out, errors = run(workers, project, "load")
    assert (code, errors.splitlines()[-1]) == (0, "loads 1")
    assert out.split()[-1] != before


@pytest.mark.long
def test_a_training_that_is_killed_ends_with_its_step_and_the_base_stays(project: Path, workers: StageWorkers) -> None:
    worker = start_and_kill(project, workers, "train", stage="train")
    wait_for(project / "kept")
    assert run(workers, project, "load") == (0, f"told load in code by {worker}\n", KEPT)


@pytest.mark.long
def test_an_evaluation_that_is_killed_takes_its_process_with_it(project: Path, workers: StageWorkers) -> None:
    start_and_kill(project, workers, "sleep", stage="evaluate")
    wait_until_none_is_idle(workers)


def start_and_kill(project: Path, workers: StageWorkers, told: str, *, stage: str) -> str:
    """The process that works for a stage which is killed meanwhile."""
    with workers.borrow() as worker:
        wait_for(Path(worker[handover.VARIABLE]))
        process = start(project, told, worker, stage)
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        process.communicate()
    assert line.startswith(f"told {told} in code")
    return line.split()[-1]


def wait_until_none_is_idle(workers: StageWorkers) -> None:
    while any(worker.is_alive() for worker in workers._idle):
        time.sleep(0.05)


@pytest.mark.long
def test_where_nobody_listens_the_stage_does_its_work(project: Path, tmp_path: Path) -> None:
    process = start(project, "refuse", {handover.VARIABLE: str(tmp_path / "nobody")})
    out, errors = process.communicate()
    assert (process.returncode, errors) == (2, "error: a reason\n")
    assert out == f"imported by {process.pid}\ntold refuse in code by {process.pid}\n"


@pytest.mark.long
def test_other_programs_hand_nothing_over(project: Path, tmp_path: Path) -> None:
    environment = os.environ | {handover.VARIABLE: str(tmp_path / "nobody"), "PYTHONPATH": str(project)}
    done = subprocess.run(
        [sys.executable, "-c", "import tasks, os; print(os.environ['GRAFTLINE_STAGE_WORKER'])"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "nobody")
