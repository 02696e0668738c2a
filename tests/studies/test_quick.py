"""Every study runs: all parts of each at its quick size, for real, and what is written has the shape of a result."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studies import harness

LONG = {"gpu", "pull_requests", "gates", "memory", "serving", "faults", "requantizing", "warm_start", "classify"}
LONG |= {"side_by_side", "soak", "rows", "merging", "scale", "training"}
"""Studies whose quick size takes over 5 s: `make test-all` runs them."""
STUDIES = [name for name in harness.names() if name != harness.SURVEY]


TAKES_MINUTES = {"sweeps"}
"""Starts a line's programs again and again, each of which imports torch; what it measures has tests of its own."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long] if name in LONG else [])
        for name in STUDIES
        if name not in TAKES_MINUTES
    ],
)
def test_a_study_runs_at_its_quick_size(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    assert harness.main([name, "--quick", "--work", str(tmp_path / "work"), "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    _, parts = harness.load(name)
    assert set(found) == set(parts)
    for part, result in found.items():
        about = result["measured"]
        assert about["command"] == f"python -m studies {name} --parts {part} --quick"
        assert about["machine"]["cores"] >= 1
        assert len(result) > 1, f"{part} found nothing"
    for ratio in ratios(found):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert ratio["rounds"] >= 1


def ratios(found: Any) -> Iterator[dict[str, float]]:
    """Every ratio in a result, wherever it stands."""
    if isinstance(found, dict):
        if found.keys() == {"median", "low", "high", "rounds"}:
            yield found
        for value in found.values():
            yield from ratios(value)
    elif isinstance(found, list):
        for value in found:
            yield from ratios(value)


@pytest.mark.parametrize("name", STUDIES)
def test_the_parts_whose_results_are_kept_can_be_measured_again_or_are_said_to_be_gone(name: str) -> None:
    results = harness.RESULTS / f"{name}.json"
    kept = set(json.loads(results.read_text(encoding="utf-8"))) if results.is_file() else set()
    page = (harness.RESULTS.parents[1] / "docs" / "decisions" / "0070-studies.md").read_text(encoding="utf-8")
    _, parts = harness.load(name)
    gone = {part for part in kept - parts.keys() if f"`{part}` of {name}.json" not in page}
    assert not gone, f"{results.name} holds {sorted(gone)}, which no study measures and the decision does not name"
