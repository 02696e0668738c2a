"""`make test` as a person runs it, with a stand-in for Python that notes what it was asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("failing", "code"), [("none", 0), ("not slow", 2), ("slow", 2)])
def test_the_slow_tests_run_even_where_a_fast_one_failed_and_the_end_says_so(
    tmp_path: Path, failing: str, code: int
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements.lock"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    # Arguments: -m pytest -m MARKERS …
    python.write_text(f'#!/bin/sh\necho "$4" >> called\n[ "$4" != "{failing}" ]\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "test", "BIN=bin"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "called").read_text(encoding="utf-8").splitlines() == ["not slow", "slow"]
