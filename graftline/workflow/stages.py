"""The stages of the line in order, and their reproduction with DVC, in a subprocess.

The subprocess frees its GPU memory at the end and can crash without harm to the flow. Its output is passed on line by
line.
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

_RUNNING = re.compile(r"Running stage '(?P<stage>\w+)@")
_STAGE_ENDED = re.compile(r"failed to run: .*, exited with (-?\d+)$")


def _ending(code: int) -> str:
    """An exit code in words; 128 + n and -n are signal n."""
    number = -code if code < 0 else code - 128
    try:
        return f"exit code {128 + number}, ended by {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {code}"


class StageFailedError(GraftlineError):
    """A stage ended with an error, which its output explains."""

    def __init__(
        self, stage: str, pipeline: str, exit_code: int, last_lines: Sequence[str], *, kills_before: int
    ) -> None:
        # One line for an error that the stage explains; otherwise the last lines may help.
        explained = [line for line in last_lines if line.startswith(("error: ", TEMPORARY))]
        reason = "\n".join(explained or last_lines)
        # DVC always ends with 255; its last lines contain the stage's exit code.
        said = [int(code) for line in last_lines for code in _STAGE_ENDED.findall(line)]
        code = said[-1] if said else exit_code
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            reason += f"\n{limits.why_killed(kills_before)}"
        super().__init__(f"stage {stage} of pipeline {pipeline} failed ({_ending(code)}): {reason}")
        self.temporary = any(line.startswith(TEMPORARY) for line in explained)


def resolve(pipeline: str, *, root: Path, on_line: OnLine) -> None:
    """Pin the moving inputs (new rows, the release in production) into ``runs/<pipeline>/resolved.json``."""
    run_command(
        [sys.executable, "-m", "graftline.workflow.resolve", pipeline],
        stage="resolve",
        pipeline=pipeline,
        root=root,
        on_line=on_line,
    )


# Lines in which DVC advises people at a terminal.
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
    """Bring one stage up to date, with additional variables in ``environment``; ``force`` runs it in any case.

    Returns whether the stage ran: False if DVC found it up to date, or its outputs in the run cache. Raises
    StageFailedError.
    """
    options = ("--single-item", *(("--force",) if force else ()))
    return bool(_repro(stage, pipeline, *options, root=root, on_line=on_line, environment=environment))


def reproduce_until(
    stage: str, pipeline: str, *, root: Path, on_line: OnLine, environment: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Bring a stage and those before it up to date, with additional variables in ``environment``.

    Returns the stages that ran. Raises StageFailedError.
    """
    return _repro(stage, pipeline, root=root, on_line=on_line, environment=environment)


def reproduce_before_training(pipeline: str, *, root: Path, on_line: OnLine) -> list[str]:
    """Bring up to date what the training needs; returns the stages that ran. Raises StageFailedError."""
    return _repro("init", pipeline, f"validate@{pipeline}", root=root, on_line=on_line)


def _repro(
    stage: str,
    pipeline: str,
    *options: str,
    root: Path,
    on_line: OnLine,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    ran: list[str] = []

    def pass_on(line: str) -> None:
        if found := _RUNNING.match(line):
            ran.append(found["stage"])
        if not line.startswith(_ADVICE):
            on_line(line)

    command = _dvc("repro", *options, f"{stage}@{pipeline}")
    run_command(command, stage=stage, pipeline=pipeline, root=root, on_line=pass_on, environment=environment)
    return ran


def outdated(pipeline: str, *, root: Path, among: Sequence[str] = STAGES) -> list[str]:
    """The stages of ``among`` that must run: the first that DVC calls changed, and all after it.

    One ``dvc status`` for the whole pipeline takes a second; asking stage by stage takes a second each.
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
    # Threads that spin while they wait make a busy machine several times slower (docs/experiments.md).
    quiet = {"PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # Within a CPU quota, libraries would start a thread for each of the machine's cores.
    if limits.cpu_quota() and "OMP_NUM_THREADS" not in os.environ:
        quiet |= {"OMP_NUM_THREADS": str(limits.usable_cores())}
    # The output is read as UTF-8, whatever the locale.
    quiet |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    # The flow's log adds run, pipeline and stage to each line.
    return for_child(root) | quiet | {logs.FORMAT_VARIABLE: "text"} | tracing.for_child()


_processes: set[subprocess.Popen[str]] = set()


def stop_running() -> None:
    """End every command of `run_command` on any thread, because an interrupt only reaches the main thread."""
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
    """Run a command in ``root``, with additional environment variables, and pass its output on line by line.

    The command and its children end with this process, even if that is killed (`graftline.workflow.lifeline`).

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
        # Closing the lifeline stops what still runs.
        process.stdin.close()
        process.wait()
        process.stdout.close()
    if exit_code:
        raise StageFailedError(stage, pipeline, exit_code, last_lines, kills_before=kills_before)
