"""The import rules hold (`make check` runs the linter), and the linter bites when one is broken."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "the library imports Prefect": ("graftline.merge.fold", "prefect", "only workflow knows Prefect and DVC"),
    "the registry imports torch": ("graftline.registry.channel", "torch", "the registry never imports torch"),
    "quant imports train": (
        "graftline.weights.quant.linear",
        "graftline.train.loss",
        "inside the library imports go one way",
    ),
    "a task imports a flow": ("tasks.gate", "flows.retrain", "studies > flows > tasks > graftline"),
    "a flow imports the study": ("flows.sweep", "studies.survey.cells", "studies > flows > tasks > graftline"),
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


def test_every_forbidden_import_is_found_by_its_contract(copy: Path) -> None:
    for module, imported, _ in FORBIDDEN.values():
        path = copy.joinpath(*module.split(".")).with_suffix(".py")
        path.write_text(path.read_text(encoding="utf-8") + f"\nimport {imported}\n", encoding="utf-8")
    done = lint(copy)
    assert done.returncode == 1, done.stdout
    _, *sections = re.split(r"\n([^\n]+)\n-+\n", done.stdout[done.stdout.index("Broken contracts") :])
    broken = dict(zip(sections[::2], sections[1::2], strict=True))
    missed = [
        rule
        for rule, (module, imported, contract) in FORBIDDEN.items()
        if f"{module} -> {imported} (l." not in broken.get(contract, "")
    ]
    assert missed == [], done.stdout
