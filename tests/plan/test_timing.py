from dataclasses import replace

import pytest
import torch

from graftline.plan.memory import Workload, continue_to, measure_micro_batch, stand_in_micro_batch
from graftline.plan.trace import StepShape
from graftline.settings.model import Adapter
from graftline.weights.quant.scheme import Scheme
from tests.tiny import tiny_llama_config

_WORK = Workload(
    adapter=Adapter(method="lora", rank=4),
    shape=StepShape(rows=4, tokens=64, supervised_tokens=64),
    quantization=None,
    optimizer="adamw",
    device="cpu",
)


def test_blocks_and_vocabulary_are_continued_linearly() -> None:
    assert continue_to(30, 0.5, 0.7, words=10.0) == pytest.approx(30 * 0.2 + 0.3 * 10)
    assert continue_to(30, 0.5, 0.4, words=10.0) == 5.0  # noise: a block takes no less than nothing
    assert continue_to(30, 0.5, 1.2, words=10.0) == 15.0  # and the rest neither


def test_a_quantized_base_is_timed_as_it_is_trained() -> None:
    quantized = replace(_WORK, quantization=Scheme("nf4", 64, True), shape=replace(_WORK.shape, checkpointing=True))
    seconds = measure_micro_batch(tiny_llama_config(), quantized, limit_bytes=1e9)
    assert seconds is not None
    assert seconds > 0


def test_nothing_is_measured_that_does_not_fit() -> None:
    before = torch.random.get_rng_state()
    assert measure_micro_batch(tiny_llama_config(), _WORK, limit_bytes=1e3) is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_stand_in_is_tried_without_the_base() -> None:
    related = stand_in_micro_batch(tiny_llama_config(), _WORK, limit_bytes=1e9)
    assert related is not None
    assert related > 0


def test_a_stand_in_that_does_not_fit_is_not_tried() -> None:
    assert stand_in_micro_batch(tiny_llama_config(), _WORK, limit_bytes=1e3) is None
