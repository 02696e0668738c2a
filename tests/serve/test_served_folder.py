"""What a server that follows channels keeps on its disk, and what it holds in the store."""

import os
from pathlib import Path

import pytest

from graftline.registry.file_store import FileStore
from graftline.serve.follower import Follower
from graftline.serve.served_base import Runtime
from graftline.serve.served_folder import ServedFolder
from tests.serve.following import (
    leased,
    make_follower,
    make_release,
    promote,
    releases_on_disk,
)


def test_what_is_served_is_held_in_the_store(follower: Follower, store: FileStore, tiny: Path, tmp_path: Path) -> None:
    releases = [make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2, 3)]
    for release in releases:
        promote(store, *release)
        follower.poll()
        assert leased(store) == {release[0]}
    names = {model.name for model in follower.catalog.models()}  # type: ignore[attr-defined]
    assert names == {"tiny", "demo@production", f"demo@{releases[1][0]}", f"demo@{releases[2][0]}"}


def test_the_disk_keeps_what_is_served_and_the_one_before(
    follower: Follower, store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    made = [make_release(store, tiny, tmp_path, seed=seed) for seed in range(1, 5)]
    for number, release in enumerate(made):
        promote(store, *release)
        follower.poll()
        assert releases_on_disk(tmp_path / "fetched") == {version for version, _ in made[: number + 1][-2:]}
    # A server that is started anew finds what another one has left.
    again = make_follower(store, tiny, runtime, tmp_path / "fetched")
    promote(store, *made[0])
    again.poll()
    assert releases_on_disk(tmp_path / "fetched") == {made[0][0], made[2][0], made[3][0]}  # the first still holds two


def test_a_release_that_another_server_uses_stays_on_the_disk(tmp_path: Path) -> None:
    one, other = ServedFolder(tmp_path), ServedFolder(tmp_path)
    for server, version in ((one, "v1"), (other, "v2"), (one, "v3")):
        server.use("demo", version).mkdir()
    one.keep({("demo", "v3")}, {"demo"})
    assert releases_on_disk(tmp_path) == {"v2", "v3"}
    other.keep(set(), {"demo"})
    assert releases_on_disk(tmp_path) == {"v3"}
    one.keep(set(), {"another"})
    assert releases_on_disk(tmp_path) == {"v3"}


def test_what_a_killed_server_had_begun_to_fetch_goes_after_a_day(tmp_path: Path) -> None:
    old, new = (tmp_path / "demo" / f".{version}.{version}.part" for version in ("v1", "v2"))
    for part in (old, new):
        part.mkdir(parents=True)
    os.utime(old, (0, 0))
    ServedFolder(tmp_path).keep(set(), {"demo"})
    assert releases_on_disk(tmp_path) == {new.name}


def test_servers_of_one_host_name_and_process_number_hold_what_each_serves(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As containers on the host's network are; and a host's name may be longer than a lease's takes."""
    monkeypatch.setattr("socket.gethostname", lambda: "Größe_" + "a" * 90)
    made = [make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2)]
    for number, release in enumerate(made):
        promote(store, *release)
        make_follower(store, tiny, runtime, tmp_path / f"fetched-{number}").poll()
    assert leased(store) == {version for version, _ in made}


@pytest.mark.parametrize("name", ["lost+found", "my notes"])
def test_folders_that_are_no_releases_stay_on_the_disk(tmp_path: Path, name: str) -> None:
    server = ServedFolder(tmp_path)
    (tmp_path / "demo" / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "demo" / "link").symlink_to(tmp_path / "elsewhere")
    server.use("demo", "v1").mkdir()
    server.keep(set(), {"demo"})
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {name, "link"}
