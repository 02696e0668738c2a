"""Git tags for DVC's registry: read with GTO's own parser, and fetched with DVC's own command."""

import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import gto
import pytest
from gto.tag import parse_name

from graftline.errors import ReleaseError
from graftline.registry.channel import ChannelChange, Entry, Log, append, next_entry, read
from graftline.registry.releases import fetch, publish
from graftline.registry.store import Store, open_store
from graftline.release.manifest import Manifest
from graftline.workflow.git import GitError
from graftline.workflow.gto_tags import Tagging, write_tags
from tests.cli.conftest import Run, run
from tests.release.packages import VERDICT, make_package
from tests.settings.documents import changed
from tests.workflow.test_packages import GRAPH
from tests.workflow.tiny_project import commit, git

__all__ = ["run"]
# DVC takes a second or two a command.
pytestmark = pytest.mark.slow
SOURCE = GRAPH.replace("pets:", "demo:").replace("runs/pets", "runs/demo")


class Registry:
    """A git repository with DVC, whose runs are committed, and a store with their releases."""

    def __init__(self, root: Path, folder: str = "") -> None:
        self.repository, self.root = root, root / folder
        (self.root / ".dvc").mkdir(parents=True)
        (self.root / ".dvc" / "config").write_text("[core]\n    analytics = false\n", encoding="utf-8")
        (self.root / ".gitignore").write_text("/runs/\n/store/\n/fetched/\n/.cache/\n/parts/\n", encoding="utf-8")
        (self.root / "dvc.yaml").write_text(SOURCE, encoding="utf-8")
        (self.root / "pipelines.yaml").write_bytes(changed())
        (self.root / "keys.yaml").write_text("keys: []\nunsigned: true\n", encoding="utf-8")
        git(root, "init", "-q", "-b", "main")
        self.store: Store = open_store(str(self.root / "store"))

    def release(self, seed: str, *, committed: bool = True) -> Manifest:
        """A package that a run of DVC has made, its release, and the commit of its dvc.lock."""
        parts = self.root / "parts"
        shutil.rmtree(parts, ignore_errors=True)
        make_package(parts, seed)
        subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "package@demo"], cwd=self.root, check=True)
        if committed:
            commit(self.repository, f"run {seed}")
        return publish(self.store, self.root / "runs" / "demo" / "package")

    def hold(self, manifest: Manifest, action: str = "promote") -> Entry:
        """A new entry of production."""
        log = read(self.store, "demo", "production")
        change = ChannelChange.model_validate(
            {
                "action": action,
                "version": manifest.version,
                "release": manifest.digest,
                "verdict": VERDICT,
                "actor": "ada",
                "reason": "test",
                "time": datetime.now(UTC).replace(microsecond=0),
            }
        )
        entry = next_entry(Log("demo", "production", log.entries), change)
        append(self.store, entry)
        return entry

    def tag(self, entry: Entry) -> Tagging:
        package = self.root / "fetched" / entry.change.version
        fetch(self.store, "demo", entry.change.version, package)
        return write_tags(self.root, entry, package)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, list[Manifest], list[Tagging]]:
    """Two releases that were promoted, and a rollback to the first; each was tagged, the last one twice."""
    made = Registry(tmp_path_factory.mktemp("gto") / "project")
    first = made.release("a")
    taggings = [made.tag(made.hold(first))]
    second = made.release("b")  # a run of DVC takes seconds
    taggings.append(made.tag(made.hold(second)))
    last = made.hold(first, "rollback")
    time.sleep(1.1)  # git dates tags by the second, and GTO orders them by date
    taggings += [made.tag(last), made.tag(last)]
    return made, [first, second], taggings


def test_promotions_and_rollbacks_become_versions_and_stages_once(
    lived: tuple[Registry, list[Manifest], list[Tagging]],
) -> None:
    registry, _, taggings = lived
    assert [tagging.made for tagging in taggings] == [
        ("demo@v0.0.1", "demo#production#1"),
        ("demo@v0.0.2", "demo#production!#2", "demo#production#3"),
        ("demo#production!#4", "demo#production#5"),
        (),
    ]
    commits = git(registry.root, "log", "--reverse", "--format=%H").split()
    assert [tagging.commit for tagging in taggings] == [commits[0], commits[1], commits[0], commits[0]]


def test_gto_reads_the_tags_as_they_are_meant(lived: tuple[Registry, list[Manifest], list[Tagging]]) -> None:
    registry, _, taggings = lived
    parsed = [parse_name(name) for tagging in taggings for name in tagging.made]
    assert [one.get("counter") for one in parsed] == [None, 1, None, 2, 3, 4, 5]
    assert {one["name"] for one in parsed} == {"demo"}
    with gto.api.GitRegistry.from_url(str(registry.root)) as state:
        artifact = state.get_artifacts()["demo"]
        versions = {version.version: version.commit_hexsha for version in artifact.versions}
        held = artifact.get_vstages()["production"]
    assert versions == {"v0.0.1": taggings[0].commit, "v0.0.2": taggings[1].commit}
    assert [one.version for one in held] == ["v0.0.1"]


def test_dvc_fetches_by_stage_what_the_channel_holds(
    lived: tuple[Registry, list[Manifest], list[Tagging]], tmp_path: Path
) -> None:
    registry, (first, _), _ = lived
    command = [sys.executable, "-m", "dvc", "artifacts", "get", str(registry.root), "demo", "--stage", "production"]
    subprocess.run([*command, "-o", "got", "-q"], cwd=tmp_path, check=True)
    assert (tmp_path / "got" / "manifest.json").read_bytes() == first.to_bytes()


def test_the_command_tags_what_the_channel_holds(
    lived: tuple[Registry, list[Manifest], list[Tagging]], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, (first, _), taggings = lived
    monkeypatch.chdir(registry.root)
    ended = run("tag", "demo")
    assert ended.code == 0, ended.err
    short = taggings[-1].commit[:12]
    told = f"{first.version} is demo@v0.0.1, demo#production#5 at {short}; they were there already\n"
    assert ended.out == told
    assert "nothing was ever promoted to staging" in run("tag", "demo", "--channel", "staging").out


def test_a_release_whose_lock_file_nobody_committed_is_refused_with_what_to_do(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "project", folder="models")
    commit(registry.repository, "empty")
    entry = registry.hold(registry.release("a", committed=False))
    with pytest.raises(ReleaseError, match=r"no commit's dvc\.lock holds release .* commit dvc\.lock"):
        registry.tag(entry)
    assert git(registry.root, "tag") == ""
    commit(registry.repository, "the run")
    # A project in a folder of the repository, as GTO names its artifacts; after somebody's own version and tags.
    git(registry.root, "tag", "-a", "-m", "by hand", "models=demo@v1.4.9")
    git(registry.root, "tag", "models=demo@v7.0.0")  # lightweight: none of GTO's
    git(registry.root, "tag", "-a", "-m", "by hand", "models=demo#staging#8")
    assert registry.tag(entry).made == ("models=demo@v1.4.10", "models=demo#production#9")
    assert parse_name("models=demo@v1.4.10")["name"] == "models:demo"


def test_outside_a_repository_git_says_so(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "project")
    entry = registry.hold(publish_alone(registry))
    shutil.rmtree(registry.root / ".git")
    with pytest.raises(GitError, match="not a git repository"):
        registry.tag(entry)


def publish_alone(registry: Registry) -> Manifest:
    make_package(registry.root / "parts", "a")
    return publish(registry.store, registry.root / "parts")
