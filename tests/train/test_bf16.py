"""Every method over every base in bf16, against the same in fp32: bounds that a lost scale or dropout would break."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.settings.model import Adapter, MethodName
from graftline.train.batches import pad_rows
from graftline.train.devices import needs_autocast
from graftline.train.loss import SupervisedLoss
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.scheme import FP8, Scheme
from tests.tiny import tiny_llama_config
from tests.train.rows import make_rows

_METHODS: tuple[MethodName, ...] = ("lora", "rslora", "dora", "vera", "houlsby", "pfeiffer")
_BASES = (None, "nf4", "nf3", "nf2", "fp8")
_DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def _model(method: MethodName, bits: str | None, dtype: torch.dtype, *, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config())
    for name, layer in list(model.named_modules()):
        if bits and isinstance(layer, nn.Linear) and name != "lm_head":
            scheme = FP8 if bits == "fp8" else Scheme(bits, 64, True)
            model.set_submodule(name, QuantLinear(quantize(layer.weight.detach(), scheme)))
    model.to(dtype).requires_grad_(False)
    alpha: dict[str, Any] = {"alpha": 12.0} if method in ("lora", "rslora", "dora") else {}
    attach(model, Adapter(method=method, rank=4, dropout=dropout, **alpha), seed=0)
    chooser = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=chooser)
    return model.train()


def _step(model: PreTrainedModel, device: str) -> tuple[float, dict[str, Tensor]]:
    batch: Any = {name: value.to(device) for name, value in pad_rows(make_rows(6)).items()}  # type: ignore[attr-defined]
    loss = SupervisedLoss(model)(batch, num_supervised=torch.tensor(10.0, device=device))
    loss.backward()
    return float(loss), {name: p.grad.cpu() for name, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("bits", _BASES)
@pytest.mark.parametrize("method", _METHODS)
def test_loss_and_gradients_in_bf16_are_those_of_fp32(method: MethodName, bits: str | None, device: str) -> None:
    exact_loss, exact = _step(_model(method, bits, torch.float32), "cpu")
    model = _model(method, bits, torch.bfloat16).to(device)  # type: ignore[arg-type]
    assert not needs_autocast(model, torch.bfloat16)
    loss, gradients = _step(model, device)
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        # A lost scale (3 here) or a lost term is far outside of this; rounding to 8 bits is well inside. A ReLU that is
        # shut for every token leaves zeros.
        assert float((gradient - exact[name]).norm()) <= 0.12 * float(exact[name].norm()), name


@pytest.mark.parametrize("method", _METHODS)
def test_dropout_acts_in_bf16(method: MethodName) -> None:
    model, batch = _model(method, None, torch.bfloat16, dropout=0.5), pad_rows(make_rows(6))
    loss = SupervisedLoss(model)
    first, second = (float(loss(batch, num_supervised=torch.tensor(10.0)).detach()) for _ in range(2))
    assert first != second
    model.eval()
    first, second = (float(loss(batch, num_supervised=torch.tensor(10.0)).detach()) for _ in range(2))
    assert first == second


def test_autocast_stays_where_weights_are_held_in_another_type() -> None:
    held = _model("lora", None, torch.float32)
    assert needs_autocast(held, torch.bfloat16)
    assert not needs_autocast(held, torch.float32)
    assert needs_autocast(_model("lora", None, torch.float16), torch.float16)
