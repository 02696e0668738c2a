"""The wheel alone, as somebody installs it: no checkout, an empty folder, a project that retrains and releases."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from graftline.registry.releases import list_versions, verify
from graftline.registry.store import open_store
from graftline.scaffold import copied
from studies.project import ROOT, read_yaml, write_yaml
from tests.tiny import make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by way of the source distribution, from a copy of what git tracks and new files that it does not ignore.

    From a copy, because a build leaves folders behind.
    """
    place = tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in listed:
        if name and (ROOT / name).is_file() and not name.startswith(("studies/", "docs/")):
            (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(place)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=place / "source", check=True, capture_output=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(place), str(next(place.glob("graftline-*.tar.gz")))], check=True)
    return next(place.glob("graftline-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A virtual environment with the wheel and this one's packages, but not its editable graftline; empty caches."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place / "venv", symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(place / "venv")})
    # Folders that a .pth file names are searched, but their own .pth files, such as the editable one, are not read.
    (Path(packages) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = place / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "GRAFTLINE_CACHE": str(place / "cache"),
        "PREFECT_HOME": str(place / "prefect"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def project(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in an empty folder; a tiny base, made here, stands in for the one that would be downloaded."""
    place = tmp_path_factory.mktemp("empty folder ü")
    made = run(place, environment, "graftline", "init", "p")
    assert (made.returncode, made.stderr) == (0, "")
    folder = place / "p"
    make_tiny_llama(folder / "base")
    document = read_yaml(folder)
    document["pipelines"]["my-task"]["base"] = {"source": "path:base", "dtype": "float32", "template": "none"}
    # A few steps teach a random model nothing that could be relied on: what it answers is not what is tried here.
    document["pipelines"]["my-task"]["train"] |= {"steps": 8, "learning_rate": 0.01, "threads": 1}
    document["pipelines"]["my-task"]["gates"]["accuracy"]["margin"] = 0.5
    document["pipelines"]["my-task"]["guards"] = {"stops": "off"}
    write_yaml(folder, document)
    return folder


def run(folder: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=600)


def test_the_wheel_installs_graftline_alone_and_holds_the_files_of_a_project(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    inside = {name.removeprefix("graftline/scaffold/project/") for name in names if "/scaffold/project/" in name}
    assert tops == {"graftline"}
    assert inside == set(copied.paths(ROOT))


def test_a_project_of_the_installed_tool_is_right_from_the_start(project: Path, environment: dict[str, str]) -> None:
    where = run(project, environment, "python", "-c", "import graftline; print(graftline.__file__)")
    assert str(ROOT) not in where.stdout
    checked = run(project, environment, "graftline", "config", "check")
    assert checked.stdout.startswith("pipelines.yaml is right: 1 pipeline (my-task)"), checked.stderr


@pytest.fixture(scope="module")
def first_run(project: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run(project, environment, "graftline", "retrain", "my-task")


def test_it_retrains_and_releases(project: Path, first_run: subprocess.CompletedProcess[str]) -> None:
    assert first_run.returncode == 0, first_run.stdout + first_run.stderr
    (version,) = list_versions(open_store(str(project / "store")), "my-task")
    assert verify(open_store(str(project / "store")), "my-task", version).verdict.outcome == "pass"
    assert f"{ROOT}/" not in first_run.stdout + first_run.stderr


@pytest.mark.usefixtures("first_run")
def test_a_second_run_runs_no_stage_and_names_the_release(project: Path, environment: dict[str, str]) -> None:
    (version,) = list_versions(open_store(str(project / "store")), "my-task")
    again = run(project, environment, "graftline", "retrain", "my-task")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "stages run:  none, all up to date" in again.stdout
    assert version in again.stdout


def test_the_project_s_own_test_passes_and_nothing_is_to_be_taken_over(
    project: Path, environment: dict[str, str]
) -> None:
    tested = run(project, environment, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout
    compared = run(project, environment, "graftline", "init", "--check")
    assert (compared.returncode, compared.stderr) == (0, "")
