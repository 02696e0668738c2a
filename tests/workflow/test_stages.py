import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from graftline.workflow import stages


def stream(code: str, root: Path) -> list[str]:
    lines: list[str] = []
    stages.run_command([sys.executable, "-c", code], stage="train", pipeline="demo", root=root, on_line=lines.append)
    return lines


def test_output_arrives_line_by_line_from_both_streams(tmp_path: Path) -> None:
    code = "import sys; print('one', flush=True); print('two', file=sys.stderr, flush=True); print('three')"
    assert stream(code, tmp_path) == ["one", "two", "three"]


def test_a_failing_stage_names_itself_its_exit_code_and_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(
        stages.StageFailedError, match=r"stage train of pipeline demo failed \(exit code 2\): error: rank 0"
    ):
        stream("import sys; print('error: rank 0'); sys.exit(2)", tmp_path)


@pytest.mark.parametrize(
    ("ended", "shown"),
    [
        ("exited with 2", r"\(exit code 2\)"),
        ("exited with -9", r"\(exit code 137, ended by SIGKILL\)"),
        ("exited with 137", r"\(exit code 137, ended by SIGKILL\)"),
    ],
)
def test_the_exit_code_is_the_stages_and_not_dvcs(tmp_path: Path, ended: str, shown: str) -> None:
    line = f"ERROR: failed to reproduce 'train@demo': failed to run: python -m tasks.train demo, {ended}"
    with pytest.raises(stages.StageFailedError, match=f"stage train of pipeline demo failed {shown}: ERROR"):
        stream(f"import sys; print({line!r}); sys.exit(255)", tmp_path)


def test_a_stage_that_was_killed_says_what_may_have_killed_it(tmp_path: Path) -> None:
    with pytest.raises(stages.StageFailedError, match=r"ended by SIGKILL\): .*\n.*kernel .* memory"):
        stream("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)


def test_a_line_that_brings_its_time_is_passed_on_without_it(tmp_path: Path) -> None:
    assert stream("print('2026-11-24 02:00:13.214861 [W:onnxruntime:] no')", tmp_path) == ["[W:onnxruntime:] no"]


# A stage as DVC runs it: a child of the command, silent while it works.
SLEEPER = """
import os, pathlib, subprocess, sys, time
if len(sys.argv) > 2:
    subprocess.run([sys.executable, "-c", pathlib.Path(sys.argv[2]).read_text(), sys.argv[1]])
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
FLOW = """
import sys
from pathlib import Path
from graftline.workflow import stages
code, marker = Path("sleeper.py").read_text(), sys.argv[1]
command = [sys.executable, "-c", code, marker, "sleeper.py"]
stages.run_command(command, stage="train", pipeline="demo", root=Path.cwd(), on_line=print)
"""


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_flow_that_is_killed_takes_its_silent_stage_and_the_stage_s_children_along(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    flow = subprocess.Popen([sys.executable, "-c", FLOW, str(marker)], cwd=tmp_path)
    wait_until(lambda: marker.is_file() and marker.read_text())
    stage = int(marker.read_text())

    flow.kill()
    flow.wait()

    wait_until(lambda: has_ended(stage))


def test_stopping_the_caller_stops_the_stage_and_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    seen: list[str] = []

    def stop(line: str) -> None:
        seen.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run_command(
            [sys.executable, "-c", code, child], stage="train", pipeline="demo", root=tmp_path, on_line=stop
        )
    wait_until(lambda: not psutil.pid_exists(int(seen[0])))


def test_a_stage_that_a_signal_ended_says_which(tmp_path: Path) -> None:
    with pytest.raises(stages.StageFailedError, match=r"exit code 137"):
        stream("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)


def test_the_interpreter_of_the_flow_is_the_one_that_dvc_will_find() -> None:
    assert stages._environment(Path.cwd())["PATH"].split(":")[0] == str(Path(sys.executable).parent)
