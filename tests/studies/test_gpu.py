"""The study of GPUs: what goes wrong in a case is written down, and the next case runs."""

import json
from pathlib import Path

import pytest
import torch

from studies import gpu
from studies.harness import Json, Setting


def test_an_error_is_a_result_and_time_that_is_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large() -> Json:
        raise torch.OutOfMemoryError("no memory")

    def broken() -> Json:
        raise ModuleNotFoundError("No module named 'peer'")

    cases = {"too large": too_large, "broken": broken, "good": lambda: {"x": 1}}
    found = gpu.run_cases("init", Setting(work=tmp_path, quick=True), cases)["cases"]
    assert found == {
        "too large": {"not_done": "out of memory"},
        "broken": {"not_done": "ModuleNotFoundError: No module named 'peer'"},
        "good": {"x": 1},
    }
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["case"] for line in lines] == list(cases)
    monkeypatch.setitem(gpu._SECONDS, "init", 0)
    over = gpu.run_cases("init", Setting(work=tmp_path, quick=True), cases)["cases"]
    assert over["good"] == {"not_done": "the part's 0 seconds were over"}


def test_the_graph_is_served(tmp_path: Path) -> None:
    (served,) = gpu.serve(Setting(work=tmp_path, quick=True))["cases"].values()
    assert served.keys() == {"steps_per_second"}
