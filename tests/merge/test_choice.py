"""Which merged model is shipped: the evidence decides, and all of it is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftline.checkpoint.identity import read_identity
from graftline.errors import MergeError
from graftline.merge import choice
from graftline.merge.choice import Into, MergePlan, merge_by_evidence
from graftline.quant.scheme import Scheme
from tests.merge.test_requantize import SEQUENCES, make_adapter


@pytest.fixture(scope="module")
def adapter(nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(nf4, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merge" / "model"


def plan(original: Path | None = None, into: Into = "dequantized", scheme: Scheme | None = None) -> MergePlan:
    return MergePlan(dtype=torch.float32, into=into, original=original, requantize=scheme)


def test_the_dequantized_base_is_the_model_that_was_judged(nf4: Path, adapter: Path, out: Path) -> None:
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(), sequences=SEQUENCES)
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
        with pytest.raises(MergeError, match=r"original: ΔNLL may be .*set package\.dtype"):
            merge_by_evidence(nf4, adapter, out, plan=wanted, sequences=SEQUENCES)
        assert not list(out.parent.iterdir())
        return
    chosen = merge_by_evidence(nf4, adapter, out, plan=wanted, sequences=SEQUENCES)
    assert chosen.candidate.merge.base_digest == read_identity(tiny_llama).digest
    assert read_identity(out).digest == chosen.candidate.merge.digest


def test_of_both_the_original_must_be_shown_better(tiny_llama: Path, nf4: Path, adapter: Path, out: Path) -> None:
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(tiny_llama, "both"), sequences=SEQUENCES)
    assert set(chosen.candidates) == {"dequantized", "original"}
    low, high = chosen.candidates["original"].parity.nll_change_interval
    assert chosen.name == ("original" if high < 0 else "dequantized")
    assert low <= chosen.candidates["original"].parity.nll_change <= high
    assert read_identity(out).digest == chosen.candidate.merge.digest
    assert json.loads(json.dumps(chosen.as_json()))["candidates"].keys() == {"dequantized", "original"}


@pytest.mark.parametrize("interval", [(-0.2, -0.1), (-0.1, 0.005), (0.1, 0.2)], ids=["better", "not shown", "worse"])
def test_the_rule_for_both_follows_the_interval(
    interval: tuple[float, float], tiny_llama: Path, nf4: Path, adapter: Path, out: Path
) -> None:
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(tiny_llama, "both"), sequences=SEQUENCES)
    found = chosen.candidates["original"]
    parity = replace(found.parity, nll_change_interval=interval)
    failures = choice._failures("original", parity)
    candidates = {**chosen.candidates, "original": choice.Candidate(found.merge, parity, failures)}
    name, reason = choice._choose(candidates)
    assert name == ("original" if interval[1] < 0 else "dequantized")
    assert ("shown better" in reason) == (interval[1] <= choice.ORIGINAL_MARGIN)


def test_a_requantized_model_that_answers_otherwise_is_not_shipped(nf4: Path, adapter: Path, out: Path) -> None:
    # A tiny random model: its logits are nearly flat, so the most likely token changes with any rounding.
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(scheme=Scheme("nf2")), sequences=SEQUENCES)
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
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(scheme=Scheme("nf4")), sequences=SEQUENCES)
    assert chosen.requantized is not None
    assert chosen.requantized.shipped
    assert read_identity(out).quantizer is not None
    assert chosen.requantized.loss.noise > 0
    assert chosen.parity == chosen.requantized.parity
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_choice_and_its_figures_are_the_cpus(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    wanted = plan(scheme=Scheme("nf4"))
    cpu, cuda = (
        merge_by_evidence(nf4, adapter, tmp_path / name, plan=wanted, sequences=SEQUENCES, device=name)
        for name in ("cpu", "cuda")
    )
    assert cpu.candidate.merge.digest == cuda.candidate.merge.digest
    assert cpu.requantized is not None
    assert cuda.requantized is not None
    assert cuda.requantized.loss == cpu.requantized.loss
    assert cuda.requantized.parity.mean_kl == pytest.approx(cpu.requantized.parity.mean_kl, rel=1e-2)
