"""What has moved since a pipeline's last whole run."""

import copy
from datetime import UTC, datetime
from pathlib import Path

import pytest

from graftline.digest import of_bytes, write_json
from graftline.registry import channel
from graftline.registry.store import open_store
from graftline.workflow import inputs, leases, resolve, shelf
from tests.line.project import read_yaml, write_yaml
from tests.workflow.tiny_project import PIPELINE, change, commit, make_repository


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
    code = inputs.of_code(root, list(pipelines))
    for name, found in inputs.look_up_all(root, pipelines).items():
        write_json(root / "runs" / name / resolve.RESOLVED, found.resolved)
        shelf.keep_run(root, name, inputs=inputs.combine(code[name], found.resolved), outcome="pass", version="1")


@pytest.mark.slow
def test_a_pipeline_is_unchanged_until_its_rows_its_settings_or_its_code_change(repository: Path) -> None:
    names = [PIPELINE, "other"]
    assert inputs.sort_by_news(repository, names) == (names, [], {})
    finish(repository, *names)
    assert inputs.sort_by_news(repository, names) == ([], names, {})

    change(repository, "train", steps=9)
    commit(repository, "steps")
    assert inputs.sort_by_news(repository, names) == ([PIPELINE], ["other"], {})

    finish(repository, *names)
    code = repository / "graftline" / "train" / "loss.py"
    code.write_text(code.read_text() + "# a comment\n")
    commit(repository, "a comment")
    assert inputs.sort_by_news(repository, names) == ([], names, {})
    code.write_text(code.read_text() + "FURTHER = 1\n")
    commit(repository, "code")
    assert inputs.sort_by_news(repository, names) == (names, [], {})

    finish(repository, *names)
    (repository / "README.md").write_text("other words")
    commit(repository, "docs")
    assert inputs.sort_by_news(repository, names) == ([], names, {})


def test_files_that_no_commit_holds_leave_it_to_dvc(repository: Path) -> None:
    finish(repository, PIPELINE)
    change(repository, "train", steps=9)
    assert inputs.sort_by_news(repository, [PIPELINE]) == ([PIPELINE], [], {})


def test_one_of_many_has_the_digest_that_it_has_among_all(repository: Path) -> None:
    both = inputs.of_code(repository, [PIPELINE, "other"])
    assert inputs.of_code(repository, ["other"]) == {"other": both["other"]}
    assert both["other"].startswith("sha256:")
    assert inputs.combine(both["other"], {"sources": 1}) != inputs.combine(both["other"], {"sources": 2})
    assert inputs.combine("", {"sources": 1}) == ""


def test_new_rows_are_seen_once_for_each_content(repository: Path) -> None:
    assert set(inputs.with_new_data(repository, [PIPELINE])[0]) == {PIPELINE}
    finish(repository, PIPELINE)
    assert inputs.with_new_data(repository, [PIPELINE]) == ({}, {})

    rows = repository / "rows.jsonl"
    rows.write_text(rows.read_text().replace("barks", "howls"))

    first, _ = inputs.with_new_data(repository, [PIPELINE])
    assert inputs.with_new_data(repository, [PIPELINE])[0] == first


def test_a_source_that_is_gone_is_named_and_stops_no_other(repository: Path) -> None:
    document = read_yaml(repository)
    document["pipelines"]["other"]["data"] = {**document["pipelines"]["other"]["data"], "source": "path:absent.jsonl"}
    write_yaml(repository, document)
    commit(repository, "absent")

    changed, unchanged, broken = inputs.sort_by_news(repository, [PIPELINE, "other"])

    assert (changed, unchanged, list(broken)) == ([PIPELINE], [], ["other"])
    assert "absent.jsonl" in broken["other"]


def enter(root: Path, version: str) -> None:
    """Put a version into production. Nothing but the channel is asked here."""
    change = channel.ChannelChange(
        action="promote",
        version=version,
        release=of_bytes(version.encode()),
        verdict=None,
        actor="ada",
        reason="test",
        time=datetime(2026, 11, 26, tzinfo=UTC),
    )
    store = open_store(str(root / "store"))
    entries = channel.read(store, PIPELINE, "production").entries
    channel.append(store, channel.next_entry(channel.Log(PIPELINE, "production", entries), change))


def test_the_last_run_s_own_release_in_production_is_no_change_and_any_other_is(repository: Path) -> None:
    finish(repository, PIPELINE)
    enter(repository, "1")
    assert inputs.sort_by_news(repository, [PIPELINE]) == ([], [PIPELINE], {})
    now = inputs.look_up_all(repository, [PIPELINE])[PIPELINE].resolved
    held = {"version": "1", "release": str(of_bytes(b"1"))}
    assert now["champion"] == held | {"anchor": held}  # nobody approves there, and no anchor was recorded yet
    assert inputs.as_last_run(repository, PIPELINE, now) == shelf.last_resolved(repository, PIPELINE) != now

    enter(repository, "2")
    assert inputs.sort_by_news(repository, [PIPELINE]) == ([PIPELINE], [], {})
    enter(repository, "1")  # Rolled back: again the release that the last run made.
    assert inputs.sort_by_news(repository, [PIPELINE]) == ([], [PIPELINE], {})


def test_a_release_in_production_excuses_neither_new_rows_nor_new_settings(repository: Path) -> None:
    finish(repository, PIPELINE)
    enter(repository, "1")
    rows = (repository / "rows.jsonl").read_text()
    (repository / "rows.jsonl").write_text(rows.replace("barks", "howls"))
    now = inputs.look_up_all(repository, [PIPELINE])[PIPELINE].resolved
    assert inputs.as_last_run(repository, PIPELINE, now) is None
    (repository / "rows.jsonl").write_text(rows)
    change(repository, "train", seed=4)
    commit(repository, "seed")
    assert inputs.sort_by_news(repository, [PIPELINE]) == ([PIPELINE], [], {})


def test_a_last_run_that_released_nothing_keeps_no_champion(repository: Path) -> None:
    finish(repository, PIPELINE)
    enter(repository, "1")
    shelf.keep_run(repository, PIPELINE, inputs="", outcome="fail", version=None)
    now = inputs.look_up_all(repository, [PIPELINE])[PIPELINE].resolved
    assert inputs.as_last_run(repository, PIPELINE, now) is None


def test_a_release_that_the_store_lost_makes_its_pipeline_run_again(repository: Path) -> None:
    write_json(
        repository / "runs" / PIPELINE / "release" / "release.json",
        {"version": "1", "location": f"store/releases/{PIPELINE}/1"},
    )
    finish(repository, PIPELINE)
    assert inputs.sort_by_news(repository, [PIPELINE]) == ([PIPELINE], [], {})


def test_looking_changes_nothing_of_a_run_under_way_and_does_not_follow_it(repository: Path) -> None:
    finish(repository, PIPELINE)
    resolved = repository / "runs" / PIPELINE / resolve.RESOLVED
    with leases.hold_folder(shelf.shelf_folder(repository, PIPELINE)):
        resolved.write_text('{"sources": "of the run under way"}')
        assert inputs.with_new_data(repository, [PIPELINE]) == ({}, {})
        assert inputs.sort_by_news(repository, [PIPELINE]) == ([], [PIPELINE], {})
        assert resolved.read_text() == '{"sources": "of the run under way"}'


def test_an_error_of_any_kind_is_the_pipelines_own(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = read_yaml(repository)
    document["pipelines"]["profile"] = copy.deepcopy(document["pipelines"][PIPELINE])
    document["pipelines"]["profile"]["release"]["store"] = "s3://bucket/x"
    write_yaml(repository, document)
    commit(repository, "more pipelines")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    shelf.shelf_folder(repository, "other").mkdir(parents=True)
    (shelf.shelf_folder(repository, "other") / "resolved.json").write_bytes(b"\xff{")

    changed, unchanged, broken = inputs.sort_by_news(repository, [PIPELINE, "profile", "other"])

    # A record that cannot be read tells nothing, so its pipeline has its turn.
    assert (changed, unchanged) == ([PIPELINE, "other"], [])
    assert list(broken) == ["profile"]
    assert "nobody" in broken["profile"]


def test_a_graph_that_cannot_be_read_gives_every_pipeline_its_turn(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "dvc.yaml").write_text("stages: [")
    commit(repository, "a damaged graph")
    assert inputs.sort_by_news(repository, [PIPELINE, "other"]) == ([PIPELINE, "other"], [], {})


@pytest.mark.parametrize("record", [b"", b"[]", b"\xff", b"{}", b'{"sources": '])
def test_a_record_that_cannot_be_read_means_new_data(repository: Path, record: bytes) -> None:
    folder = shelf.shelf_folder(repository, PIPELINE)
    folder.mkdir(parents=True)
    (folder / "resolved.json").write_bytes(record)
    new, broken = inputs.with_new_data(repository, [PIPELINE, "other"])
    assert set(new) == {PIPELINE, "other"}
    assert broken == {}
