"""The files of a new project are what those who define their formats accept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from graftline.registry.keys import KeyRing
from graftline.scaffold import copied
from graftline.scaffold.files import Names, contents

HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
FILES = contents(Names("p"))


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        (".github/workflows/evaluate-pr.yaml", ["vendor.github-workflows"]),
        ("infra/ci/gitlab.yaml", ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"]),
        ("infra/compose.yaml", ["vendor.compose-spec"]),
    ],
)
def test_it_is_what_its_schema_says(path: str, schema: list[str], tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(FILES[path])
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", *schema, str(tmp_path / "file.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no build for this machine")
def test_hadolint_has_nothing_to_say_of_the_image(tmp_path: Path) -> None:
    assert HADOLINT
    (tmp_path / "Dockerfile").write_bytes(FILES["infra/docker/Dockerfile"])
    done = subprocess.run([HADOLINT, str(tmp_path / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_is_the_one_that_compose_starts() -> None:
    assert b"image: ${GRAFTLINE_IMAGE:-graftline:cpu}" in FILES["infra/compose.yaml"]
    assert b"docker build -f infra/docker/Dockerfile -t graftline:cpu ." in FILES["infra/docker/Dockerfile"]


def test_the_key_file_is_right_lists_nobody_and_says_so() -> None:
    ring = KeyRing.parse(FILES["keys.yaml"].decode("utf-8"), origin="keys.yaml")
    assert (ring.keys, ring.unsigned) == ({}, True)


def test_ci_makes_its_environment_from_the_project_s_own_requirements() -> None:
    steps = YAML(typ="safe").load(FILES[".github/workflows/evaluate-pr.yaml"])["jobs"]["evaluate"]["steps"]
    assert [step["run"] for step in steps if "venv .venv" in step.get("run", "")] == [Names("p").set_up]
    assert steps[1]["with"]["cache-dependency-path"] == "pyproject.toml"


def test_a_build_without_the_files_of_a_project_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "retrain.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"prefect\.yaml, tasks/\*\.py.* missing in"):
        copied.paths(tmp_path)
