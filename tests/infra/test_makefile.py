"""`make test` and `make setup` as a person runs them; stand-ins for the programs note what they were asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST

ROOT = Path(__file__).resolve().parents[2]


def stand_in(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone in which nothing was made."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements.lock"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def make(folder: Path, *words: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "UV")}
    command = [str(shutil.which("make")), *words, "BIN=bin"]
    return subprocess.run(command, cwd=folder, env=environment | {"PATH": path}, capture_output=True, text=True)


def called(folder: Path) -> list[str]:
    return (folder / "called").read_text(encoding="utf-8").splitlines()


FAST, SLOW = "not slow", "slow and not ray and not long"


@pytest.mark.parametrize(
    ("failing", "code", "calls"),
    [
        ("none", 0, [FAST, SLOW]),
        (FAST, 2, [FAST, f"{FAST} again", SLOW]),
        (SLOW, 2, [FAST, SLOW, f"{SLOW} again"]),
        # What fails beside others and passes alone refuses no landing, but is told.
        ("unsteady", 0, [FAST, f"{FAST} again", SLOW, f"{SLOW} again"]),
    ],
)
def test_the_slow_tests_run_even_where_a_fast_one_failed_and_the_end_says_so(
    folder: Path, failing: str, code: int, calls: list[str]
) -> None:
    stand_in(
        folder / "bin" / "python",
        f"""case "$*" in *--last-failed*) again=" again";; esac
        echo "$4$again" >>called  # -m pytest -m MARKERS …
        [ "$4" != "{failing}" ] && [ "{failing}$again" != unsteady ]""",
    )
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".installed").touch()
    done = make(folder, "test")
    assert done.returncode == code, done.stderr
    assert called(folder) == calls
    assert ("What passes now is unsteady" in done.stdout) == (failing != "none")


def test_test_all_has_no_second_try(folder: Path) -> None:
    stand_in(folder / "bin" / "python", 'echo "$4" >>called; [ "$4" != "not slow" ]')
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".installed").touch()
    assert make(folder, "test-all").returncode == 2
    assert called(folder) == [FAST, SLOW]


@pytest.mark.parametrize(
    ("uv_is_on_the_path", "uv_works", "calls"),
    [
        pytest.param(True, True, ["uv venv", "uv pip", "uv pip", "uv pip"], id="uv on the PATH"),
        pytest.param(False, True, ["python -m venv", "pip uv", "uv pip", "uv pip", "uv pip"], id="uv of the lock"),
        pytest.param(False, False, ["python -m venv", "pip uv", *["uv pip", "pip"] * 3], id="uv that fails"),
    ],
)
def test_uv_makes_the_environment_and_pip_does_where_uv_cannot(
    folder: Path, uv_is_on_the_path: bool, uv_works: bool, calls: list[str]
) -> None:
    for name in ("awk", "grep", "mkdir", "sed", "sh", "touch"):
        (folder / "path").mkdir(exist_ok=True)
        (folder / "path" / name).symlink_to(str(shutil.which(name)))
    place = "path" if uv_is_on_the_path else "bin"
    stand_in(folder / place / "uv", f'echo "uv $1" >>called; {"mkdir -p .venv" if uv_works else "exit 2"}')
    stand_in(folder / "path" / "python3", 'echo "python $1 $2" >>called; mkdir -p .venv')
    fetches_uv = '[ "$(sed -n s/==.*//p .venv/uv.txt)" = uv ] && grep -q sha256 .venv/uv.txt && echo "pip uv" >>called'
    stand_in(folder / "bin" / "pip", f'case "$*" in *uv.txt) {fetches_uv};; *) echo pip >>called;; esac')
    done = make(folder, "setup", path=str(folder / "path"))
    assert done.returncode == 0, done.stderr
    assert called(folder) == calls


def test_the_files_that_the_tests_begin_with_are_there() -> None:
    assert [name for name in LONGEST_FIRST if not (ROOT / name).is_file()] == []
