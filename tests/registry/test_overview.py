from pathlib import Path

import pytest

from graftline.registry.overview import overview
from graftline.registry.promotion import rollback
from graftline.registry.releases import release_key
from graftline.registry.store import Store
from graftline.release.pages.registry_page import render_registry, short_version, write_registry
from graftline.settings import Channel
from tests.registry.people import NOW
from tests.registry.test_promotion import Stage
from tests.release.pages.test_report import Outline


@pytest.fixture
def stage(file_store: Store, tmp_path: Path) -> Stage:
    """Two releases in production, then a rollback; a third one nowhere."""
    stage = Stage(file_store, tmp_path)
    first = stage.release("a")
    second = stage.release("b", against=first.version)
    stage.release("c", against=second.version, outcome="inconclusive")
    stage.promote(first, to="staging")
    for manifest in (first, second):
        stage.promote(manifest, policy=Channel())
    rollback(file_store, pipeline="demo", to_channel="production", actor="ada", reason="errors <b>rose</b>")
    return stage


def test_channels_releases_and_states_are_read_from_the_store(stage: Stage) -> None:
    view = overview(stage.store, keys=stage.people.keys, now=NOW)
    (pipeline,) = view.pipelines
    assert [(channel.name, len(channel.entries)) for channel in pipeline.channels] == [
        ("production", 3),
        ("staging", 1),
    ]
    assert {release.state for release in pipeline.releases} == {"verified"}
    assert {release.detail for release in pipeline.releases} == {"every byte; signed by bob"}
    held = {release.version: release.channels for release in pipeline.releases if release.channels}
    assert held == {pipeline.channels[1].entries[0].version: ("production", "staging")}


def test_without_keys_nothing_is_called_verified(stage: Stage) -> None:
    (pipeline,) = overview(stage.store, keys=None, now=NOW).pipelines
    assert {release.state for release in pipeline.releases} == {"not checked"}


def test_damage_is_shown_where_it_is(stage: Stage) -> None:
    versions = [release.version for release in overview(stage.store, keys=None, now=NOW).pipelines[0].releases]
    stage.store.put_bytes(release_key("demo", versions[0], "README.md"), b"# x\n")
    stage.store.put_bytes(release_key("demo", versions[1], "manifest.json"), b"{}")
    stage.store.delete(release_key("demo", versions[2], "model.sig"))
    stage.store.delete("channels/demo/production/0000000002.json")
    view = overview(stage.store, keys=stage.people.keys, now=NOW)
    assert [release.state for release in view.pipelines[0].releases] == ["damaged"] * 3
    details = [release.detail for release in view.pipelines[0].releases]
    assert "README.md has digest" in details[0]
    assert "/manifest.json: manifest is not right" in details[1]
    assert "has no model.sig" in details[2]
    assert "0000000002.json is missing" in str(view.pipelines[0].channels[0].problem)
    page = " ".join(Outline(render_registry(view)).text)
    assert "history broken" in page
    assert "0000000002.json is missing" in page


def test_the_page_shows_history_and_loads_nothing(stage: Stage, tmp_path: Path) -> None:
    view = overview(stage.store, keys=stage.people.keys, now=NOW)
    write_registry(tmp_path / "registry.html", view)
    page = Outline((tmp_path / "registry.html").read_text())
    text = " ".join(page.text)
    assert page.headings == ["demo", "Releases of demo", "History of demo / production", "History of demo / staging"]
    assert page.loaded == []
    assert "script" not in page.tags
    for shown in ("signed by bob", "rollback", "errors <b>rose</b>", "inconclusive", "rules met: 7"):
        assert shown in text


def test_an_empty_store_has_a_page(file_store: Store) -> None:
    assert "The store is empty." in render_registry(overview(file_store, keys=None, now=NOW))


def test_versions_are_shortened_for_people() -> None:
    assert short_version("20261124T061800Z-0123456789ab") == "24 Nov 06:18 · 0123456"
    assert short_version("base") == "base"
