"""The stages of the line in their order, and how a flow reproduces one: through DVC, in a subprocess.

The subprocess frees the graphics memory at its end and takes nothing with it when it crashes; DVC skips what is up to
date. Its output streams line by line to the caller.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from graftline import extras, limits, logs, tracing
from graftline.errors import GraftlineError
from graftline.settings.model import StageName
from graftline.workflow.environment import for_child
from graftline.workflow.stage import TEMPORARY

STAGES: tuple[str, ...] = get_args(StageName)

OnLine = Callable[[str], None]


_STAGE_ENDED = re.compile(r"failed to run: .*, exited with (-?\d+)$")


def _ending(code: int) -> str:
    """An exit code in words; 128 + n and -n are signal n."""
    number = -code if code < 0 else code - 128
    try:
        return f"exit code {128 + number}, ended by {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {code}"


class StageFailedError(GraftlineError):
    """A stage ended with an error; its own output says which."""

    def __init__(
        self, stage: str, pipeline: str, exit_code: int, last_lines: Sequence[str], *, kills_before: int
    ) -> None:
        # A stage that knows what is wrong says it in one line; of any other the last lines may help.
        explained = [line for line in last_lines if line.startswith(("error: ", TEMPORARY))]
        reason = "\n".join(explained or last_lines)
        # DVC ends with 255 whatever the stage ended with, and says that in its last lines.
        said = [int(code) for line in last_lines for code in _STAGE_ENDED.findall(line)]
        code = said[-1] if said else exit_code
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            reason += f"\n{limits.why_killed(kills_before)}"
        super().__init__(f"stage {stage} of pipeline {pipeline} failed ({_ending(code)}): {reason}")
        self.temporary = any(line.startswith(TEMPORARY) for line in explained)


def resolve(pipeline: str, *, root: Path, on_line: OnLine) -> None:
    """Pin what moves for this run (new rows, what production holds now) into ``runs/<pipeline>/resolved.json``."""
    run_command(
        [sys.executable, "-m", "graftline.workflow.resolve", pipeline],
        stage="resolve",
        pipeline=pipeline,
        root=root,
        on_line=on_line,
    )


# What DVC advises a person at a terminal.
_ADVICE = ("To track the changes", "To enable auto staging", "Use `dvc push`", "Updating lock file", "\tgit ", "\tdvc ")


def reproduce(
    stage: str,
    pipeline: str,
    *,
    root: Path,
    on_line: OnLine,
    environment: Mapping[str, str] = MappingProxyType({}),
    force: bool = False,
) -> bool:
    """Bring one stage up to date with ``dvc repro --single-item``, with ``environment`` besides its own.

    With ``force`` it runs whatever DVC thinks of it.

    Returns:
        Whether the stage ran; False if DVC found it up to date, or its outputs in the run cache.

    Raises:
        StageFailedError: the stage ended with an error.
    """
    ran = False

    def pass_on(line: str) -> None:
        nonlocal ran
        ran = ran or line.startswith("Running stage")
        if not line.startswith(_ADVICE):
            on_line(line)

    command = _dvc("repro", "--single-item", f"{stage}@{pipeline}")
    command += ["--force"] if force else []
    run_command(command, stage=stage, pipeline=pipeline, root=root, on_line=pass_on, environment=environment)
    return ran


_RUNNING = re.compile(r"Running stage '(?P<stage>\w+)@")


def reproduce_until(stage: str, pipeline: str, *, root: Path, on_line: OnLine) -> list[str]:
    """Bring a stage and all before it up to date with one ``dvc repro``: where nobody waits between the stages.

    Returns:
        The stages that ran, in their order.

    Raises:
        StageFailedError: one ended with an error.
    """
    ran: list[str] = []

    def pass_on(line: str) -> None:
        if found := _RUNNING.match(line):
            ran.append(found["stage"])
        if not line.startswith(_ADVICE):
            on_line(line)

    command = _dvc("repro", f"{stage}@{pipeline}")
    run_command(command, stage=stage, pipeline=pipeline, root=root, on_line=pass_on)
    return ran


def outdated(pipeline: str, *, root: Path, among: Sequence[str] = STAGES) -> list[str]:
    """Of ``among``, in its order, the stages that must run: the first that DVC calls changed, and every one after it.

    One ``dvc status`` for the whole pipeline costs a second; asking stage by stage costs a second each.
    """
    targets = [f"{stage}@{pipeline}" for stage in among]
    done = subprocess.run(
        _dvc("status", "--json", *targets),
        cwd=root,
        env=_environment(root),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise GraftlineError(f"dvc status failed; run `dvc status` to see why:\n{done.stderr.strip()}")
    changed = json.loads(done.stdout)
    first = next((i for i, target in enumerate(targets) if target in changed), len(targets))
    return list(among[first:])


def _dvc(*arguments: str) -> list[str]:
    extras.require("dvc")
    return [sys.executable, "-m", "dvc", *arguments]


def _environment(root: Path) -> dict[str, str]:
    # Threads that wait by spinning make a busy machine several times slower (docs/experiments.md); they sleep instead.
    quiet = {"PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # Where processor time is limited, libraries that count cores would start a thread for each of the machine's.
    if limits.cpu_quota() and "OMP_NUM_THREADS" not in os.environ:
        quiet |= {"OMP_NUM_THREADS": str(limits.usable_cores())}
    # Whatever the locale: what a stage prints is read as UTF-8.
    quiet |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    # The flow's own log says which run, pipeline and stage a line belongs to.
    return for_child(root) | quiet | {logs.FORMAT_VARIABLE: "text"} | tracing.for_child()


_processes: set[subprocess.Popen[str]] = set()


def stop_running() -> None:
    """End every command that `run_command` runs now, on whatever thread: an interrupt reaches the main one only."""
    for process in list(_processes):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


_LIFELINE = Path(__file__).with_name("lifeline.py")


def run_command(
    command: Sequence[str],
    *,
    stage: str,
    pipeline: str,
    root: Path,
    on_line: OnLine,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run a command in ``root``, with ``environment`` besides its own, and pass its output on line by line.

    It ends with its caller, DVC and the stage under it too, also when the caller is killed: see
    `graftline.workflow.lifeline`.

    Raises:
        StageFailedError: its exit code is not 0.
    """
    last_lines: list[str] = []
    kills_before = limits.memory_kills()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LIFELINE), *command],
        cwd=root,
        env={**_environment(root), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    _processes.add(process)
    try:
        for line in process.stdout:
            text = logs.without_time(line.rstrip())
            if text:
                on_line(text)
                last_lines = [*last_lines[-7:], text]
        exit_code = process.wait()
    finally:
        _processes.discard(process)
        # Letting go of the lifeline stops what still runs.
        process.stdin.close()
        process.wait()
        process.stdout.close()
    if exit_code:
        raise StageFailedError(stage, pipeline, exit_code, last_lines, kills_before=kills_before)
