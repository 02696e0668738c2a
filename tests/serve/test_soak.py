"""A short run of what ``make soak`` does at full size (studies/soak.py)."""

from pathlib import Path

import pytest

from studies.soak import run_soak


@pytest.mark.long
@pytest.mark.slow
def test_under_load_and_swaps_nothing_fails_or_mixes_and_memory_is_flat(tmp_path: Path) -> None:
    report = run_soak(tmp_path, 1200, 30, swap_every=20, num_clients=16)
    assert report["requests"] >= 1200
    assert report["swaps"] >= 60
    assert report["failed"] == 0, report["first_failure"]
    assert report["mixed"] == 0
    assert report["abandoned_by_client"] > 0
    assert report["read_slowly"] > 0
    assert report["nonsense_refused"] > 0
    assert report["kv_bytes_after"] == 0
    assert report["memory_mb"]["flat"], report["memory_mb"]
