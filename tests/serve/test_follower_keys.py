"""A server that follows a channel reads its key file again, and says what would not be accepted any more."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from graftline.errors import PromotionError
from graftline.registry.file_store import FileStore
from graftline.registry.keys import KeyFile
from graftline.serve.follower import Follower
from graftline.serve.served_base import Runtime
from tests.registry.people import People
from tests.serve.following import make_follower, make_release, promote, served, state_of


def without(people: People, *names: str) -> str:
    """The people's key file without some of them."""
    parts = people.text.split("- name: ")
    return "- name: ".join(part for part in parts if not part.startswith(names or ("nobody",)))


@dataclass(frozen=True)
class Left:
    """A follower that serves a release of bob's, who has been taken out of the key file since."""

    people: People
    file: Path
    follower: Follower
    version: str


@pytest.fixture
def left(store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path) -> Left:
    people, file = People(tmp_path), tmp_path / "keys.yaml"
    file.write_text(people.text)
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", KeyFile(file))
    release = make_release(store, tiny, tmp_path, seed=1, private_key=people.private_key("bob"))
    promote(store, *release, people=people)
    follower.poll()
    file.write_text(without(people, "bob"))
    return Left(people, file, follower, release[0])


def test_a_key_file_that_changes_counts_at_the_next_look(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    people, file = People(tmp_path), tmp_path / "keys.yaml"
    file.write_text(without(people, "ada"))
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", KeyFile(file))

    def enter(seed: int, builder: str) -> str:
        release = make_release(store, tiny, tmp_path, seed=seed, private_key=people.private_key(builder))
        promote(store, *release, people=people, builder=builder)
        follower.poll()
        return release[0]

    first = enter(1, "bob")
    second = enter(2, "ada")
    assert (state_of(follower)["version"], "role 'builder'" in state_of(follower)["error"]) == (first, True)
    file.write_text(people.text)
    follower.poll()
    assert (state_of(follower)["version"], state_of(follower)["error"]) == (second, None)
    file.write_text(without(people, "bob"))
    enter(3, "bob")
    assert (state_of(follower)["version"], "role 'builder'" in state_of(follower)["error"]) == (second, True)


@pytest.mark.parametrize("broken", ["keys: [", "", None])
def test_a_broken_key_file_keeps_the_last_good_one_and_is_told(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path, broken: str | None
) -> None:
    people, file = People(tmp_path), tmp_path / "keys.yaml"
    file.write_text(people.text)
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", KeyFile(file))
    file.unlink() if broken is None else file.write_text(broken)
    good = make_release(store, tiny, tmp_path, seed=1, private_key=people.private_key("bob"))
    for release in (good, make_release(store, tiny, tmp_path, seed=2)):
        promote(store, *release, people=people)
        follower.poll()
        assert state_of(follower)["version"] == good[0]
        assert "the keys that were read before count until it is right" in state_of(follower)["error"]
    file.write_text(people.text)
    follower.poll()
    assert "count until it is right" not in state_of(follower)["error"]


def test_a_served_release_whose_builder_is_taken_out_is_told_and_stays_served(left: Left) -> None:
    for _ in range(2):
        left.follower.poll()
        assert f"{left.version} is still served, and would not be accepted now" in state_of(left.follower)["error"]
    assert served(left.follower) == f"demo@{left.version}"
    left.file.write_text(left.people.text)
    left.follower.poll()
    assert state_of(left.follower)["error"] is None


def test_unsigned_releases_count_until_there_is_a_key_file(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    people, file = People(tmp_path), tmp_path / "keys.yaml"
    with pytest.raises(PromotionError, match="cannot read the key file"):
        KeyFile(file)
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", KeyFile(file, may_be_absent=True))
    first, second = (make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2))
    promote(store, *first)
    follower.poll()
    assert (state_of(follower)["version"], state_of(follower)["error"]) == (first[0], None)
    assert follower.is_unsigned
    promote(store, *second)
    for text in ("keys: [", people.text):  # also while the first key file is half written
        file.write_text(text)
        follower.poll()
        assert state_of(follower)["version"] == first[0]
        assert state_of(follower)["error"]
    assert not follower.is_unsigned
    file.write_text("keys: []\nunsigned: true\n")  # said, so that nobody wonders
    follower.poll()
    assert (state_of(follower)["version"], state_of(follower)["error"], follower.is_unsigned) == (second[0], None, True)


def test_a_builder_who_is_taken_out_while_the_store_is_away_is_told(
    left: Left, store: FileStore, tmp_path: Path
) -> None:
    store._root.rename(tmp_path / "away")
    left.follower.poll()
    (tmp_path / "away").rename(store._root)
    left.follower.poll()
    assert f"{left.version} is still served, and would not be accepted now" in state_of(left.follower)["error"]
