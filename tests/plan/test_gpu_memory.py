"""The planner against peaks measured on a GPU, and its choice of micro-batches.

Peaks: torch.cuda.max_memory_allocated on one H200, random weights of true shapes, rank 16 on all linear layers, bf16.
The step was then another one (an fp32 copy of each layer's input, 64 MiB of logits at a time): it is put back here, so
that the planner is held against what was measured. Today's step was measured on another H200
(studies/results/gpu.json).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graftline.adapters.lora import LoraLayer
from graftline.plan import trace
from graftline.plan.memory import Workload, plan_memory
from graftline.plan.micro_batches import MicroBatchChoice, best_of, ways_to_cut
from graftline.plan.trace import StepShape
from graftline.settings.model import Adapter
from graftline.weights.quant.scheme import Scheme
from studies.gpu_jobs import config_of
from tests.tiny import tiny_llama_config

_NF4 = Scheme("nf4", 64, True)
_MEASURED_GB = [
    ("8B", _NF4, 4, 2048, {}, 11.2),
    ("8B", None, 4, 2048, {}, 21.6),
    ("8B", _NF4, 2, 2048, {"checkpointing": False}, 35.4),
    ("8B", _NF4, 16, 2048, {}, 25.8),
    ("70B", _NF4, 1, 512, {"optimizer": "paged_adamw_8bit"}, 42.1),
    ("13B", _NF4, 1, 2048, {}, 9.7),
    ("13B", None, 1, 2048, {}, 28.6),
    ("8B", None, 4, 2048, {"method": "dora"}, 22.1),
]
_MEASURED_SINCE_GB = [
    (_NF4, {}, 10.472),
    (_NF4, {"offloaded": True}, 8.616),
    (None, {}, 20.83),
    (None, {"method": "dora"}, 21.49),
]


def _workload(scheme: Scheme | None, rows: int, tokens: int, more: dict[str, Any]) -> Workload:
    shape = StepShape(
        rows=rows,
        tokens=tokens,
        supervised_tokens=rows * (tokens - 1),
        checkpointing=more.get("checkpointing", True),
        dtype=torch.bfloat16,
        device="cuda",
        offloaded=more.get("offloaded", False),
    )
    optimizer = more.get("optimizer", "adamw")
    adapter = Adapter(method=more.get("method", "lora"), rank=16, alpha=32)
    return Workload(adapter=adapter, shape=shape, quantization=scheme, optimizer=optimizer, device="cuda")


def _as_it_was(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    y = layer.base(x)
    return (y + layer.plan.scale * F.linear(F.linear(x.to(layer.A.dtype), layer.A), layer.B)).to(y.dtype)


def _allocated_gb(size: str, workload: Workload) -> float:
    parts = plan_memory(config_of(size), workload).parts
    return sum(part.low for part in parts if part.name != "CUDA context") / 1e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "scheme", "rows", "tokens", "more", "measured"),
    _MEASURED_GB,
)
def test_the_planned_peak_is_within_a_tenth_of_the_measured_one(
    size: str,
    scheme: Scheme | None,
    rows: int,
    tokens: int,
    more: dict[str, Any],
    measured: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload = _workload(scheme, rows, tokens, more)
    real = trace.chunk_of
    monkeypatch.setattr(LoraLayer, "forward", _as_it_was)
    monkeypatch.setattr(trace, "needs_autocast", lambda *_: True)
    monkeypatch.setattr(trace, "chunk_of", lambda head, _: real(head, "cpu"))
    assert _allocated_gb(size, workload) == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "more", "measured"), _MEASURED_SINCE_GB)
def test_todays_peak_is_planned_within_a_tenth(scheme: Scheme | None, more: dict[str, Any], measured: float) -> None:
    assert _allocated_gb("8B", _workload(scheme, 4, 2048, more)) == pytest.approx(measured, rel=0.1)


def _choice(size: int, tokens: int, *, fits: bool = True) -> MicroBatchChoice:
    return MicroBatchChoice(size, 16 // size, tokens, 1e9 * size, 0.0, fits)


def test_the_best_micro_batch_has_enough_tokens_and_no_more() -> None:
    sizes = [_choice(1, 2048), _choice(4, 8192), _choice(8, 16384), _choice(16, 32768, fits=False)]
    assert best_of(sizes) == sizes[1]
    assert best_of([sizes[0], _choice(4, 8192, fits=False)]) == sizes[0]
    assert best_of([_choice(1, 100), _choice(2, 200), _choice(4, 400, fits=False)]) == _choice(2, 200)
    assert best_of([_choice(1, 2048, fits=False)]) is None


@pytest.mark.parametrize("packed", [False, True])
def test_every_way_to_cut_a_step_says_its_memory_and_cost(packed: bool) -> None:
    shape = StepShape(
        rows=1 if packed else 4, tokens=256 if packed else 64, supervised_tokens=32, micro_batches=2, packed=packed
    )
    shape = replace(shape, dtype=torch.bfloat16, device="cuda", checkpointing=True)
    adapter = Adapter(method="lora", rank=4, alpha=8)
    work = Workload(adapter=adapter, shape=shape, quantization=_NF4, optimizer="adamw", device="cuda", batch_size=4)
    whole = plan_memory(tiny_llama_config(), work).total.expected
    ways = ways_to_cut(tiny_llama_config(), work, limit_bytes=whole * 1.0001)
    assert [(way.batch_size, way.gradient_accumulation, way.tokens) for way in ways] == [
        (1, 8, 64),
        (2, 4, 128),
        (4, 2, 256),
        (8, 1, 512),
    ]
    assert [way.expected_bytes for way in ways] == sorted(way.expected_bytes for way in ways)
    assert ways[2].expected_bytes == pytest.approx(whole, rel=0.02)
    assert not ways[3].fits
    assert ways[0].dequantizing == pytest.approx(8 * ways[3].dequantizing)
    assert "train.batch_size: 2, train.gradient_accumulation: 4: 128 tokens" in ways[1].text()
    assert "dequantization" in ways[1].text()


def test_a_step_of_8192_tokens_dequantizes_for_a_few_percent_of_its_time() -> None:
    (only,) = ways_to_cut(tiny_llama_config(), _workload(_NF4, 1, 8192, {}), limit_bytes=1e12)
    assert 0.02 < only.dequantizing < 0.05
