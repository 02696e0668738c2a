"""Three pipelines at once on a machine with one GPU: real flows, DVC, Prefect and leases; the GPU is a name."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest

from graftline.workflow.stages import STAGES
from tests.flows.deployed import Server, make_project, serve
from tests.line.project import read_yaml, write_yaml
from tests.workflow.tiny_project import PIPELINE, commit, git

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

GPU = "GPU-stand-in"
ON_GPU = ("train", "evaluate", "merge", "package")
"""What computes with a model there; this pipeline's base is not quantized, so that init only copies it."""
OTHERS = ("more-pets", "most-pets")
NOTES = f'''
import atexit


def note(what):
    line = json.dumps([time.monotonic_ns(), what, stage, name, os.environ.get("CUDA_VISIBLE_DEVICES")])
    with open(os.environ["TIMELINE"], "a") as stream:
        stream.write(line + "\\n")


def wait_for(*wanted):
    """Until all of these (what, stage, pipeline) are in the timeline."""
    end = time.monotonic() + 400
    while True:
        seen = [tuple(json.loads(line)[1:4]) for line in open(os.environ["TIMELINE"])]
        if set(wanted) <= set(seen):
            return
        if time.monotonic() > end:
            sys.exit(f"error: {{stage}}@{{name}} waited in vain for {{wanted}}")
        time.sleep(0.1)


note("start")
atexit.register(note, "end")
if stage == "validate" and name != "{PIPELINE}":
    wait_for(("start", "train", "{PIPELINE}"))
if stage == "train":
    if name == "{PIPELINE}":
        wait_for(*(("end", "init", other) for other in {OTHERS}))
    time.sleep(3)  # Long enough for another training to begin, if nothing keeps it from that.
'''


class Interval(NamedTuple):
    """A stage's time on the machine, in nanoseconds of one clock, and the GPUs that it saw."""

    start: int
    end: int
    stage: str
    pipeline: str
    gpus: str | None

    def overlaps(self, other: "Interval") -> bool:
        return self.start < other.end and other.start < self.end


def make_three(folder: Path, store: Path) -> None:
    """The stand-in project with three pipelines whose stages say when they run and with which GPU."""
    make_project(folder, store)
    work = folder / "tasks" / "work.py"
    before, line, after = work.read_text().partition("out.mkdir(parents=True, exist_ok=True)\n")
    work.write_text(before + line + NOTES + after)
    document = read_yaml(folder)
    pipeline = document["pipelines"][PIPELINE]
    document["pipelines"] = {
        name: {**pipeline, "train": {**pipeline["train"], "steps": 40 + index}}
        for index, name in enumerate((PIPELINE, *OTHERS))
    }
    write_yaml(folder, document)
    commit(folder, "three pipelines")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("resources"), make_three) as running:
        yield running


def retrain(server: Server, pipeline: str, **more: str) -> subprocess.Popen[str]:
    """A run of one pipeline in a clone of its own, as a worker makes it."""
    clone = server.folder / f"clone-{pipeline}"
    git(server.folder, "clone", "-q", str(server.folder / "repository"), str(clone))
    environment = server.environment | {"TIMELINE": str(server.folder / "timeline")} | more
    command = [sys.executable, "-m", "flows.retrain", pipeline]
    return subprocess.Popen(
        command, cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def intervals(timeline: Path) -> list[Interval]:
    started: dict[tuple[str, str], tuple[int, str | None]] = {}
    found = []
    for line in timeline.read_text().splitlines():
        moment, what, stage, pipeline, gpus = json.loads(line)
        if what == "start":
            started[stage, pipeline] = moment, gpus
        else:
            start, seen = started.pop((stage, pipeline))
            found.append(Interval(start, moment, stage, pipeline, seen))
    assert not started, "stages without an end"
    return found


@pytest.mark.long
def test_stages_on_the_cpu_run_beside_another_pipeline_s_training_and_no_two_stages_share_the_gpu(
    server: Server,
) -> None:
    runs = [retrain(server, name, CUDA_VISIBLE_DEVICES=GPU) for name in (PIPELINE, *OTHERS)]
    logs = [run.communicate()[0] for run in runs]

    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(logs)
    found = intervals(server.folder / "timeline")
    assert len(found) == 3 * len(STAGES)
    on_gpu = [one for one in found if one.stage in ON_GPU]
    assert [one.gpus for one in on_gpu] == [GPU] * 3 * len(ON_GPU)
    assert {one.gpus for one in found if one.stage not in ON_GPU} == {""}
    assert not [pair for pair in combinations(on_gpu, 2) if pair[0].overlaps(pair[1])]
    (first,) = (one for one in on_gpu if (one.stage, one.pipeline) == ("train", PIPELINE))
    beside = {one.stage for one in found if one.pipeline in OTHERS and one.overlaps(first)}
    assert {"validate", "init"} <= beside


@pytest.mark.long
def test_a_run_that_asks_for_more_than_the_machine_has_starts_no_stage(server: Server) -> None:
    timeline = server.folder / "timeline"
    before = timeline.read_text() if timeline.is_file() else ""
    folder = server.folder / "repository"
    document = read_yaml(folder)
    document["pipelines"][PIPELINE] |= {"resources": {"merge": {"gpus": 2}, "train": {"gpus": 1}}}
    write_yaml(folder, document)
    commit(folder, "more than there is")
    clone = server.folder / f"clone-{PIPELINE}"
    clone.rename(clone.with_name("first")) if clone.exists() else None

    run = retrain(server, PIPELINE, CUDA_VISIBLE_DEVICES=GPU)
    log, _ = run.communicate()

    assert run.returncode == 2, log
    assert "stage merge asks for 2 GPUs (`resources.merge.gpus`, pipelines.yaml:" in log
    assert "Traceback" not in log
    assert (timeline.read_text() if timeline.is_file() else "") == before
