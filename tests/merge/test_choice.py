"""Which merged model is shipped: the evidence decides, and all of it is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftline.checkpoint.identity import read_identity
from graftline.data.template import Encoded
from graftline.errors import MergeError
from graftline.merge import choice
from graftline.merge.choice import Into, MergePlan, merge_by_evidence
from graftline.quant.scheme import Scheme
from tests.merge.test_requantize import SEQUENCES, make_adapter

ROWS = [Encoded(tokens, [place >= len(tokens) - 3 for place in range(len(tokens))]) for tokens in SEQUENCES]
"""The last three tokens of a row are its answer."""


@pytest.fixture(scope="module")
def adapter(nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(nf4, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merge" / "model"


def plan(original: Path | None = None, into: Into = "dequantized", scheme: Scheme | None = None) -> MergePlan:
    return MergePlan(dtype=torch.float32, into=into, original=original, requantize=scheme)


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
        with pytest.raises(MergeError, match=r"original: ΔNLL of the answers may be .*set package\.dtype"):
            merge_by_evidence(nf4, adapter, out, plan=wanted, rows=ROWS)
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
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(scheme=Scheme("nf2")), rows=ROWS)
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
    chosen = merge_by_evidence(nf4, adapter, out, plan=plan(scheme=Scheme("nf4")), rows=ROWS)
    assert chosen.requantized is not None
    assert chosen.requantized.shipped
    assert read_identity(out).quantizer is not None
    assert chosen.requantized.loss.noise > 0
    assert chosen.parity == chosen.requantized.parity
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_what_vanished_is_a_share_of_the_adapters_update_whatever_it_was_folded_into(
    tiny_llama: Path, nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "ORIGINAL_MARGIN", 100.0)
    adapter, updates = make_adapter(nf4, tmp_path / "small", size=0.002), []
    for into in ("dequantized", "original"):
        wanted = plan(tiny_llama, into, Scheme("nf4"))
        chosen = merge_by_evidence(nf4, adapter, tmp_path / into, plan=wanted, rows=ROWS)
        assert chosen.requantized is not None
        updates.append(sum(layer.update for layer in chosen.requantized.loss.layers))
    # The rounding of the first quantization is no part of it; it would be most of the sum.
    assert updates[1] == pytest.approx(updates[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_choice_and_its_figures_are_the_cpus(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    wanted = plan(scheme=Scheme("nf4"))
    cpu, cuda = (
        merge_by_evidence(nf4, adapter, tmp_path / name, plan=wanted, rows=ROWS, device=name)
        for name in ("cpu", "cuda")
    )
    assert cpu.candidate.merge.digest == cuda.candidate.merge.digest
    assert cpu.requantized is not None
    assert cuda.requantized is not None
    assert cuda.requantized.loss == cpu.requantized.loss
    assert cuda.requantized.parity.mean_kl == pytest.approx(cpu.requantized.parity.mean_kl, rel=1e-2)
