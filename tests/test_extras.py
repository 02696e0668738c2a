"""What `graftline` alone can do, and what it says where a package of an extra is not there."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from graftline.extras import DECIDE_NUMBERS, EXTRAS
from tests.settings.documents import changed
from tests.workflow.tiny_project import PIPELINE, make_repository

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {
    "lm-eval": "lm_eval",
    "onnxruntime-gpu": "onnxruntime",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry",
    "opentelemetry-sdk": "opentelemetry",
}
NOT_IMPORTED = {"sqlalchemy"}
"""Named for the bound on its version alone."""
HIDING = """\
import importlib.machinery, os
find = importlib.machinery.PathFinder.find_spec
hidden = os.environ["HIDDEN"].split(",")
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.partition(".")[0] in hidden else find(name, path, target)
)
"""


def hide(folder: Path, packages: Iterable[str]) -> dict[str, str]:
    """An environment in which every Python finds no such package, its children's children too."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDING)
    return os.environ | {"PYTHONPATH": str(folder), "HIDDEN": ",".join(packages)}


def graftline(*words: str, folder: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graftline", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def names(requirements: list[str]) -> set[str]:
    found = {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in requirements} - NOT_IMPORTED
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in found}


def test_the_table_of_extras_is_that_of_pyproject() -> None:
    declared = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
    del declared["dev"], declared["docs"]
    assert declared.pop("all") == {"graftline"}
    declared["flow"].remove("fastapi")  # for the bound on its version
    assert {extra: set(packages) for extra, packages in EXTRAS.items()} == declared


def test_no_package_of_an_extra_is_needed_by_graftline_alone() -> None:
    assert not names(PROJECT["dependencies"]) & {package for packages in EXTRAS.values() for package in packages}


@pytest.mark.parametrize(
    "module", ["graftline.cli.application", "graftline.registry.channel", "graftline.registry.store"]
)
def test_the_command_line_and_the_registry_load_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "prefect", "dvc", "great_expectations", "onnxruntime", "boto3", "pandas")
    heavy += ("scipy", "pyarrow", "numpy", "jinja2", "huggingface_hub", "httpx")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("serve", "--base", "b=base"), "serve"),
        (("retrain", "demo"), "flow"),
        (("history", "demo"), "s3"),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    tmp_path: Path, words: tuple[str, ...], extra: str
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "pipelines.yaml").write_bytes(changed(**{"demo.release.store": "s3://bucket/x"}))
    (tmp_path / "flows").symlink_to(ROOT / "flows")
    env = hide(tmp_path / "hiding", EXTRAS[extra])
    done = graftline(*words, folder=tmp_path, env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(
        rf"error: the package \w+ is not installed; .*: pip install 'graftline\[{extra}\]'\n", done.stderr
    )


def test_dvc_is_missed_before_its_process_is_started(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from graftline.program import guarded; from graftline.workflow import stages\n"
        "with guarded(): stages.outdated('demo', root=Path())"
    )
    env = hide(tmp_path / "hiding", ["dvc"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, "graftline[flow]" in done.stderr) == (2, True), done.stderr


def install(folder: Path, package: str, version: str) -> dict[str, str]:
    """An environment in which another version of a package is installed, as far as its metadata tell."""
    metadata = folder / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8")
    return os.environ | {"PYTHONPATH": str(folder)}


OTHER_VERSIONS = [("transformers", "5.22.3"), ("transformers", "6.0.0"), ("torch", "2.1.2+cu121")]


@pytest.mark.parametrize(("package", "version"), OTHER_VERSIONS)
def test_a_version_that_may_compute_other_numbers_is_refused_before_a_stage_begins(
    tmp_path: Path, package: str, version: str
) -> None:
    env = install(tmp_path / "site", package, version)
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")
    done = graftline("fetch", "demo", folder=tmp_path, env=env)
    supported = DECIDE_NUMBERS[package]
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: {package} {version} is installed" in done.stderr
    assert f"run: pip install '{package}{supported}'" in done.stderr


def test_such_a_version_is_refused_where_a_model_is_opened_and_named_by_the_doctor(tmp_path: Path) -> None:
    env = install(tmp_path / "site", "transformers", "5.22.3")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', encoding="utf-8")
    code = "from pathlib import Path; from graftline.weights.model_folder import read_config; read_config(Path('base'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "VersionError: transformers 5.22.3 is installed" in done.stderr
    told = graftline("doctor", folder=tmp_path, env=env).stdout
    assert re.search(r"MISSING +torch and transformers +transformers 5\.22\.3 is installed", told, re.IGNORECASE), told


@pytest.mark.parametrize("version", ["5.23.0", "5.99.1", "5.23.0.dev0"])
def test_releases_and_builds_of_a_supported_version_are_taken(tmp_path: Path, version: str) -> None:
    code = "from graftline.extras import refuse_other_versions; refuse_other_versions()"
    env = install(tmp_path / "site", "transformers", version)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_the_refused_versions_are_those_that_pyproject_does_not_allow() -> None:
    declared = [Requirement(line) for line in PROJECT["dependencies"]]
    here = {line.name: str(line.specifier) for line in declared if line.marker is None or line.marker.evaluate()}
    assert {name: SpecifierSet(supported) for name, supported in DECIDE_NUMBERS.items()} == {
        name: SpecifierSet(here[name]) for name in DECIDE_NUMBERS
    }


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_graftline_alone_plans_trains_judges_and_merges(tmp_path: Path) -> None:
    project = make_repository(tmp_path / "project")
    env = hide(tmp_path / "hiding", [package for packages in EXTRAS.values() for package in packages])
    env |= {"GRAFTLINE_CACHE": str(tmp_path / "cache")}
    resolved = [sys.executable, "-m", "graftline.workflow.resolve", PIPELINE]
    subprocess.run(resolved, cwd=project, env=env, check=True)
    for verb in ("fetch", "plan", "init-base", "train", "evaluate", "merge", "gate"):
        done = graftline(verb, PIPELINE, folder=project, env=env)
        assert done.returncode == 0, (verb, done.stdout, done.stderr)
    assert (project / "runs" / PIPELINE / "gate" / "verdict.json").is_file()
