"""Pull requests with the real model: is each evaluated as it must be? Through `flows.evaluate_pr`, as CI runs it.

The project's animal-or-plant pipeline (SmolLM2-135M, DoRA) is made smaller. ``main`` trains 2 steps. ``better`` trains
14 and is merged; against it come ``ruined`` (a learning rate with two zeros too many), ``loosened`` (the same, and a
margin of 0.5 in the same commit), ``equal`` (other checkpoints, so the adapter is trained anew and the same to the
byte) and ``docs`` (words only). Takes seven core minutes; with the same ``--work`` DVC's run cache continues where an
earlier call stopped. With --quick only ``docs``, which runs no stage.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from graftline.workflow.pull_request import EXIT_CODES
from studies.harness import Json, Setting
from studies.project import commit, copy_project, environment, git, read_yaml, write_yaml

PIPELINE = "wordnet-animal-or-plant"
MAIN = {
    "data.max_rows": 600,
    "data.evaluation_rows": 120,
    "train.steps": 2,
    "train.threads": 1,
    "package.merged": False,
    "gates.accuracy": {
        "metric": "accuracy",
        "direction": "higher",
        "test": "non-inferiority",
        "margin": 0.05,
        "against": "production",
    },
}
PULL_REQUESTS = {"better": "main", "ruined": "better", "loosened": "better", "equal": "better", "docs": "better"}
"""Branches and what each is compared with."""


def verdicts(setting: Setting) -> Json:
    """What each pull request is told."""
    repository = setting.work / "repository"
    if not repository.exists():
        make_repository(repository)
    wanted = setting.size(PULL_REQUESTS, {"docs": "better"})
    cache = Path(os.environ.get("GRAFTLINE_CACHE", ".cache/graftline")).absolute()
    found = {head: evaluate(repository, base, head, cache) for head, base in wanted.items()}
    return {"main": MAIN, "pull_requests": found}


def make_repository(folder: Path) -> None:
    """The project with its branches."""
    copy_project(folder, MAIN, PIPELINE)
    git(folder, "branch", "-M", "main")
    git(folder, "checkout", "-q", "-b", "better")
    train(folder, steps=14)
    commit(folder, "Train longer")
    git(folder, "checkout", "-q", "-b", "ruined")
    train(folder, learning_rate=0.00001)
    commit(folder, "Another learning rate")
    git(folder, "checkout", "-q", "-b", "loosened")
    document = read_yaml(folder)
    document["pipelines"][PIPELINE]["gates"]["accuracy"]["margin"] = 0.5
    write_yaml(folder, document)
    # One commit with both, as somebody would who wants it merged.
    git(folder, "reset", "-q", "--soft", "better")
    commit(folder, "Another learning rate, another margin")
    git(folder, "checkout", "-q", "-b", "equal", "better")
    train(folder, checkpoint_every=5)
    commit(folder, "Checkpoints more often")
    git(folder, "checkout", "-q", "-b", "docs", "better")
    (folder / "README.md").write_text("other words\n", encoding="utf-8")
    commit(folder, "Other words")


def train(folder: Path, **values: Any) -> None:
    """Other settings of the training."""
    document = read_yaml(folder)
    document["pipelines"][PIPELINE]["train"] |= values
    write_yaml(folder, document)


def evaluate(repository: Path, base: str, head: str, cache: Path) -> dict[str, Any]:
    """What .github/workflows/evaluate-pr.yaml runs; its exit code, result and comment."""
    out = repository.parent / head
    command = [sys.executable, "-m", "flows.evaluate_pr", "--base", base, "--head", head, "--out", str(out)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=repository, env=environment(repository, cache), text=True, capture_output=True)
    if done.returncode not in EXIT_CODES.values():
        raise SystemExit(done.stdout + done.stderr)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return {
        "base": base,
        "exit_code": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "outcome": result["outcome"],
        "settings": result["settings"],
        "pipelines": [
            {name: pipeline[name] for name in ("pipeline", "outcome", "reasons", "stages_run", "problem")}
            for pipeline in result["pipelines"]
        ],
        "comment": (out / "comment.md").read_text(encoding="utf-8").splitlines(),
    }


PARTS = {"verdicts": verdicts}
