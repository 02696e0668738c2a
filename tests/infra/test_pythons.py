"""Every Python that is promised, and lies on this machine, reads what is written here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.test_dependencies import PROJECT, ROOT

PROMISED = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))


def find(version: str) -> Path | None:
    """An interpreter of this version that starts; pyenv has names for more than it starts."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = [found] if (found := shutil.which(f"python{version}")) else []
    for path in [*named, *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]:
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return Path(path)
    return None


@pytest.fixture(params=[version for version in PROMISED if version != f"3.{sys.version_info.minor}"])
def other(request: pytest.FixtureRequest) -> Path:
    if (python := find(request.param)) is None:
        pytest.skip(f"there is no Python {request.param} here")
    return python


@pytest.mark.slow
def test_every_module_is_read_without_a_warning_by(other: Path) -> None:
    files = [path for top in ("graftline", "tasks", "flows", "studies", "tests") for path in (ROOT / top).rglob("*.py")]
    assert len(files) > 300
    code = "import sys\nfor path in sys.stdin.read().split('\\0'): compile(open(path, 'rb').read(), path, 'exec')"
    paths = "\0".join(map(str, files))
    done = subprocess.run([str(other), "-W", "error", "-c", code], input=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
