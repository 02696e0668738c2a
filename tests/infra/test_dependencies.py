"""What pyproject.toml asks for can be had on other systems and Pythons, and the lock is of what it pins."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", text, flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_has_the_versions_of_the_constraints_and_a_hash_of_each() -> None:
    constraints, lock = pins(CONSTRAINTS), pins(LOCK)
    assert {name: lock[name] for name in constraints if name in lock} == {
        name: version for name, version in constraints.items() if name in lock
    }
    assert constraints.keys() - lock.keys() == {"torch"}, "run make lock"
    entries = re.split(r"\n(?=[A-Za-z0-9])", LOCK[LOCK.index("absl-py") :])
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_every_direct_dependency_is_in_the_lock() -> None:
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in ("all", "dev") for line in PROJECT["optional-dependencies"][extra]),
    ]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line, maxsplit=1)[0]).lower() for line in lines}
    assert names - pins(LOCK).keys() == {"graftline", "torch"}, "run make lock"


def test_each_python_that_is_promised_has_a_classifier() -> None:
    classified = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert classified == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


PLATFORMS = ["linux", "aarch64-unknown-linux-gnu", "macos", "windows"]
EACH_LANDING = {("linux", "3.11"), ("macos", "3.13"), ("windows", "3.13")}
"""One of each system; `make test-all` resolves all."""


@pytest.mark.slow
@pytest.mark.skipif(UV is None, reason="uv, which resolves for other systems, is not installed: make setup")
@pytest.mark.parametrize(
    ("platform", "python"),
    [
        pytest.param(*each, marks=[pytest.mark.long] * (each not in EACH_LANDING))
        for each in itertools.product(PLATFORMS, ("3.11", "3.12", "3.13"))
    ],
)
def test_everything_can_be_resolved_for(platform: str, python: str, tmp_path: Path) -> None:
    """Resolved, not run: what ran is Linux on x86-64 with Python 3.11."""
    wanted = ["--python-platform", platform, "--python-version", python, "--extra", "all", "--extra", "dev"]
    done = subprocess.run(
        [
            str(UV),
            "pip",
            "compile",
            "--quiet",
            *wanted,
            "--output-file",
            str(tmp_path / "resolved.txt"),
            "pyproject.toml",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "error sending request" in done.stderr or "dns error" in done.stderr:
        pytest.skip(f"the package index does not answer: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    resolved = pins((tmp_path / "resolved.txt").read_text(encoding="utf-8"))
    runtimes = {name for name in resolved if name.startswith("onnxruntime")}
    assert len(runtimes) == 1, "one package under two names"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(UV is None, reason="uv, which makes an environment in seconds, is not installed: make setup")
def test_the_wheel_alone_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("graftline-*.whl")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(UV), "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    links = [word for place in os.environ.get("PIP_FIND_LINKS", "").split() for word in ("--find-links", place)]
    done = subprocess.run(
        [str(UV), "pip", "install", "--quiet", "--python", str(python), *links, "-c", "constraints.txt", str(wheel)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"the environment cannot be made here: {done.stderr.strip()[:300]}")

    def graftline(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-I", "-m", "graftline", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert graftline("--version").stdout == f"graftline {PROJECT['version']}\n"
    project = graftline("init", "project")
    assert (project.returncode, "pip install 'graftline[all]'" in project.stderr) == (2, True), project.stderr
    assert not (tmp_path / "project").exists()
    (tmp_path / "base").mkdir()
    served = graftline("serve", "--base", "b=base")
    assert (served.returncode, "pip install 'graftline[serve]'" in served.stderr) == (2, True), served.stderr
    imported = subprocess.run(
        [str(python), "-I", "-c", "import graftline.train.trainer, graftline.merge.fold, graftline.evaluate.gates"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert imported.returncode == 0, imported.stderr
