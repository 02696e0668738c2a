"""Which merged model is shipped: the evidence decides, and all of it is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graftline.adapters.peft_format import AdapterWeights
from graftline.data.template import Encoded
from graftline.merge import choice
from graftline.merge import parity as parity_module
from graftline.merge.choice import MergeOutcome, MergePlan, NotMerged
from graftline.merge.parity import ParityLimits, ParityReport
from graftline.settings.model import MergeInto, Quantize
from graftline.weights.identity import read_identity
from tests.merge.test_fold import lora, peft_adapter
from tests.merge.test_requantize import SEQUENCES, make_adapter
from tests.sections import quantize_section

BY_DIGITS = (torch.bfloat16, torch.float16, torch.float32)

ROWS = [Encoded(tokens, [place >= len(tokens) - 3 for place in range(len(tokens))]) for tokens in SEQUENCES]
"""The last three tokens of a row are its answer."""


@pytest.fixture(scope="module")
def adapter(nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(nf4, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merge" / "model"


def merge_by_evidence(*arguments: Any, **options: Any) -> Any:
    """The library's; what it returns is looked at by each test."""
    return choice.merge_by_evidence(*arguments, **options)


def plan(original: Path | None = None, into: MergeInto = "dequantized", again: Quantize | None = None) -> MergePlan:
    return MergePlan(dtype=torch.float32, into=into, original=original, requantize=again)


def test_the_dequantized_base_is_the_model_that_was_judged(nf4: Path, adapter: Path, out: Path) -> None:
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(), rows=ROWS)
    assert (chosen.name, chosen.reason, list(chosen.candidates)) == ("dequantized", "asked for", ["dequantized"])
    assert read_identity(out).digest == chosen.candidate.merge.digest
    assert chosen.candidate.parity.passed
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(("margin", "name"), [(100.0, "original"), (-100.0, None)])
def test_the_original_is_taken_only_if_it_is_shown_not_worse(
    margin: float,
    name: str | None,
    tiny_llama: Path,
    nf4: Path,
    adapter: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "ORIGINAL_MARGIN", margin)
    wanted = plan(tiny_llama, "original")
    if name is None:
        refused = merge_by_evidence(nf4, adapter, out, plan=wanted, rows=ROWS)
        assert isinstance(refused, NotMerged)
        assert "float32: original: ΔNLL of the answers may be " in refused.reason
        assert not list(out.parent.iterdir())
        return
    chosen = merge_by_evidence(nf4, adapter, out, plan=wanted, rows=ROWS)
    assert chosen.candidate.merge.base_digest == read_identity(tiny_llama).digest
    assert read_identity(out).digest == chosen.candidate.merge.digest


def test_of_both_the_original_must_be_shown_better(tiny_llama: Path, nf4: Path, adapter: Path, out: Path) -> None:
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(tiny_llama, "both"), rows=ROWS)
    assert set(chosen.candidates) == {"dequantized", "original"}
    low, high = chosen.candidates["original"].parity.answer_nll_change_interval
    assert chosen.name == ("original" if high < 0 else "dequantized")
    assert low <= chosen.candidates["original"].parity.answer_nll_change <= high
    assert read_identity(out).digest == chosen.candidate.merge.digest
    assert json.loads(json.dumps(chosen.as_json()))["candidates"].keys() == {"dequantized", "original"}


@pytest.mark.parametrize("interval", [(-0.2, -0.1), (-0.1, 0.005), (0.1, 0.2)], ids=["better", "not shown", "worse"])
def test_the_rule_for_both_follows_the_interval(
    interval: tuple[float, float], tiny_llama: Path, nf4: Path, adapter: Path, out: Path
) -> None:
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(tiny_llama, "both"), rows=ROWS)
    found = chosen.candidates["original"]
    # What happens to prompts does not count: they would say the opposite.
    parity = replace(found.parity, answer_nll_change_interval=interval, nll_change_interval=(-9.0, -8.0))
    failures = choice._failures("original", parity)
    candidates = {**chosen.candidates, "original": choice.Candidate(found.merge, parity, failures)}
    name, reason = choice._choose(candidates)
    assert name == ("original" if interval[1] < 0 else "dequantized")
    assert ("shown better" in reason) == (interval[1] <= choice.ORIGINAL_MARGIN)


def test_a_requantized_model_that_answers_otherwise_is_not_shipped(nf4: Path, adapter: Path, out: Path) -> None:
    # A tiny random model: its logits are nearly flat, so the most likely token changes with any rounding.
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(again=quantize_section("nf2")), rows=ROWS)
    again = chosen.requantized
    assert again is not None
    assert not again.shipped
    assert again.parity.failures
    assert read_identity(out).quantizer is None
    assert read_identity(out).digest == chosen.candidate.merge.digest
    assert chosen.as_json()["requantized"]["shipped"] is False


def test_a_requantized_model_within_the_limits_replaces_the_16_bit_one(
    nf4: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = replace(choice.REQUANTIZED_LIMITS, min_argmax_agreement=0.0, max_mean_kl=10.0, max_nll_change=10.0)
    monkeypatch.setattr(choice, "REQUANTIZED_LIMITS", loose)
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(again=quantize_section("nf4")), rows=ROWS)
    assert chosen.requantized is not None
    assert chosen.requantized.shipped
    assert read_identity(out).quantizer is not None
    assert chosen.requantized.loss.noise > 0
    assert chosen.parity == chosen.requantized.parity
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_compensated_rounding_answers_nearer_to_the_judged_model_than_the_nearest_codes(
    nf4: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(nf4, tmp_path / "small", size=0.02)
    rows = [[(5 * at + 3 * row + 4) % 90 + 4 for at in range(30)] for row in range(16)]
    kl = {}
    for name, calibration in (("nearest", None), ("compensated", rows)):
        wanted = replace(plan(again=quantize_section("nf4")), calibration=calibration)
        chosen = merge_by_evidence(nf4, adapter, tmp_path / name, plan=wanted, rows=ROWS)
        assert chosen.requantized is not None
        kl[name] = chosen.requantized.parity.mean_kl
        found = json.loads(json.dumps(chosen.as_json()))["requantized"]
        assert found["rounding"] == name
    assert kl["compensated"] < 0.8 * kl["nearest"]


def test_what_vanished_is_a_share_of_the_adapters_update_whatever_it_was_folded_into(
    tiny_llama: Path, nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "ORIGINAL_MARGIN", 100.0)
    adapter, updates = make_adapter(nf4, tmp_path / "small", size=0.002), []
    for into in ("dequantized", "original"):
        wanted = plan(tiny_llama, into, quantize_section("nf4"))
        chosen = merge_by_evidence(nf4, adapter, tmp_path / into, plan=wanted, rows=ROWS)
        assert chosen.requantized is not None
        updates.append(sum(layer.update for layer in chosen.requantized.loss.layers))
    # The rounding of the first quantization is no part of it; it would be most of the sum.
    assert updates[1] == pytest.approx(updates[0], rel=0.05)


def limit_types(monkeypatch: pytest.MonkeyPatch, allowed: torch.dtype | None) -> None:
    """Limits that only ``allowed`` keeps to, and everything wider; None: no type does."""

    def for_dtype(dtype: torch.dtype) -> ParityLimits:
        fits = allowed is not None and BY_DIGITS.index(dtype) >= BY_DIGITS.index(allowed)
        return ParityLimits(None, 0.0, 1e9, 1e9 if fits else -1e9)

    monkeypatch.setattr(ParityLimits, "for_dtype", for_dtype)


@pytest.mark.parametrize("allowed", [torch.float16, torch.float32])
def test_where_a_number_type_rounds_too_much_the_next_wider_one_ships(
    allowed: torch.dtype, tiny_llama: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    limit_types(monkeypatch, allowed)
    chosen = merge_by_evidence(tiny_llama, adapter, out, plan=MergePlan(torch.bfloat16, "dequantized"), rows=ROWS)
    assert isinstance(chosen, MergeOutcome)
    shipped = str(allowed).removeprefix("torch.")
    assert chosen.candidate.merge.dtype == shipped
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == shipped
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {allowed}
    tried = ["bfloat16", "float16"][: BY_DIGITS.index(allowed)]
    assert [attempt.dtype for attempt in chosen.attempts] == tried
    assert all("ΔNLL of the answers is within" in str(attempt) for attempt in chosen.attempts)
    record = json.loads(json.dumps(chosen.as_json()))
    assert (record["merged"], [attempt["dtype"] for attempt in record["attempts"]]) == (True, tried)
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_a_weight_that_float16_cannot_hold_ships_as_float32(tiny_llama: Path, tmp_path: Path, out: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora(lora_alpha=4e6))
    chosen = merge_by_evidence(
        tiny_llama, tmp_path / "adapter", out, plan=MergePlan(torch.float16, "dequantized"), rows=ROWS
    )
    assert chosen.candidate.merge.dtype == "float32"
    assert "float16 cannot hold" in str(chosen.attempts[0])


@pytest.mark.parametrize("dtype", BY_DIGITS)
def test_a_merge_that_is_wrong_ships_in_no_number_type(
    dtype: torch.dtype, tiny_llama: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is subtracted instead of added: no rounding explains that."""
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    right = AdapterWeights.fold_weight
    monkeypatch.setattr(
        AdapterWeights, "fold_weight", lambda self, module, weight, *at: 2 * weight - right(self, module, weight, *at)
    )
    refused = merge_by_evidence(tiny_llama, adapter, out, plan=MergePlan(dtype, "dequantized"), rows=ROWS)
    assert isinstance(refused, NotMerged)
    assert [attempt.dtype for attempt in refused.attempts][-1] == "float32"
    assert "the release holds the adapter alone" in refused.reason
    assert json.loads(json.dumps(refused.as_json()))["merged"] is False
    assert not list(out.parent.iterdir())


def test_a_weight_damaged_on_its_way_to_the_disk_ships_in_no_number_type(
    tiny_llama: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    right = AdapterWeights.fold_weight

    def damaged(self: AdapterWeights, module: str, weight: torch.Tensor, *at: Any) -> torch.Tensor:
        folded = right(self, module, weight, *at)
        return folded.roll(1, 0) if module.endswith("layers.0.mlp.up_proj") else folded

    monkeypatch.setattr(AdapterWeights, "fold_weight", damaged)
    refused = merge_by_evidence(tiny_llama, adapter, out, plan=MergePlan(torch.float16, "dequantized"), rows=ROWS)
    assert isinstance(refused, NotMerged)


def test_a_refusal_never_advises_what_was_asked_for(
    tiny_llama: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    limit_types(monkeypatch, None)
    refused = merge_by_evidence(tiny_llama, adapter, out, plan=MergePlan(torch.float16, "dequantized"), rows=ROWS)
    assert "set package.dtype" not in refused.reason
    assert [attempt.dtype for attempt in refused.attempts] == ["float16", "float32"]


def test_answers_that_rounding_made_better_ship(
    tiny_llama: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in use: float16 as asked for, ΔNLL within [-0.00251, -0.00198], a limit of 0.0025 either way."""
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    found = merge_by_evidence(tiny_llama, adapter, out, plan=MergePlan(torch.float16, "dequantized"), rows=ROWS)
    parity = found.candidate.parity
    for interval, ships in (((-0.00251, -0.00198), True), ((-0.5, -0.4), True), ((0.4, 0.5), False)):
        report = judged_again(parity, interval)
        assert (choice._failures("dequantized", report) == ()) is ships


def judged_again(report: ParityReport, interval: tuple[float, float]) -> ParityReport:
    """The report with another interval of the answers' ΔNLL, held against float16's limits."""
    figures = {"max_logit_difference": 0.0, "argmax_agreement": 1.0, "mean_kl": 0.0}
    limits = ParityLimits.for_dtype(torch.float16)
    failures = tuple(parity_module._failures(figures, interval, limits))
    return replace(report, answer_nll_change_interval=interval, failures=failures)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_choice_and_its_figures_are_the_cpus(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    wanted = plan(again=quantize_section("nf4"))
    cpu, cuda = (
        merge_by_evidence(nf4, adapter, tmp_path / name, plan=wanted, rows=ROWS, device=name)
        for name in ("cpu", "cuda")
    )
    assert cpu.candidate.merge.digest == cuda.candidate.merge.digest
    assert cpu.requantized is not None
    assert cuda.requantized is not None
    assert cuda.requantized.loss == cpu.requantized.loss
    assert cuda.requantized.parity.mean_kl == pytest.approx(cpu.requantized.parity.mean_kl, rel=1e-2)
