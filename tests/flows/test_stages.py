import sys
from pathlib import Path

import pytest

from flows import stages


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


def test_stopping_the_caller_stops_the_stage_and_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "survived"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(marker)!r}).touch()"
    code = f"import subprocess, sys; print('up', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run_command([sys.executable, "-c", code], stage="train", pipeline="demo", root=tmp_path, on_line=stop)
    import time

    time.sleep(3.5)
    assert not marker.exists()


def test_the_interpreter_of_the_flow_is_the_one_that_dvc_will_find() -> None:
    assert stages._environment()["PATH"].split(":")[0] == str(Path(sys.executable).parent)
