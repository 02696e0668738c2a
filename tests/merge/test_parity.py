"""Merged against unmerged: what passes, what fails, and that the figures are what their formulas say."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from transformers import LlamaForCausalLM

from graftline.errors import MergeError
from graftline.merge.parity import ParityLimits, compare_with_recorded, record
from tests.merge.conftest import compare

ROUNDING = Path(__file__).resolve().parents[2] / "studies" / "results" / "merging.json"
SEQUENCES = [[5, 6, 7, 8, 9, 10], [11, 12], [13], list(range(20, 60))]
FP32 = ParityLimits.for_dtype(torch.float32)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama)


def disturbed(model: LlamaForCausalLM, size: float) -> LlamaForCausalLM:
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.model.layers[0].mlp.up_proj.weight
        weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return other


def test_a_model_equals_itself_exactly(model: LlamaForCausalLM) -> None:
    report = compare(model, model, SEQUENCES, limits=FP32)
    assert report.passed
    assert report.max_logit_difference == 0
    assert report.mean_kl == 0
    assert report.nll_change_interval == (0, 0)
    assert report.argmax_agreement == 1
    assert (report.num_sequences, report.num_tokens) == (4, 49)


def test_figures_are_what_scipy_computes(model: LlamaForCausalLM) -> None:
    other = disturbed(model, 0.3)
    report = compare(model, other, SEQUENCES, limits=FP32)
    max_difference, kls, agree, changes = 0.0, [], [], []
    for tokens in SEQUENCES:
        with torch.no_grad():
            p = model(torch.tensor([tokens])).logits[0].double().numpy()
            q = other(torch.tensor([tokens])).logits[0].double().numpy()
        max_difference = max(max_difference, np.abs(p - q).max())
        kls += list(scipy.special.rel_entr(scipy.special.softmax(p, -1), scipy.special.softmax(q, -1)).sum(-1))
        agree += list(p.argmax(-1) == q.argmax(-1))
        gain = scipy.special.log_softmax(p, -1) - scipy.special.log_softmax(q, -1)
        if len(tokens) > 1:
            changes.append(np.mean([gain[t, tokens[t + 1]] for t in range(len(tokens) - 1)]))
    assert report.max_logit_difference == pytest.approx(max_difference, rel=1e-4)
    assert report.mean_kl == pytest.approx(np.mean(kls), rel=1e-4)
    assert report.argmax_agreement == np.mean(agree)
    assert report.nll_change == pytest.approx(np.mean(changes), rel=1e-3)
    low, high = report.nll_change_interval
    assert low <= report.nll_change <= high


def test_the_change_over_answers_is_that_of_the_marked_tokens_alone(model: LlamaForCausalLM) -> None:
    other = disturbed(model, 0.3)
    tokens, recorded = [5, 6, 7, 8, 9, 10], record(model, [[5, 6, 7, 8, 9, 10], [11, 12]])
    marks = [[False, False, False, False, True, True], [False, False]]
    report = compare_with_recorded(recorded, other, [tokens, [11, 12]], limits=FP32, answers=marks)
    with torch.no_grad():
        p_TV, q_TV = (which(torch.tensor([tokens])).logits[0].numpy() for which in (model, other))
    gain = scipy.special.log_softmax(p_TV, -1) - scipy.special.log_softmax(q_TV, -1)
    expected = np.mean([gain[3, 9], gain[4, 10]])
    assert report.answer_nll_change == pytest.approx(expected, rel=1e-3)
    assert report.nll_change != report.answer_nll_change
    assert compare(model, other, [tokens], limits=FP32).answer_nll_change == pytest.approx(
        compare(model, other, [tokens], limits=FP32).nll_change
    )
    with pytest.raises(MergeError, match="no token of the sequences is marked"):
        compare_with_recorded(recorded, other, [tokens, [11, 12]], limits=FP32, answers=[[False] * 6, [False] * 2])


def test_another_model_fails_and_each_reason_is_named(model: LlamaForCausalLM) -> None:
    other = disturbed(model, 1.0)
    # A random model may become better by chance, and better is no reason to stop.
    worse = dataclasses.replace(FP32, max_nll_change=-10.0)
    report = compare(model, other, SEQUENCES, limits=worse)
    assert not report.passed
    assert [failure.split(" is ")[0] for failure in report.failures] == [
        "max |Δlogit|",
        "argmax agreement",
        "mean KL",
        "ΔNLL of the answers",
    ]


def test_a_model_that_gives_nan_fails(model: LlamaForCausalLM) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    report = compare(model, broken, SEQUENCES, limits=FP32)
    assert len(report.failures) >= 3


def test_dropout_is_off_in_the_comparison(tiny_llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama, attention_dropout=0.5).train()
    assert compare(model, model, SEQUENCES, limits=FP32).max_logit_difference == 0


def test_recorded_logits_of_other_sequences_are_refused(model: LlamaForCausalLM) -> None:
    recorded = record(model, SEQUENCES)
    with pytest.raises(MergeError, match="other sequences"):
        compare_with_recorded(recorded, model, SEQUENCES[:2], limits=FP32, answers=[[True] * 6, [True] * 2])


def test_sequences_without_a_next_token_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(MergeError, match="two tokens"):
        record(model, [[1], []])


def test_the_report_is_json(model: LlamaForCausalLM) -> None:
    value = compare(model, model, SEQUENCES, limits=FP32).as_json()
    assert value["passed"] is True
    assert value["limits"] == dataclasses.asdict(FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_limits_follow_from_the_recorded_rounding(dtype: torch.dtype) -> None:
    """Three times the largest recorded figure at least, and not so wide that a damaged weight would hide in them."""
    recorded = json.loads(ROUNDING.read_text(encoding="utf-8"))["rounding"]
    cells = [cell for cell in recorded["cells"] if cell["merged_as"] == str(dtype).removeprefix("torch.")]
    assert len({cell["task"] for cell in cells if cell["task"].startswith("seed ")}) == 10
    largest, limits = recorded["largest"][str(dtype).removeprefix("torch.")], ParityLimits.for_dtype(dtype)
    assert limits.max_logit_difference is not None
    assert 3 * largest["max_logit_difference"] <= limits.max_logit_difference <= 2.0
    assert 3 * largest["argmax_disagreement"] <= 1 - limits.min_argmax_agreement <= 0.05
    assert 3 * largest["mean_kl"] <= limits.max_mean_kl <= 1e-3
    assert 3 * largest["answer_nll_rise"] <= limits.max_nll_change <= 0.01
