from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftline.adapters.attach import attach
from graftline.plan.memory import Workload, plan_memory
from graftline.plan.trace import StepShape, block_linears
from graftline.settings.model import Adapter
from graftline.train.devices import measured_parts
from graftline.train.trainer import train
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear, load_model
from graftline.weights.quant.scheme import Scheme
from tests.sections import train_section
from tests.train.rows import make_rows

_WORK = Workload(
    adapter=Adapter(method="lora", rank=4),
    shape=StepShape(rows=4, tokens=24, supervised_tokens=8),
    quantization=None,
    optimizer="adamw",
    device="cpu",
)


@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_held_is_measured_as_it_was_planned(tiny_llama: Path, tmp_path: Path, quantized: bool) -> None:
    model = load_model(tiny_llama)
    if quantized:
        for name, layer in block_linears(model).items():
            model.set_submodule(name, QuantLinear(quantize(layer.weight.detach(), Scheme("nf4", 64, True))))
    attach(model, _WORK.adapter, seed=0)
    settings = train_section(steps=1, batch_size=4, checkpoint_every=0, device="cpu")
    result = train(model, make_rows(8), settings=settings, work=tmp_path)
    parts = measured_parts(model, optimizer_bytes=result.optimizer_bytes, peak_bytes=10**9)
    assert sum(parts.values()) == 10**9
    planned = plan_memory(model.config, replace(_WORK, quantization=Scheme("nf4", 64, True) if quantized else None))
    for part in planned.parts[:4]:
        # Beside the plan: positions' frequencies, an offset a quantized layer, and a step count a trained parameter.
        assert parts[part.name] == pytest.approx(part.low, rel=0.01, abs=400)


def test_a_peak_below_what_is_held_leaves_nothing_for_the_step() -> None:
    assert measured_parts(torch.nn.Linear(2, 2), optimizer_bytes=0, peak_bytes=1)["step"] == 0
