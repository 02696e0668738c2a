"""The import rules hold (`make check` runs the linter), and the linter bites when one is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROKEN = {
    "the library imports Prefect": ("graftline/merge/fold.py", "import prefect", "only workflow knows Prefect and DVC"),
    "the registry imports torch": ("graftline/registry/channel.py", "import torch", "the registry never imports torch"),
    "quant imports train": ("graftline/weights/quant/linear.py", "import graftline.train.loss", "imports go one way"),
    "a task imports a flow": ("tasks/gate.py", "import flows.retrain", "flows > tasks > graftline"),
    "a flow imports the study": ("flows/sweep.py", "import studies.survey.cells", "studies > flows"),
}

DATA = {"studies": ("data", ".dvc")}
"""What is no code."""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    # The linter imports by name: the copy must come before the installed package.
    return subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("graftline", "tasks", "flows", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", *DATA.get(name, ())))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def test_the_rules_hold(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("file", "line", "contract"), BROKEN.values(), ids=BROKEN)
def test_a_forbidden_import_is_found(copy: Path, file: str, line: str, contract: str) -> None:
    path = copy / file
    path.write_text(path.read_text() + f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout
    assert any(contract in text and "BROKEN" in text for text in done.stdout.splitlines()), done.stdout
