"""Ray is an extra: without it, and with a version that is not supported, the command to install it is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftline.errors import ClusterError
from graftline.ray_cluster import connected

ROOT = Path(__file__).resolve().parents[1]
CODE = """
from graftline.program import guarded
from graftline.ray_cluster import connected
with guarded(), connected(None, processes=1):
    pass
"""


def run(*options: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *options, "-c", CODE], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["2.9.3", "2.59.1", "3.0.0", "3.0.0.dev0"])
def test_another_version_is_told_with_the_command(version: str, tmp_path: Path) -> None:
    made = tmp_path / f"ray-{version}.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ray\nVersion: {version}\n")
    done = run(path=tmp_path)
    assert done.returncode == 2
    assert (
        f"error: Ray {version} is installed, graftline works with 2.60 and newer, before 3.0; run: pip install"
        in done.stderr
    )
    assert "'graftline[ray]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_ray_the_command_is_told() -> None:
    done = run("-S", path=ROOT)  # no packages at all
    assert done.returncode == 2
    assert (
        "error: the package ray is not installed; install what this needs: pip install 'graftline[ray]'" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_cluster_that_is_not_there_is_told_with_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    told = r"no Ray cluster could be used at auto: .*; check its address"
    with pytest.raises(ClusterError, match=told), connected("auto", processes=1):
        pass
