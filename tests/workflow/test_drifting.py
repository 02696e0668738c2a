"""Drift of logged prompts against the training rows of the release in production, as flows.watch looks for it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.logging import disable_run_logger

from graftline import settings
from graftline.data.rows import Message, Row
from graftline.digest import of_bytes
from graftline.errors import DataError, ReleaseError
from graftline.registry.file_store import FileStore
from graftline.registry.releases import publish, release_key
from graftline.registry.request_log import LogPlace
from graftline.release.manifest import GateVerdict, Lineage, describe, write_manifest
from graftline.workflow import watching
from graftline.workflow.drift_profile import PROMPTS_FILE, opening, prompt_of, read_prompts, write_prompts
from graftline.workflow.drifting import Found, look
from tests.registry.entries import put_in
from tests.settings.documents import changed
from tests.workflow.test_logged_rows import request

NOW = datetime.now(UTC)
ANIMALS, PLANTS = ["cat", "dog", "cow", "horse", "bird", "fish"], ["oak", "fern", "rose", "moss", "pine", "reed"]


def question(rng: np.random.Generator, words: list[str]) -> str:
    return "what is a " + " ".join(words[number] for number in rng.integers(0, len(words), 4))


def row(text: str) -> Row:
    return Row((Message("user", text, False), Message("assistant", "an answer", True)), 1)


class Project:
    """A folder with pipelines.yaml, a release in production that was trained on animals, and a request log."""

    def __init__(self, root: Path, **drift: Any) -> None:
        log = {"store": "logs", "drift": {"alpha": 0.05} | drift}
        (root / "pipelines.yaml").write_bytes(changed(**{"channels.production.request_log": log}))
        (root / "keys.yaml").write_text("unsigned: true\n", encoding="utf-8")
        self.root, self.store, self.rng = root, FileStore(root / "store"), np.random.default_rng(1)
        self.place = LogPlace(FileStore(root / "logs"), "demo", "production", 30)
        self.number, self.num_parts = 0, 0

    def release(self, minute: int = 0, *, with_prompts: bool = True) -> str:
        package, nothing = self.root / f"package-{minute}", of_bytes(b"")
        package.mkdir()
        (package / "README.md").write_text("a card", encoding="utf-8")
        if with_prompts:
            rows = [row(question(self.rng, ANIMALS)) for _ in range(120)]
            write_prompts(rows, package / PROMPTS_FILE)
        digests = ("base", "data", "template", "config")
        lineage = Lineage(
            **{f"{name}_digest": nothing for name in digests},
            source_digest=None,
            quantizer_digest=None,
            dvc_lock_digest=None,
            code_revision="test",
            trust_remote_code=False,
        )
        verdict = GateVerdict(outcome="pass", against="base", digest=nothing)
        created = datetime(2026, 1, 1, 0, minute, tzinfo=UTC)
        write_manifest(package, describe(package, pipeline="demo", created=created, lineage=lineage, verdict=verdict))
        manifest = publish(self.store, package)
        put_in(self.store, manifest, time=created)
        return manifest.version

    def ask(self, version: str, words: list[str], number: int, *, key: int | None = None) -> None:
        """Log requests, each of another key unless one is given, in a part of ten minutes ago."""
        lines = []
        for _ in range(number):
            self.number += 1
            one = request(self.number, question(self.rng, words), release=f"demo@{version}")
            lines.append(one if key is None else one.model_copy(update={"key": f"{key:064x}"}))
        data = "".join(line.model_dump_json() + "\n" for line in lines).encode()
        self.num_parts += 1
        at = NOW - timedelta(minutes=10) + timedelta(seconds=self.num_parts)
        self.place.store.put_bytes(self.place.part_key("server", 0, at), data)

    def look(self, *, later: timedelta = timedelta()) -> Found:
        found = look(settings.load(self.root / "pipelines.yaml"), "demo", now=NOW + later)
        assert found is not None
        return found


def test_what_users_always_asked_raises_no_alarm_and_other_questions_do(tmp_path: Path) -> None:
    project = Project(tmp_path)
    version = project.release()
    project.ask(version, ANIMALS, 60)
    found = project.look()
    assert not found.has_drifted
    assert f"no drift of prompts found; 60 keys of {version}; evidence, of 100 needed: length " in found.told
    project.ask(version, PLANTS, 40)
    found = project.look()
    assert found.has_drifted
    assert not found.retrain, "it is only told, unless the setting says otherwise"
    assert found.told.startswith("prompts have drifted from the training rows: unusual tokens")


def test_a_retraining_is_asked_for_once_a_release(tmp_path: Path) -> None:
    project = Project(tmp_path, retrain=True)
    first = project.release()
    project.ask(first, PLANTS, 40)
    assert [(found.has_drifted, found.retrain) for found in (project.look(), project.look())] == [
        (True, True),
        (True, False),
    ]
    second = project.release(1)
    assert project.look().told.startswith(f"no drift of prompts found; 0 keys of {second}")
    project.ask(second, PLANTS, 40)
    assert project.look().retrain


def test_the_flow_watch_tells_what_drifts_retrains_it_if_it_should_and_goes_on_after_a_problem(
    tmp_path: Path,
) -> None:
    project = Project(tmp_path, retrain=True)
    version = project.release()
    project.ask(version, PLANTS, 40)
    new: dict[str, str] = {}
    with disable_run_logger():
        assert watching.look_for_drift(tmp_path, new) == {}
        assert list(new) == ["demo"]
        assert watching.look_for_drift(tmp_path, new) == {}
        project.place.store.put_bytes(f"drift/demo/production/{version}.json", b"{}")
        assert "remove it to begin anew" in watching.look_for_drift(tmp_path, {})["demo"]


def test_a_key_counts_once_however_often_it_asks(tmp_path: Path) -> None:
    project = Project(tmp_path)
    version = project.release()
    project.ask(version, PLANTS, 100, key=7)
    found = project.look()
    assert not found.has_drifted
    assert "1 key of" in found.told


def test_the_test_goes_on_when_the_log_is_deleted_and_looking_again_changes_nothing(tmp_path: Path) -> None:
    project = Project(tmp_path)
    version = project.release()
    project.ask(version, PLANTS, 12)
    told = project.look().told
    assert project.look().told == told
    state = json.loads((tmp_path / "logs" / "drift" / "demo" / "production" / f"{version}.json").read_bytes())
    assert "oak" not in json.dumps(state)
    for key in project.place.parts():
        project.place.store.delete(key)
    assert project.look().told == told
    project.ask(version, PLANTS, 30)
    assert project.look(later=timedelta(minutes=-6)).told == told, "a part may still come before this one"
    assert project.look().has_drifted


def test_numbers_of_earlier_looks_mean_the_same_on_a_machine_whose_directions_have_other_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path)
    version = project.release()
    project.ask(version, ANIMALS, 60)
    told = project.look().told
    eigh = np.linalg.eigh

    def other_signs(matrix: Any) -> Any:
        values, vectors = eigh(matrix)
        return values, -vectors

    monkeypatch.setattr(np.linalg, "eigh", other_signs)
    assert project.look().told == told


@pytest.mark.parametrize(
    "forged",
    [
        {"keys": {"a": [1, 2, 3, 4, float("nan")]}},
        {"keys": {"a": [1, 2, 3, 4, "x"]}},
        {"keys": {"a": [1, 2, 3, 4]}},
        {"keys": [["a", [1, 2, 3, 4, 5]]]},
        {"until": "zzz"},
        {"directions": [[0.1], [0.2]]},
        {"directions": [["x"]]},
    ],
)
def test_a_state_that_was_not_written_by_a_look_is_refused(tmp_path: Path, forged: dict[str, Any]) -> None:
    project = Project(tmp_path)
    version = project.release()
    project.ask(version, ANIMALS, 1)
    project.look()
    key = f"drift/demo/production/{version}.json"
    state = json.loads(project.place.store.get(key) or b"") | forged
    project.place.store.put_bytes(key, json.dumps(state).encode())
    with pytest.raises(DataError, match="remove it to begin anew"):
        project.look()


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert "nothing was ever promoted" in project.look().told
    version = project.release(with_prompts=False)
    assert f"release {version} has no prompts.json" in project.look().told
    version = project.release(1)
    project.ask(version, PLANTS, 1)
    project.look()
    state = f"drift/demo/production/{version}.json"
    project.place.store.put_bytes(state, b"{}")
    with pytest.raises(DataError, match="remove it to begin anew"):
        project.look()
    project.store.put_bytes(release_key("demo", version, PROMPTS_FILE), b"{}")
    with pytest.raises(ReleaseError, match=r"prompts\.json of release .* is missing or damaged"):
        project.look()
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    assert look(settings.load(tmp_path / "pipelines.yaml"), "demo") is None


def test_a_prompt_is_the_beginning_of_its_conversation_in_rows_and_requests_alike(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "Hello, Welt!"), ("assistant", "hi"), ("user", "more")]
    assert opening(turns) == ["be brief", "Hello, Welt!"]
    assert opening(turns[2:3]) == ["hi"]
    messages = tuple(Message(role, text, role == "assistant") for role, text in (*turns, ("assistant", "end")))
    write_prompts([Row(messages, 1)], tmp_path / PROMPTS_FILE)
    [read] = read_prompts((tmp_path / PROMPTS_FILE).read_bytes(), "v1")
    assert read == prompt_of(["be brief", "HELLO, Welt!"])
    assert (read.length, len(read.tokens)) == (6, 6)
    assert prompt_of(["mail [removed] now"]) == prompt_of(["mail now"])
    assert prompt_of(["今日は"]).length == 3
    with pytest.raises(DataError, match=r"prompts\.json of v1 cannot be read"):
        read_prompts(b'{"format": 1, "prompts": [[1]]}', "v1")
