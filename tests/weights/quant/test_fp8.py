"""A base in FP8: its rounding, its files, its products with a rounded x, and an adapter trained on it and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.errors import CheckpointError, QuantizeError, TrainError
from graftline.merge.choice import merge_by_evidence
from graftline.settings.model import Adapter
from graftline.train.batches import pad_rows
from graftline.train.loss import SupervisedLoss
from graftline.train.trainer import train
from graftline.weights.quant import linear
from graftline.weights.quant.blockwise import PIECE, dequantize, dequantized_pieces, quantize
from graftline.weights.quant.folder import DequantizingReader, quantize_folder
from graftline.weights.quant.kernels import dequantize_compiled, dequantize_here, fp8_linear
from graftline.weights.quant.linear import QuantLinear, load_model, use_fp8_products
from graftline.weights.quant.report import measure
from graftline.weights.quant.scheme import FP8, Scheme
from graftline.weights.quant.tensors import from_tensors, state_key, to_tensors
from tests.merge.test_choice import ROWS, plan
from tests.merge.test_requantize import make_adapter
from tests.sections import quantize_section, train_section
from tests.train.rows import make_rows

scaled_products = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="an older torch multiplies FP8 with a scale a row on GPUs only"
)


def _weight(rows: int = 24, columns: int = 40, *, seed: int = 0) -> Tensor:
    scales = torch.logspace(-3, 3, rows).unsqueeze(1)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scales


def _layer(rows: int = 32, columns: int = 48) -> QuantLinear:
    return QuantLinear(quantize(_weight(rows, columns), FP8))


@pytest.fixture
def fp8(tiny_llama: Path, tmp_path: Path) -> Path:
    quantize_folder(tiny_llama, tmp_path / "fp8", quantize=quantize_section("fp8"))
    return tmp_path / "fp8"


def _model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model = load_model(folder, dtype=dtype).requires_grad_(False)
    attach(model, Adapter(method="lora", rank=4, alpha=12.0), seed=0)
    chooser = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=chooser)
    return model.train()


def test_every_weight_is_the_nearest_value_of_e4m3_times_its_rows_scale() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = every_byte[every_byte.isfinite()].unique()
    w = _weight()
    scale = w.abs().amax(dim=1, keepdim=True) / 448
    distance = ((w / scale).unsqueeze(-1) - values).abs().amin(dim=-1) * scale
    excess = (dequantize(quantize(w, FP8)) - w).abs() - distance
    assert torch.all(excess.abs() <= 1e-4 * scale), "but for the rounding of fp32"


@pytest.mark.parametrize("shape", [(3, 5), (600, 700), (2, PIECE + 3)])
def test_pieces_rows_and_kernels_give_the_same_weight(shape: tuple[int, int]) -> None:
    quantized = quantize(_weight(*shape), FP8)
    whole = dequantize(quantized)
    assert whole.shape == shape
    assert torch.equal(torch.cat(list(dequantized_pieces(quantized))), whole.view(-1))
    assert torch.equal(dequantize_here(quantized, torch.float32), whole)
    for backward in (False, True):
        compiled = dequantize_compiled(quantized, torch.bfloat16, backward=backward)
        assert torch.equal(compiled, whole.bfloat16())


def test_a_row_of_zeros_and_rows_of_any_size_stay_finite() -> None:
    w = torch.tensor([[0.0, 0.0], [3e38, -1e38], [1e-36, 1e-37], [1e-45, 0.0]])
    back = dequantize(quantize(w, FP8))
    assert back.isfinite().all()
    assert torch.equal(back[0], w[0])
    assert torch.allclose(back[1], w[1], rtol=0.07)
    transposed = quantize(w.T.contiguous().T, FP8)
    assert torch.equal(transposed.packed, quantize(w, FP8).packed)


def test_it_loses_a_quarter_of_what_four_bits_lose() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    fp8, nf4 = (measure(w, quantize(w, scheme)) for scheme in (FP8, Scheme("nf4", 64, True)))
    assert 0.02 < fp8.error < 0.03
    assert fp8.error < 0.3 * nf4.error


@pytest.mark.parametrize(("block_size", "double"), [(64, False), (0, True)])
def test_another_scale_than_one_a_row_is_refused(block_size: int, double: bool) -> None:
    with pytest.raises(QuantizeError, match="expected one scale a row"):
        Scheme("fp8", block_size, double)


def test_a_stored_nan_is_refused() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = to_tensors(name, quantize(_weight(), FP8), source_dtype=torch.bfloat16)
    tensors[name][7] = 0xFF
    with pytest.raises(CheckpointError, match="holds NaN"):
        from_tensors(name, state_key(name, "fp8"), tensors.__getitem__)


@scaled_products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_with_x_in_fp8_is_near_that_with_x_as_it_is(dtype: torch.dtype) -> None:
    chooser = torch.Generator().manual_seed(0)
    layer = QuantLinear(quantize(torch.randn(32, 48, generator=chooser), FP8))
    x = (torch.randn(2, 5, 48, generator=chooser) * torch.logspace(-4, 4, 5).unsqueeze(-1)).to(dtype)
    x[0, 0] = 0
    exact, found = layer(x).float(), fp8_linear(x, layer.quantized)
    assert found.dtype == dtype
    rows = exact.norm(dim=-1)
    # Each token by itself: a scale that is lost or taken from another row is orders of magnitude off.
    assert torch.all((found.float() - exact).norm(dim=-1) <= 0.06 * rows)
    assert torch.all(found[0, 0] == 0)


@scaled_products
def test_products_in_fp8_are_for_training_only_and_leave_the_gradient_alone() -> None:
    layer = _layer()
    x = _weight(3, 48, seed=1).to(torch.bfloat16).requires_grad_()
    y = layer.eval()(x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    layer.fp8_products = True
    assert torch.equal(layer(x), y)
    rounded = layer.train()(x)
    assert torch.equal(rounded, fp8_linear(x, layer.quantized))
    assert not torch.equal(rounded, y)
    (found,) = torch.autograd.grad(rounded.sum(), x)
    assert torch.equal(found, expected)


@scaled_products
def test_two_layers_with_products_in_fp8_are_compiled_as_one_graph() -> None:
    model = nn.Sequential(*(QuantLinear(quantize(_weight(48, 48, seed=seed), FP8)) for seed in (0, 1)))
    use_fp8_products(model)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (3, 5):
        x = _weight(rows, 48, seed=rows).to(torch.bfloat16).requires_grad_()
        y, found = model(x), compiled(x)
        assert torch.equal(found, y)
        assert torch.equal(*(torch.autograd.grad(value.sum(), x)[0] for value in (found, y)))


@scaled_products
def test_a_device_that_does_not_compute_the_product_is_refused_before_the_first_step(monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 8.9")

    model = nn.Sequential(_layer())
    with monkeypatch.context() as patch:
        patch.setattr(linear, "fp8_linear", refuse)
        with pytest.raises(TrainError, match=r"compute capability >= 8\.9.*leave it out, and the base in FP8 is deq"):
            use_fp8_products(model)
        patch.setattr(linear, "fp8_linear", lambda x, weight: 2 * fp8_linear(x, weight))
        with pytest.raises(TrainError, match="from the dequantized one"):
            use_fp8_products(model)
    assert not model[0].fp8_products
    use_fp8_products(model)
    assert model[0].fp8_products
    with pytest.raises(TrainError, match=r"write quantize\.method: fp8"):
        use_fp8_products(nn.Sequential(nn.Linear(4, 4)))


def _gradients(model: PreTrainedModel) -> tuple[float, dict[str, Tensor]]:
    loss = SupervisedLoss(model)(pad_rows(make_rows(6)), num_supervised=torch.tensor(10.0))
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in trainable_parameters(model).items() if p.grad is not None}


@scaled_products
def test_loss_and_gradients_with_products_in_fp8_are_near_those_of_fp32(fp8: Path) -> None:
    exact_loss, exact = _gradients(_model(fp8, torch.float32))
    model = _model(fp8)
    use_fp8_products(model)
    loss, gradients = _gradients(model)
    assert loss == pytest.approx(exact_loss, rel=2e-2)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert float((gradient - exact[name]).norm()) <= 0.25 * float(exact[name].norm()), name


@scaled_products
def test_a_training_takes_products_in_fp8_and_its_evaluation_does_not(fp8: Path, tmp_path: Path) -> None:
    rows, scores = make_rows(8), []
    settings = train_section(
        steps=2, batch_size=4, learning_rate=1e-3, checkpoint_every=0, device="cpu", precision="bf16"
    )
    plain = train(_model(fp8), rows, settings=settings, work=tmp_path / "plain")

    def look(model: PreTrainedModel) -> float:
        assert all(
            layer.fp8_products and not layer.training for layer in model.modules() if isinstance(layer, QuantLinear)
        )
        scores.append(1.0)
        return 1.0

    rounded = train(
        _model(fp8),
        rows,
        settings=settings.replace(fp8_products=True, evaluate_every=1),
        work=tmp_path / "rounded",
        evaluate=look,
    )
    assert len(scores) == 2
    assert rounded.losses == pytest.approx(plain.losses, rel=2e-2)
    assert rounded.losses != plain.losses
    wrong = settings.replace(fp8_products=True, precision="fp32")
    with pytest.raises(TrainError, match=r"write train\.precision: bf16"):
        train(_model(fp8), rows, settings=wrong, work=tmp_path / "wrong")


def test_what_is_merged_is_the_base_that_was_trained_on(fp8: Path, tmp_path: Path) -> None:
    adapter = make_adapter(fp8, tmp_path / "adapter")
    chosen: Any = merge_by_evidence(fp8, adapter, tmp_path / "merge" / "model", plan=plan(), rows=ROWS)
    assert chosen.candidate.parity.passed
    reader = DequantizingReader(fp8)
    layer = "model.layers.0.mlp.down_proj.weight"
    assert reader.is_quantized(layer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merge" / "model", dtype=torch.float32).state_dict()
    update = merged[layer] - reader.read(layer)
    assert 0 < torch.linalg.matrix_rank(update, rtol=1e-3) <= 8, "what was added is the adapter alone"
