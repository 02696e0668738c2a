"""Each file of infra/ and of CI, checked by the tool or the schema of those who define its format."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
SCHEMAS = {
    "infra/compose.yaml": ["--builtin-schema", "vendor.compose-spec"],
    ".github/workflows/evaluate-pr.yaml": ["--builtin-schema", "vendor.github-workflows"],
    ".github/workflows/release.yaml": ["--builtin-schema", "vendor.github-workflows"],
    ".github/workflows/weekly.yaml": ["--builtin-schema", "vendor.github-workflows"],
    "infra/ci/gitlab.yaml": ["--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)


def test_every_workflow_and_compose_file_has_a_schema_here() -> None:
    there = {
        *(ROOT / ".github" / "workflows").glob("*"),
        *(ROOT / "infra" / "ci").glob("*"),
        ROOT / "infra/compose.yaml",
    }
    assert {path.relative_to(ROOT).as_posix() for path in there} == set(SCHEMAS)


@pytest.mark.parametrize("file", SCHEMAS)
def test_it_is_what_its_schema_says(file: str) -> None:
    done = run(sys.executable, "-m", "check_jsonschema", *SCHEMAS[file], file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_key_is_found(tmp_path: Path) -> None:
    text = (ROOT / "infra" / "compose.yaml").read_text()
    (tmp_path / "compose.yaml").write_text(text.replace("    healthcheck:", "    health_check:", 1))
    done = run(sys.executable, "-m", "check_jsonschema", *SCHEMAS["infra/compose.yaml"], tmp_path / "compose.yaml")
    assert done.returncode == 1
    assert "health_check" in done.stdout


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no build for this machine")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_hadolint_has_nothing_to_say(name: str) -> None:
    assert HADOLINT
    done = run(HADOLINT, f"infra/docker/Dockerfile.{name}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_every_object_is_what_kubernetes_itself_defines(version: str, tmp_path: Path) -> None:
    files = [path for path in (ROOT / "infra" / "k8s").glob("*.yaml") if path.name != "kustomization.yaml"]
    job = json.loads((ROOT / "infra" / "k8s" / "work-pool.json").read_text())["job_configuration"]["job_manifest"]
    assert job["kind"] == "Job"
    done = run(sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wrong.yaml").write_text((files[0]).read_text().replace("metadata:", "metadatum:", 1))
    assert run(
        sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, tmp_path / "wrong.yaml"
    ).returncode
