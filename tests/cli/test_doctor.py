import json
from pathlib import Path

import pytest

from graftline.doctor import Finding, examine, render
from tests.config.documents import changed


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    (tmp_path / "constraints.txt").write_text("pydantic==0.0.1\nno-such-package-here==1\n# a comment\n")
    monkeypatch.delenv("GRAFTLINE_CACHE", raising=False)
    return tmp_path


def findings(project: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(project)}


def test_everything_that_the_line_needs_is_looked_at(project: Path) -> None:
    found = findings(project)

    names = {"python", "packages", "disk", "memory", "threads", "cuda", "git", "npm", "dvc", "pipelines", "store store"}
    assert set(found) == names
    assert found["pipelines"].found == "demo"
    json.dumps([finding.as_dict() for finding in found.values()])


def test_packages_of_another_version_are_named_with_what_to_run(project: Path) -> None:
    packages = findings(project)["packages"]

    assert packages.status == "note"
    assert packages.found.startswith("1 of 2 pinned packages installed, 1 of another version: pydantic 2.")
    assert packages.advice == "install the pinned set: make setup"


def test_a_wrong_pipelines_yaml_is_missing_not_a_crash(project: Path) -> None:
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.adapter.rank": 0}))

    assert findings(project)["pipelines"].status == "missing"


def test_a_store_that_cannot_be_written_is_missing(project: Path) -> None:
    (project / "store").touch()
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.release.store": "store/below-a-file"}))

    store = findings(project)["store store/below-a-file"]

    assert store.status == "missing"
    assert store.advice == "make the folder writable, or change release.store"


def test_an_s3_store_that_does_not_answer_is_missing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.release.store": "s3://models/x"}))

    assert findings(project)["store s3://models/x"].status == "missing"


def test_a_machine_without_git_is_told_to_install_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    found = findings(project)

    assert (found["git"].status, found["npm"].status) == ("missing", "note")
    assert found["git"].advice.startswith("install git")


def test_advice_stands_below_what_was_found() -> None:
    text = render([Finding("disk", "ok", "9 GiB free"), Finding("git", "missing", "not on the PATH", "install git")])

    assert text.splitlines() == [
        "ok      disk  9 GiB free",
        "missing git   not on the PATH",
        "              -> install git",
    ]
