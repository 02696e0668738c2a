"""Snapshots from a small hub over HTTP: it speaks the few routes that huggingface_hub asks."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from graftline.data.sources import fetch, parse, resolve
from graftline.errors import SourceError, SourceUnavailableError
from tests.data.sources.servers import Answer, FileServer, status, whole

OLD, NEW = "a" * 40, "b" * 40
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "pytorch_model.bin": b"pickle"}


@pytest.fixture
def hub(server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """A hub with org/base at two commits; ``main`` is the older one."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    huggingface_hub.close_session()
    publish(server, OLD, FILES)
    publish(server, NEW, FILES | {"model.safetensors": b"new weights"})
    point(server, "main", OLD)
    yield server
    huggingface_hub.close_session()


def publish(server: FileServer, commit: str, files: dict[str, bytes]) -> None:
    point(server, commit, commit)
    tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
    server.answers[f"/api/models/org/base/tree/{commit}"] = [json_answer(tree)]
    for name, data in files.items():
        headers = {"ETag": f'"{commit}-{name}"', "X-Repo-Commit": commit}
        server.answers[f"/org/base/resolve/{commit}/{name}"] = [whole(data, **headers)]


def point(server: FileServer, revision: str, commit: str) -> None:
    info = {"id": "org/base", "sha": commit, "siblings": [{"rfilename": name} for name in FILES]}
    server.answers[f"/api/models/org/base/revision/{revision}"] = [json_answer(info)]


def json_answer(value: object) -> Answer:
    return whole(json.dumps(value).encode(), **{"Content-Type": "application/json"})


def test_a_commit_is_fetched_once_without_files_that_could_run_code(hub: FileServer, cache: Path) -> None:
    source = parse(f"hf:org/base@{OLD}")

    folder = fetch(source, sha256=None, cache=cache)
    requests = hub.requests.total()
    again = fetch(source, sha256=None, cache=cache)

    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert again == folder
    assert hub.requests.total() == requests


def test_a_branch_is_resolved_to_what_it_holds_now_and_the_old_digest_stays_available(
    hub: FileServer, cache: Path
) -> None:
    source = parse("hf:org/base@main")
    old = resolve(source, cache=cache)
    point(hub, "main", NEW)

    new = resolve(source, cache=cache)

    assert new != old
    weights = {d: (fetch(source, sha256=d.hex, cache=cache) / "model.safetensors").read_bytes() for d in (old, new)}
    assert weights == {old: b"weights", new: b"new weights"}


def test_a_snapshot_of_another_digest_is_refused(hub: FileServer, cache: Path) -> None:
    with pytest.raises(SourceError, match=f"has digest sha256:[0-9a-f]{{64}}; expected sha256:{'0' * 64}"):
        fetch(parse(f"hf:org/base@{OLD}"), sha256="0" * 64, cache=cache)


@pytest.mark.parametrize(
    ("headers", "code", "message"),
    [
        ({"X-Error-Code": "RevisionNotFound"}, 404, "there is no revision 'nope'; expected a commit, tag or branch"),
        ({"X-Error-Code": "RepoNotFound"}, 404, "there is no such repository, or it is private"),
        ({"X-Error-Code": "GatedRepo"}, 403, "is gated; accept its terms on its page and set HF_TOKEN"),
        ({}, 500, "could not be fetched: HfHubHTTPError"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: FileServer, cache: Path, headers: dict[str, str], code: int, message: str
) -> None:
    hub.answers["/api/models/org/base/revision/nope"] = [status(code, **headers)]

    with pytest.raises(SourceError, match=message):
        fetch(parse("hf:org/base@nope"), sha256=None, cache=cache)


def test_a_hub_that_is_not_there_is_an_error(hub: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(SourceUnavailableError, match=r"hf:org/base@main could not be fetched: .*; check the network"):
        fetch(parse("hf:org/base@main"), sha256=None, cache=cache)
