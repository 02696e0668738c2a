"""The stages of the line in their order, and how a flow reproduces one: through DVC, in a subprocess.

The subprocess frees the graphics memory at its end and takes nothing with it when it crashes; DVC skips what is up to
date. Its output streams line by line to the caller.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from graftline.errors import GraftlineError

STAGES = ("fetch", "validate", "init", "train", "evaluate", "gate", "merge", "package", "release")

OnLine = Callable[[str], None]


class StageFailedError(GraftlineError):
    """A stage ended with an error; its own output says which."""

    def __init__(self, stage: str, pipeline: str, exit_code: int, last_lines: Sequence[str]) -> None:
        reason = "\n".join(last_lines)
        super().__init__(f"stage {stage} of pipeline {pipeline} failed (exit code {exit_code}):\n{reason}")
        self.stage = stage


def resolve(pipeline: str, *, root: Path, on_line: OnLine) -> None:
    """Pin what moves for this run (new rows, what production holds now) into ``runs/<pipeline>/resolved.json``."""
    _stream(
        [sys.executable, "-m", "tasks.resolve", pipeline],
        stage="resolve",
        pipeline=pipeline,
        root=root,
        on_line=on_line,
    )


def reproduce(stage: str, pipeline: str, *, root: Path, on_line: OnLine) -> None:
    """Bring one stage up to date with ``dvc repro --single-item``.

    Raises:
        StageFailedError: the stage ended with an error.
    """
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", f"{stage}@{pipeline}"]
    _stream(command, stage=stage, pipeline=pipeline, root=root, on_line=on_line)


def outdated(pipeline: str, *, root: Path) -> list[str]:
    """The stages that must run: the first that DVC calls changed, and every one after it.

    One ``dvc status`` for the whole pipeline costs a second; asking stage by stage costs a second each.
    """
    targets = [f"{stage}@{pipeline}" for stage in STAGES]
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", *targets],
        cwd=root,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise GraftlineError(f"dvc status failed; run `dvc status` to see why:\n{done.stderr.strip()}")
    changed = json.loads(done.stdout)
    first = next((i for i, target in enumerate(targets) if target in changed), len(STAGES))
    return list(STAGES[first:])


def _environment() -> dict[str, str]:
    # dvc.yaml says `python -m tasks.…`: that must be the interpreter that runs this flow.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}


def _stream(command: Sequence[str], *, stage: str, pipeline: str, root: Path, on_line: OnLine) -> None:
    last_lines: list[str] = []
    # A session of its own, so that stopping the flow stops DVC and the stage under it too.
    process = subprocess.Popen(
        command,
        cwd=root,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            text = line.rstrip()
            if text:
                on_line(text)
                last_lines = [*last_lines[-7:], text]
        exit_code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        process.stdout.close()
    if exit_code:
        raise StageFailedError(stage, pipeline, exit_code, last_lines)
