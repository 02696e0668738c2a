"""The harness: turns, ratios, processes, and a command line that keeps what it does not measure."""

import json
import os
import re
import statistics
from pathlib import Path

import pytest

from studies import harness
from studies.harness import Json, Setting, own_process, ratio, run_parts, turns

ROOT = Path(__file__).resolve().parents[2]


def test_each_side_warms_up_once_and_then_takes_its_turn_in_every_round() -> None:
    called: list[str] = []

    def side(name: str, seconds: float) -> float:
        called.append(name)
        return seconds

    found = turns({"a": lambda: side("a", 1.0), "b": lambda: side("b", 2.0)}, 20, seed=3)
    assert found == {"a": [1.0] * 20, "b": [2.0] * 20}
    rounds = [called[at : at + 2] for at in range(2, len(called), 2)]
    assert called[:2] == ["a", "b"]
    assert all(sorted(order) == ["a", "b"] for order in rounds)
    assert {tuple(order) for order in rounds} == {("a", "b"), ("b", "a")}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios_inside_its_interval() -> None:
    # The machine was three times slower in the last round, for both sides.
    found = ratio([2.0, 2.2, 6.6], [1.0, 1.0, 3.0])
    assert found["median"] == pytest.approx(statistics.median([2.0, 2.2, 2.2]))
    assert 2.0 <= found["low"] <= found["median"] <= found["high"] <= 2.2
    assert ratio([3.0], [2.0]) == {"median": 1.5, "low": 1.5, "high": 1.5, "rounds": 1}


def told(name: str) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get(name)


def test_a_process_of_its_own_has_the_environment_it_is_given_and_leaves_ours_alone() -> None:
    process, value = own_process(told, "A_STUDY", environment={"A_STUDY": "1"})
    assert process != os.getpid()
    assert value == "1"
    assert "A_STUDY" not in os.environ


def part_of(setting: Setting, number: int) -> tuple[int, int]:
    setting.keep({"found": number})
    return os.getpid(), number + setting.seed


def test_a_part_s_setting_goes_along_into_a_process_of_its_own(tmp_path: Path) -> None:
    kept: list[Json] = []
    setting = Setting(work=tmp_path, keep=lambda found: kept.append(found), seed=2)
    process, found = setting.apart(part_of, setting, 40)
    assert process != os.getpid()
    assert (found, kept) == (42, []), "what a part keeps is written where the part was begun"


def test_an_error_of_a_process_of_its_own_is_ours() -> None:
    with pytest.raises(ZeroDivisionError):
        own_process(divmod, 1, 0)


def test_parts_that_are_not_run_keep_what_the_file_has(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    out.write_text(json.dumps({"old": {"x": 1}, "new": {"x": 1}}), encoding="utf-8")

    def part(setting: Setting) -> Json:
        return {"x": setting.seed}

    run_parts({"new": part}, Setting(work=tmp_path, seed=7, rounds=3), out, command="python -m studies some")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["old"] == {"x": 1}
    assert found["new"]["x"] == found["new"]["measured"]["seed"] == 7
    assert found["new"]["measured"]["command"] == "python -m studies some --parts new --rounds 3 --seed 7"


def test_a_part_that_breaks_off_leaves_what_it_kept_and_says_that_it_is_partial(tmp_path: Path) -> None:
    out = tmp_path / "found.json"

    def part(setting: Setting) -> Json:
        assert setting.ends == 12.0
        setting.keep({"x": 1})
        setting.keep({"x": 2})
        raise KeyError

    with pytest.raises(KeyError):
        run_parts({"new": part}, Setting(work=tmp_path, ends=12.0), out, command="python -m studies some")
    found = json.loads(out.read_text(encoding="utf-8"))["new"]
    assert (found["x"], found["partial"]) == (2, True)
    assert found["measured"]["command"] == "python -m studies some --parts new"


def test_the_list_names_every_study_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main([]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [name for name, _ in lines] == harness.names()
    assert all(about.endswith((".", "?")) or ":" in about for _, about in lines)


def test_a_study_that_is_not_there_is_answered_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main(["servign"]) == 2
    assert "'servign'" in (said := capsys.readouterr().err)
    assert "serving" in said


def test_studies_use_nothing_of_the_tests() -> None:
    files = list((ROOT / "studies").rglob("*.py"))
    assert len(files) > 20
    assert [str(path) for path in files if re.search(r"^\s*(from|import) tests\b", path.read_text("utf-8"), re.M)] == []
