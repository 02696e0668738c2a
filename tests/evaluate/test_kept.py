"""Kept scores are read only for what they were made from; whatever else lies there is told and scored again."""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftline.digest import Digest, of_json
from graftline.errors import GraftlineError
from graftline.evaluate.kept import FORMAT, Ingredients, KeptScores, machine, of_release
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Scores, read_scores, write_scores
from graftline.evaluate.verdict import DIGESTS, ScoredInputs, ScoredRelease

SCORED = ScoredInputs(**{name: of_json(name) for name in DIGESTS})
CPU = {"device": "cpu", "processor": "x86_64", "instructions": "AVX2", "threads": 2}
INGREDIENTS = Ingredients(scored=SCORED, prepared=of_json("items"), code=of_json("code"), machine=CPU)
ITEM = ItemScore("i0", (-1.25, -2.5), 0, 0, True, 1.25, 1, True)
SCORES = Scores(
    of_json("template"),
    ("cat", "dog"),
    items=(ITEM, replace(ITEM, item_id="i1")),
    documents=(DocumentScore("d0", 0.1 + 0.2, 7),),
    answers=(AnswerScore("a0", "line\n\u2028 end", 0.0, 1 / 3, 0.5, 4, True),),
)


@pytest.fixture
def kept(tmp_path: Path) -> KeptScores:
    found = KeptScores(tmp_path, INGREDIENTS)
    found.write(replace(SCORES, numbers={"adapter_bytes": 5.0}, scored=SCORED))
    return found


def test_what_was_kept_is_read_to_the_bit_without_numbers_of_the_candidate_alone(kept: KeptScores) -> None:
    assert kept.read() == replace(SCORES, key=INGREDIENTS.key)


CHANGED: dict[str, Ingredients] = {
    **{name: replace(INGREDIENTS, scored=replace(SCORED, **{name: of_json("other")})) for name in DIGESTS},
    "no adapter": replace(INGREDIENTS, scored=replace(SCORED, adapter=None)),
    "prepared": replace(INGREDIENTS, prepared=of_json("other items")),
    "code": replace(INGREDIENTS, code=of_json("other code")),
    **{name: replace(INGREDIENTS, machine=CPU | {name: "other"}) for name in CPU},
}


@pytest.mark.parametrize("name", CHANGED)
def test_one_ingredient_that_differs_is_another_key(kept: KeptScores, tmp_path: Path, name: str) -> None:
    other = KeptScores(tmp_path, CHANGED[name])
    assert other.key != kept.key
    assert other.read() is None
    # Nor is it read where somebody moved it.
    kept.folder.rename(other.folder)
    assert other.read() is None


def test_which_release_a_model_is_changes_nothing(kept: KeptScores, tmp_path: Path) -> None:
    release = ScoredRelease("20260101T000000Z-0123456789ab", of_json("manifest"))
    same = KeptScores(tmp_path, replace(INGREDIENTS, scored=replace(SCORED, release=release)))
    assert same.read() is not None


def edit(**values: Any) -> Callable[[KeptScores], None]:
    def change(kept: KeptScores) -> None:
        path = kept.folder / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def flip(name: str, place: int) -> Callable[[KeptScores], None]:
    def change(kept: KeptScores) -> None:
        data = bytearray((kept.folder / name).read_bytes())
        data[place] ^= 1
        (kept.folder / name).write_bytes(data)

    return change


def cut(kept: KeptScores) -> None:
    path = kept.folder / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES: dict[str, Callable[[KeptScores], object]] = {
    "one bit of the header": flip("scores.jsonl", 20),
    "one bit of a row": flip("scores.jsonl", -30),
    "one bit of the record": flip("record.json", 0),
    "cut": cut,
    "no scores": lambda kept: (kept.folder / "scores.jsonl").unlink(),
    "another format": edit(format=FORMAT + 1),
    "another key": edit(key=str(of_json("other"))),
    "about something else": edit(about={}),
    "another digest": edit(scores=str(of_json("other"))),
    "no digest": edit(scores=None),
    "a list": lambda kept: (kept.folder / "record.json").write_text("[]"),
    "not UTF-8": lambda kept: (kept.folder / "record.json").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_told_and_not_read(kept: KeptScores, caplog: pytest.LogCaptureFixture, name: str) -> None:
    DAMAGES[name](kept)
    with caplog.at_level(logging.WARNING, logger="graftline"):
        assert kept.read() is None
    assert "kept scores are damaged, so the model is scored again: " in caplog.text
    kept.write(SCORES)
    assert kept.read() == replace(SCORES, key=INGREDIENTS.key)


def test_scores_whose_record_was_not_written_are_not_there(kept: KeptScores, caplog: pytest.LogCaptureFixture) -> None:
    (kept.folder / "record.json").unlink()
    assert kept.read() is None
    assert not caplog.text


def test_a_batch_is_kept_until_all_are_there(tmp_path: Path) -> None:
    kept = KeptScores(tmp_path, INGREDIENTS)
    for section in ("items", "documents", "answers"):
        assert kept.read_part(section, 3) is None
        kept.write_part(section, 3, list(getattr(SCORES, section)))
        assert kept.read_part(section, 3) == list(getattr(SCORES, section))
        assert kept.read_part(section, 4) is None
    kept.write(SCORES)
    assert kept.read_part("items", 3) is None
    assert sorted(path.name for path in kept.folder.iterdir()) == ["record.json", "scores.jsonl"]


@pytest.mark.parametrize("change", ["key", "section", "index", "bit", "cut", "empty"])
def test_a_batch_that_is_not_as_it_was_written_is_told_and_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    kept, other = KeptScores(tmp_path, INGREDIENTS), KeptScores(tmp_path, CHANGED["rows"])
    (other if change == "key" else kept).write_part("items", 3, list(SCORES.items))
    path, asked = kept.folder / "items-00003.jsonl", ("items", 3)
    match change:
        case "key":
            other.folder.rename(kept.folder)
        case "section":
            asked = ("answers", 3)
            path.rename(kept.folder / "answers-00003.jsonl")
        case "index":
            asked = ("items", 4)
            path.rename(kept.folder / "items-00004.jsonl")
        case "bit":
            path.write_bytes(path.read_bytes().replace(b"-1.25", b"-1.26", 1))
        case "cut":
            path.write_bytes(path.read_bytes().removesuffix(b"\n").rpartition(b"\n")[0])
        case "empty":
            path.write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="graftline"):
        assert kept.read_part(*asked) is None
    assert "kept scores of a batch are damaged, so it is scored again" in caplog.text


def test_who_comes_second_waits_for_the_first_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept, begun, seen = KeptScores(tmp_path, INGREDIENTS), threading.Event(), []

    def first() -> None:
        with kept.hold():
            begun.set()
            while "waiting for it" not in caplog.text:
                time.sleep(0.01)
            kept.write(SCORES)

    thread = threading.Thread(target=first)
    with caplog.at_level(logging.INFO, logger="graftline"):
        thread.start()
        begun.wait()
        with KeptScores(tmp_path, INGREDIENTS).hold():
            seen.append(kept.read())
    thread.join()
    assert seen == [replace(SCORES, key=INGREDIENTS.key)]


def test_a_cache_that_cannot_be_written_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = KeptScores(tmp_path / "file", INGREDIENTS)
    with pytest.raises(GraftlineError, match=r"cannot keep scores in .*file"), kept.hold():
        pass


def release(folder: Path, **changes: Any) -> Path:
    """A release's files, as far as its scores go."""
    shipped = replace(SCORES, numbers={"adapter_bytes": 5.0}, scored=SCORED, key=INGREDIENTS.key)
    write_scores(folder / "evaluation" / "candidate.jsonl", replace(shipped, **changes))
    return folder


def test_a_release_brings_the_scores_of_when_it_was_the_candidate(tmp_path: Path) -> None:
    found = of_release(release(tmp_path), INGREDIENTS.key, SCORED)
    assert found == replace(SCORES, key=INGREDIENTS.key)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"key": of_json("other")}, "the release was scored with other rows, settings or code or on another machine"),
        ({"key": None}, "the release was scored with other rows, settings or code or on another machine"),
        ({"scored": None}, "the release has scores of other files, so it is scored again: it does not say of what"),
        *(
            ({"scored": replace(SCORED, **{name: of_json("other")})}, f"again: {name}: scored {of_json('other')}")
            for name in DIGESTS
        ),
    ],
)
def test_a_release_with_other_scores_is_scored_again_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], told: str
) -> None:
    with caplog.at_level(logging.INFO, logger="graftline"):
        assert of_release(release(tmp_path, **changes), INGREDIENTS.key, SCORED) is None
    assert told in caplog.text


def test_a_release_without_scores_is_scored_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="graftline"):
        assert of_release(tmp_path, INGREDIENTS.key, SCORED) is None
    assert "the release has no scores that can be used" in caplog.text


def test_the_key_stands_in_the_file_of_scores_and_not_in_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    write_scores(path, replace(SCORES, key=INGREDIENTS.key))
    assert read_scores(path).key == INGREDIENTS.key
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[0])["key"] == str(INGREDIENTS.key)


def test_a_machine_is_told_by_what_rounds() -> None:
    assert machine("cpu", threads=3)["threads"] == 3
    assert machine("cpu", threads=3).keys() == CPU.keys()
    assert isinstance(INGREDIENTS.key, Digest)
