"""What has moved since a pipeline's last whole run."""

import copy
from pathlib import Path

import pytest

from flows import inputs, moving, shelf
from tests.flows.tiny_project import PIPELINE, change, commit, make_repository
from tests.line.project import read_yaml, write_yaml


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_repository(tmp_path / "repository")
    document = read_yaml(root)
    document["pipelines"]["other"] = copy.deepcopy(document["pipelines"][PIPELINE])
    write_yaml(root, document)
    commit(root, "two pipelines")
    monkeypatch.setenv("GRAFTLINE_CACHE", str(tmp_path / "cache"))
    return root


def finish(root: Path, *pipelines: str) -> None:
    """As a whole run of each leaves it."""
    dict(moving.resolve_all(root, pipelines))
    for name in pipelines:
        shelf.save(root, name, inputs=inputs.of_pipeline(root, name), outcome="pass", version="1")


def test_a_pipeline_is_unchanged_until_its_rows_its_settings_or_its_code_change(repository: Path) -> None:
    names = [PIPELINE, "other"]
    assert moving.sort(repository, names) == (names, [], {})
    finish(repository, *names)
    assert moving.sort(repository, names) == ([], names, {})

    change(repository, "train", steps=9)
    commit(repository, "steps")
    assert moving.sort(repository, names) == ([PIPELINE], ["other"], {})

    finish(repository, *names)
    code = repository / "graftline" / "train" / "loss.py"
    code.write_text(code.read_text() + "# a comment\n")
    commit(repository, "code")
    assert moving.sort(repository, names) == (names, [], {})

    finish(repository, *names)
    (repository / "README.md").write_text("other words")
    commit(repository, "docs")
    assert moving.sort(repository, names) == ([], names, {})


def test_files_that_no_commit_holds_leave_it_to_dvc(repository: Path) -> None:
    finish(repository, PIPELINE)
    change(repository, "train", steps=9)
    assert moving.sort(repository, [PIPELINE]) == ([PIPELINE], [], {})


def test_one_of_many_has_the_digest_that_it_has_among_all(repository: Path) -> None:
    dict(moving.resolve_all(repository, [PIPELINE, "other"]))
    both = inputs.of_pipelines(repository, [PIPELINE, "other"])
    assert inputs.of_pipeline(repository, "other") == both["other"]
    assert both["other"].startswith("sha256:")


def test_new_rows_are_seen_once_for_each_content(repository: Path) -> None:
    assert set(moving.with_new_data(repository, [PIPELINE])[0]) == {PIPELINE}
    finish(repository, PIPELINE)
    assert moving.with_new_data(repository, [PIPELINE]) == ({}, {})

    rows = repository / "rows.jsonl"
    rows.write_text(rows.read_text().replace("barks", "howls"))

    first, _ = moving.with_new_data(repository, [PIPELINE])
    assert moving.with_new_data(repository, [PIPELINE])[0] == first


def test_a_source_that_is_gone_is_named_and_stops_no_other(repository: Path) -> None:
    document = read_yaml(repository)
    document["pipelines"]["other"]["data"] = {**document["pipelines"]["other"]["data"], "source": "path:absent.jsonl"}
    write_yaml(repository, document)
    commit(repository, "absent")

    changed, unchanged, broken = moving.sort(repository, [PIPELINE, "other"])

    assert (changed, unchanged, list(broken)) == ([PIPELINE], [], ["other"])
    assert "absent.jsonl" in broken["other"]


def test_an_error_of_any_kind_is_the_pipelines_own(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = read_yaml(repository)
    for name in ("profile", "damaged"):
        document["pipelines"][name] = copy.deepcopy(document["pipelines"][PIPELINE])
    document["pipelines"]["profile"]["release"]["store"] = "s3://bucket/x"
    write_yaml(repository, document)
    commit(repository, "more pipelines")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    (repository / "runs" / "damaged" / "resolved.json").mkdir(parents=True)
    shelf.folder(repository, "other").mkdir(parents=True)
    (shelf.folder(repository, "other") / "resolved.json").write_bytes(b"\xff{")

    changed, unchanged, broken = moving.sort(repository, [PIPELINE, "profile", "damaged", "other"])

    assert PIPELINE in changed
    assert unchanged == []
    assert "nobody" in broken["profile"]
    assert set(broken) >= {"profile", "damaged"}


def test_a_graph_that_cannot_be_read_gives_every_pipeline_its_turn(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "dvc.yaml").write_text("stages: [")
    commit(repository, "a damaged graph")
    assert moving.sort(repository, [PIPELINE, "other"]) == ([PIPELINE, "other"], [], {})


@pytest.mark.parametrize("record", [b"", b"[]", b"\xff", b"{}", b'{"sources": '])
def test_a_record_that_cannot_be_read_means_new_data(repository: Path, record: bytes) -> None:
    folder = shelf.folder(repository, PIPELINE)
    folder.mkdir(parents=True)
    (folder / "resolved.json").write_bytes(record)
    (repository / "runs" / PIPELINE / "resolved.json").write_text("{}")
    new, broken = moving.with_new_data(repository, [PIPELINE, "other"])
    assert set(new) == {PIPELINE, "other"}
    assert broken == {}
