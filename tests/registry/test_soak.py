"""Small runs of what ``make soak`` does at full size (tests/registry/soak.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.registry.servers import BUCKET
from tests.registry.soak import fetch_at_once, mix, pointing_at, publish_under_faults, race


def test_of_promoters_at_once_exactly_one_wins_each_round_on_files(tmp_path: Path) -> None:
    assert race(str(tmp_path / "store"), 8, 10)["entries"] == 10


@pytest.mark.parametrize("server", ["moto", "ministack"])
def test_of_promoters_at_once_exactly_one_wins_each_round_on_s3(
    request: pytest.FixtureRequest, s3_environment: None, server: str
) -> None:
    with pointing_at(request.getfixturevalue(f"{server}_endpoint")):
        assert race(f"s3://{BUCKET}/race-{server}", 4, 4)["conflicts_told"] == 12


@pytest.mark.parametrize("server", ["moto", "ministack"])
def test_publishing_through_a_bad_network_ends_complete_or_absent(
    request: pytest.FixtureRequest, s3_environment: None, server: str, tmp_path: Path
) -> None:
    endpoint = request.getfixturevalue(f"{server}_endpoint")
    report = publish_under_faults(endpoint, tmp_path, num_faults=25, seed=8)
    assert report["faults"] >= 25
    assert report["published"] + report.get("gave_up", 0) == report["publishes"]


def test_promoters_publishers_and_cleaners_at_once_lose_nothing(tmp_path: Path) -> None:
    report = mix(str(tmp_path / "store"), 3, 6, seed=18)
    assert report["publish done"] > 0
    assert report["processes"] == 7


def test_processes_that_fetch_into_one_cache_all_get_the_release(tmp_path: Path) -> None:
    assert fetch_at_once(str(tmp_path / "store"), tmp_path / "work", num_processes=4, num_rounds=3)["failed"] == 0


@pytest.mark.slow
def test_a_publisher_or_promoter_that_is_killed_at_any_step_leaves_nothing_half(tmp_path: Path) -> None:
    # In a process of its own: its forks must not inherit what other tests have started in this one.
    command = [sys.executable, "-m", "tests.registry.soak", "--only", "kills", "--on", "file"]
    subprocess.run([*command, "--out", str(tmp_path / "soak.json")], check=True)
    steps = json.loads((tmp_path / "soak.json").read_text())["kills"]["file"]
    assert steps["publish_steps"] > 30
    assert steps["promote_steps"] > 30
