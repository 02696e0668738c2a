"""Small runs of what ``make soak`` does at full size (tests/registry/soak.py)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def soaked(tmp_path: Path, part: str, on: str, *more: str) -> dict[str, Any]:
    """A part in a process of its own: its forks must not inherit the locks of threads that other tests left in this."""
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.registry.soak", "--only", part, "--on", on, "--out", str(out)]
    subprocess.run([*command, *more], check=True)
    result: dict[str, Any] = json.loads(out.read_text())[part][on]
    return result


@pytest.mark.parametrize(("on", "num_promoters", "num_rounds"), [("file", 8, 10), ("moto", 4, 4), ("ministack", 4, 4)])
def test_of_promoters_at_once_exactly_one_wins_each_round(
    tmp_path: Path, on: str, num_promoters: int, num_rounds: int
) -> None:
    report = soaked(tmp_path, "promoters", on, "--promoters", str(num_promoters), "--rounds", str(num_rounds))
    assert report["entries"] == num_rounds
    assert report["conflicts_told"] == num_rounds * (num_promoters - 1)


@pytest.mark.parametrize("on", ["moto", "ministack"])
def test_publishing_through_a_bad_network_ends_complete_or_absent(tmp_path: Path, on: str) -> None:
    report = soaked(tmp_path, "faults", on, "--faults", "25", "--seed", "8")
    assert report["faults"] >= 25
    assert report["published"] + report.get("gave_up", 0) == report["publishes"]


def test_promoters_publishers_and_cleaners_at_once_lose_nothing(tmp_path: Path) -> None:
    report = soaked(tmp_path, "mix", "file", "--promoters", "3", "--rounds", "6", "--seed", "18")
    assert report["publish done"] > 0
    assert report["processes"] == 7


def test_processes_that_fetch_into_one_cache_all_get_the_release(tmp_path: Path) -> None:
    assert soaked(tmp_path, "caches", "file", "--fetchers", "4", "--fetches", "3")["failed"] == 0


@pytest.mark.long
@pytest.mark.slow
def test_a_publisher_or_promoter_that_is_killed_at_any_step_leaves_nothing_half(tmp_path: Path) -> None:
    steps = soaked(tmp_path, "kills", "file")
    assert steps["publish_steps"] > 30
    assert steps["promote_steps"] > 30
