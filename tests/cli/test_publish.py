"""`graftline publish`: a release on a stand-in for the Hugging Face Hub, through huggingface_hub itself."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from graftline.registry.store import Store, open_store
from graftline.release.manifest import Manifest, read_manifest
from tests.cli.conftest import Run
from tests.registry.hub_stand_in import TOKEN, HubStandIn
from tests.registry.people import People

REPOSITORY = "example-org/demo"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    made = HubStandIn()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    yield made
    huggingface_hub.close_session()
    made.close()


@pytest.fixture
def store(project: Path) -> Store:
    return open_store(str(project / "store"))


@pytest.fixture
def people(project: Path) -> People:
    made = People(project)
    (project / "keys.yaml").write_text(made.text, encoding="utf-8")
    return made


def release(project: Path, store: Store, people: People, seed: str = "a", builder: str = "bob") -> Manifest:
    return people.release(store, project / seed, seed, builder=builder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages whose README has the front matter that the hub asks for."""

    def write(folder: Path, seed: str = "a") -> None:
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(seed.encode() * 70_000)
        (folder / "README.md").write_text(f"---\nlicense: mit\n---\n# {seed}\n", encoding="utf-8")
        (folder / f"only-{seed}.txt").write_text(seed, encoding="utf-8")

    monkeypatch.setattr("tests.release.packages.write_files", write)


def test_a_release_becomes_a_commit_of_exactly_its_files_under_its_version(
    project: Path, run: Run, store: Store, people: People, hub: HubStandIn
) -> None:
    first, second = (release(project, store, people, seed) for seed in "ab")

    made = run("publish", "demo", first.version, "--hub", REPOSITORY)
    again = run("publish", "demo", first.version, "--hub", REPOSITORY)
    newer = run("publish", "demo", second.version, "--hub", REPOSITORY)

    assert made.code == 0, made.err
    assert "private until you change that" in made.out
    assert "was on the hub already" in again.out
    assert newer.code == 0, newer.err
    assert "private" not in newer.out
    found = hub.repositories[REPOSITORY]
    assert found.visibility == "private"
    assert list(found.tags) == [first.version, second.version]
    for seed, manifest in (("a", first), ("b", second)):
        files = found.files(found.tags[manifest.version])
        files.pop(".gitattributes")
        assert files == files_of(project / seed)
    assert len(found.commits) == 3, "an empty one, and one for each release"


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    project: Path, run: Run, store: Store, people: People, hub: HubStandIn
) -> None:
    manifest = release(project, store, people)
    ended = run("publish", "demo", manifest.version, "--hub", REPOSITORY, "--dry-run")
    assert ended.code == 0, ended.err
    assert "70000  adapter/adapter_model.safetensors" in ended.out
    assert f"would be the content of {REPOSITORY}, under the tag {manifest.version}; nothing was sent" in ended.out
    assert hub.requests == []


def test_a_release_that_a_stranger_signed_or_that_is_damaged_does_not_leave_the_store(
    project: Path, run: Run, store: Store, people: People, hub: HubStandIn
) -> None:
    strangers = release(project, store, people, builder="mallory")
    ended = run("publish", "demo", strangers.version, "--hub", REPOSITORY)
    assert ended.code == 2
    assert "the signature is of none whose key has the role 'builder'" in ended.err
    damaged = release(project, store, people, "b")
    (project / "store" / "releases" / "demo" / damaged.version / "only-b.txt").unlink()
    ended = run("publish", "demo", damaged.version, "--hub", REPOSITORY)
    assert ended.code == 2
    assert "only-b.txt" in ended.err
    assert hub.requests == []


def test_what_was_interrupted_before_its_tag_is_finished_by_the_next_call(
    project: Path, run: Run, store: Store, people: People, hub: HubStandIn
) -> None:
    manifest = release(project, store, people)
    hub.broken = f"POST /api/models/{REPOSITORY}/tag"
    ended = run("publish", "demo", manifest.version, "--hub", REPOSITORY)
    assert ended.code == 2
    assert "was not written: HfHubHTTPError: " in ended.err
    assert "500 Internal Server Error" in ended.err
    hub.broken = None
    assert run("publish", "demo", manifest.version, "--hub", REPOSITORY).code == 0
    found = hub.repositories[REPOSITORY]
    assert found.tags == {manifest.version: found.head}
    assert len(found.commits) == 2


@pytest.mark.parametrize("name", ["demo", "a/b/c", "", "org/na me", "org/..", "-x/y", "org/x.git"])
def test_a_name_that_the_hub_cannot_have_is_refused_first(
    project: Path, run: Run, store: Store, people: People, hub: HubStandIn, name: str
) -> None:
    ended = run("publish", "demo", "20261124T061800Z-0123456789ab", "--hub", name)
    assert ended.code == 2
    assert "expected ORG/NAME" in ended.err
    assert hub.requests == []


def test_a_token_that_may_not_write_is_told_with_what_to_set(
    project: Path, run: Run, store: Store, people: People, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = release(project, store, people)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    ended = run("publish", "demo", manifest.version, "--hub", REPOSITORY)
    assert ended.code == 2
    assert "set HF_TOKEN to a token that may write there" in ended.err
    assert "hf_another" not in ended.err


def test_a_hub_that_is_not_there_is_told(
    project: Path, run: Run, store: Store, people: People, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = release(project, store, people)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    ended = run("publish", "demo", manifest.version, "--hub", REPOSITORY)
    assert ended.code == 2
    assert "run the same command again later" in ended.err
    assert read_manifest(project / "a") == manifest
