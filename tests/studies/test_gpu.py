"""The study of GPUs: what goes wrong in a case is written down, and the next case runs."""

import json
import logging
from pathlib import Path

import pytest
import torch

from studies import gpu, gpu_jobs, gpu_targets
from studies.gpu_jobs import Job
from studies.gpu_side import Child
from studies.gpu_targets import Side, interval
from studies.harness import Json, Setting

_TINY = Job(size="tiny", tokens=16, batch=2, steps=2)


def test_a_case_that_graftline_warns_of_says_so(tmp_path: Path) -> None:
    """A training that is to be compiled, and runs uncompiled, only warns."""

    def warned() -> Json:
        for _ in range(2):
            logging.getLogger("graftline.train.compiled").warning("runs %s", "uncompiled")
        return {"x": 1}

    cases = {"warned": warned, "good": lambda: {"x": 2}}
    found = gpu.run_cases("init", Setting(work=tmp_path, quick=True), cases)["cases"]
    assert found == {"warned": {"x": 1, "warned": ["runs uncompiled"]}, "good": {"x": 2}}


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
    monkeypatch.setitem(gpu_jobs.SECONDS, "init", 0)
    over = gpu.run_cases("init", Setting(work=tmp_path, quick=True), cases)["cases"]
    assert over["good"] == {"not_done": "the part's 0 seconds were over"}


def test_the_graph_is_served_beside_transformers_and_its_caches_hold_under_stress(tmp_path: Path) -> None:
    found = gpu.serve(Setting(work=tmp_path, quick=True))["cases"]
    for name in ("decode, batch 1", "decode, batch 8", "prefill, 64 tokens"):
        assert found[name].keys() == {
            "unmerged_tokens_per_second",
            "merged_tokens_per_second",
            "transformers_tokens_per_second",
            "over_transformers",
            "unmerged_over_merged_time",
        }, found[name]
    assert found["swap"]["milliseconds"] > 0
    assert found["stress"]["answers"] >= 3
    assert found["stress"]["differing"] == 0
    assert found["stress"]["largest_logit_gap"] < 1e-3
    assert "vllm" in found["vLLM, batch 1"].get("not_done", "vllm")


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.1] * 5, (1.1, 1.1, 1.1)),
        ([1.0, 1.21], (1.1, 1.1 / 1.1**6.314, 1.1 * 1.1**6.314)),
        ([2.0], (2.0, 0.0, float("inf"))),
    ],
)
def test_the_interval_of_ratios_is_students_of_their_logarithms(
    ratios: list[float], expected: tuple[float, ...]
) -> None:
    assert interval(ratios) == pytest.approx(expected, rel=1e-3)


def _compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ours: list[float]) -> Json:
    def filled(sides: object, setting: object, found: dict[str, list[float]]) -> dict[str, float]:
        found |= {"ours": ours, "other": [10.0, 11.0, 9.0, 10.0, 10.0]}
        return {"ours": 5.0, "other": 6.0}

    monkeypatch.setattr(gpu_targets, "take_turns", filled)
    monkeypatch.setattr(gpu_targets, "device_kind", lambda: "cuda")
    sides = {"ours": Side("ours", _TINY), "other": Side("peft", _TINY)}
    bounds = {"speed": ("ours", "other", 1.05, True), "step": ("other", "ours", 1.15, False)}
    rows: Json = gpu_targets._compare(Setting(work=tmp_path, quick=True), sides, bounds)["rows"]
    return rows


def test_a_target_is_met_by_the_worse_end_of_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _compared(monkeypatch, tmp_path, [11.0, 12.1, 9.9, 11.0, 11.0])
    assert rows["speed"]["measured"]["ratio"] == 1.1
    assert rows["speed"]["measured"]["turns"] == 5
    assert (rows["speed"]["passed"], rows["speed"]["limit"]) == (True, "≥ 1.05")
    assert rows["step"]["passed"]
    noisy = _compared(monkeypatch, tmp_path, [13.0, 9.0, 9.0, 13.0, 12.0])
    assert noisy["speed"]["measured"]["ratio"] > 1.05
    assert not noisy["speed"]["passed"]


def test_a_peer_that_is_not_installed_leaves_its_row(tmp_path: Path) -> None:
    sides = {"ours": Side("ours", _TINY), "other": Side("Unsloth", _TINY)}
    setting = Setting(work=tmp_path, quick=True)
    (row,) = gpu_targets._compare(setting, sides, {"speed": ("ours", "other", 1.05, True)})["rows"].values()
    assert (row["measured"], row["limit"]) == (None, "≥ 1.05")
    assert row["passed"] == "not run here: RuntimeError: other: ModuleNotFoundError: No module named 'unsloth'"


def test_memory_that_does_not_suffice_misses_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large() -> tuple[object, bool]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu_targets, "device_kind", lambda: "cuda")
    row = gpu_targets._fitting("≤ 16 GB", too_large)
    assert row == {"measured": "out of memory", "limit": "≤ 16 GB", "passed": False}


@pytest.mark.slow
def test_a_side_in_a_process_of_its_own_keeps_its_model_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    with Child("ours", tmp_path) as child:
        first, second = child.train(_TINY), child.train(_TINY)
        assert second["losses"] != first["losses"], "the adapter is the one that was trained before"
    with Child("Unsloth", tmp_path) as child:
        assert "unsloth" in child.train(_TINY)["not_done"]


def test_the_parts_of_a_first_look_take_at_most_eight_minutes_of_a_card() -> None:
    first = list(gpu.PARTS)[: list(gpu.PARTS).index("large")]
    assert first == ["parity", "resume", "speed", "memory", "profile", "init", "serve"]
    assert sum(gpu_jobs.SECONDS[part] for part in first) <= 480
