"""What a training on a GPU does otherwise, small and on a CPU: no waiting, offloaded activations, compiled blocks."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.settings.model import Adapter
from graftline.train import compiled, offload
from graftline.train.batches import MicroBatch, pack_rows, pad_rows, use_row_attention
from graftline.train.compiled import compile_blocks, is_worth_it
from graftline.train.loss import SupervisedLoss
from graftline.train.offload import ActivationOffload, checkpoint_blocks
from graftline.train.trainer import train
from graftline.weights.experts import open_experts
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.low_rank import FactorSettings, make_pair
from graftline.weights.quant.scheme import FP8, Scheme
from tests.adapters.stand_in import make_experts
from tests.sections import train_section
from tests.train.rows import make_rows

_WAITING = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.is_nonzero",
    "aten.equal",
    "aten.masked_select",
    "aten.repeat_interleave",
    "aten.unique",
)
"""Operations whose result the host needs before it can go on: on a GPU it waits for the device."""


class Waits(TorchDispatchMode):
    """Counts operations that would make the host wait; a mask as an index is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        if name.startswith(_WAITING) and not name.startswith("aten.repeat_interleave.self_int"):
            self.seen[name] += 1
        elif name.startswith("aten.index") and masks:
            self.seen[f"{name} by a mask"] += 1
        return func(*args, **(kwargs or {}))


def _model(folder: Path, method: str = "lora", *, bits: str | None = None) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, layer in list(model.named_modules()):
        if bits and isinstance(layer, nn.Linear) and name != "lm_head":
            scheme = FP8 if bits == "fp8" else Scheme(bits, 64, True)
            model.set_submodule(name, QuantLinear(quantize(layer.weight.detach().float(), scheme)))
    alpha: dict[str, Any] = {} if method == "vera" else {"alpha": 8}
    attach(model, Adapter(method=method, rank=4, **alpha), seed=0)
    return model.train()


def _losses(model: PreTrainedModel, batches: list[MicroBatch]) -> list[Tensor]:
    loss, found = SupervisedLoss(model), []
    for batch in batches:
        value = loss(batch, num_supervised=torch.tensor(10.0, device=model.device))
        value.backward()
        found.append(value.detach())
    return found


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "houlsby"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_host_waits_for_nothing_inside_a_micro_batch(tiny_llama: Path, method: str, checkpointing: bool) -> None:
    model = _model(tiny_llama, method)
    if checkpointing:
        checkpoint_blocks(model)
    assert use_row_attention(model)
    with Waits() as waits:
        _losses(model, [pad_rows(make_rows(4))])
    assert not waits.seen


def test_of_packed_rows_only_the_stand_in_for_the_kernel_looks_at_the_bounds(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, looks = _model(tiny_llama), []
    assert use_row_attention(model)
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: looks.append(self.dtype) or real(self))
    batch = pack_rows(make_rows(4))
    looks.clear()
    with Waits() as waits:
        _losses(model, [batch])
    assert not waits.seen
    assert looks == [torch.int32] * model.config.num_hidden_layers


def test_an_operation_that_waits_is_counted() -> None:
    x = torch.arange(4.0, requires_grad=True)
    with Waits() as waits:
        x[x > 1].sum().item()
    assert len(waits.seen) >= 2


def test_offloaded_activations_give_the_same_bytes(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [pad_rows(make_rows(4)), pad_rows(make_rows(6, seed=1))]
    found = {}
    for away in (None, ActivationOffload(smallest_bytes=1)):
        model = _model(tiny_llama)
        checkpoint_blocks(model, offload=away)
        losses = _losses(model, batches)
        found[away is None] = (losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if away is not None:
            assert away.num_sent == len(batches) * model.config.num_hidden_layers
            assert not away._away, "every activation was fetched"
    assert found[True][0] == found[False][0]
    assert found[True][1].keys() == found[False][1].keys()
    assert all(torch.equal(found[True][1][name], found[False][1][name]) for name in found[True][1])


def test_at_most_two_activations_are_here_at_a_time() -> None:
    away, most = ActivationOffload(smallest_bytes=1), []
    x = torch.ones(8, requires_grad=True)
    y = x
    with away.saving():
        for _ in range(6):
            y = y.sin()
            most.append(sum(each.here is not None for each in away._away))
    assert max(most) == 2
    y.sum().backward()
    assert not away._away
    expected = torch.ones(8, requires_grad=True)
    z = expected
    for _ in range(6):
        z = z.sin()
    z.sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_a_training_with_both_switches_takes_them(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(offload, "_SMALLEST_BYTES", 1)
    used: list[str] = []
    real = compile_blocks
    monkeypatch.setattr(
        "graftline.train.trainer.compile_blocks", lambda model: used.append("compiled") or real(model, backend="eager")
    )
    settings = train_section(
        steps=2,
        batch_size=4,
        learning_rate=1e-3,
        checkpoint_every=0,
        device="cpu",
        precision="bf16",
        gradient_checkpointing=True,
    )
    plain = train(_model(tiny_llama), make_rows(8), settings=settings, work=tmp_path / "plain")
    switched = settings.replace(offload_activations=True, compile="always")
    both = train(_model(tiny_llama), make_rows(8), settings=switched, work=tmp_path / "both")
    assert used == ["compiled"]
    assert both.losses == pytest.approx(plain.losses, rel=1e-2)


_COMPILERS = [
    pytest.param("cpu", "aot_eager", marks=pytest.mark.slow),
    pytest.param(
        "cuda",
        "inductor",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def _moved(batch: MicroBatch, device: str) -> Any:
    values: dict[str, Any] = dict(batch)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("bits", [None, "nf4", "nf3", "nf2", "fp8"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "houlsby"])
@pytest.mark.parametrize(("device", "backend"), _COMPILERS)
def test_compiled_blocks_give_the_gradients_of_plain_ones(
    tiny_llama: Path, device: str, backend: str, method: str, bits: str | None
) -> None:
    if bits is not None and device == "cpu" and method != "lora":
        pytest.skip("the base does not depend on the method; a GPU tries all")
    found: list[dict[str, Tensor]] = []
    for compiling in (False, True):
        model = _model(tiny_llama, method, bits=bits).to(device)  # type: ignore[arg-type]
        checkpoint_blocks(model)
        blocks = compile_blocks(model, backend=backend) if compiling else None
        batches = [pad_rows(make_rows(4)), pad_rows(make_rows(6, seed=1))]
        _losses(model, [_moved(batch, device) for batch in batches])
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert blocks is None or blocks.why_not is None
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))


def test_what_cannot_be_compiled_runs_plain_and_says_why(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction")

    plain, model = _model(tiny_llama), _model(tiny_llama)
    blocks = compile_blocks(model, backend=broken)
    batch = [pad_rows(make_rows(4))]
    assert _losses(model, batch) == _losses(plain, batch)
    assert blocks is not None
    assert "no such instruction" in (blocks.why_not or "")
    assert "run uncompiled" in caplog.text
    assert caplog.text.count("run uncompiled") == 1


def test_a_compiler_that_loses_gradients_is_not_used(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    def losing(graph: Any, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            found = graph(*given)
            return tuple(value.detach() + 0 * value if value.is_floating_point() else value for value in found)

        return run

    plain, model = _model(tiny_llama), _model(tiny_llama)
    blocks = compile_blocks(model, backend=losing)
    batch = [pad_rows(make_rows(4))]
    assert _losses(model, batch) == _losses(plain, batch)
    assert blocks is not None
    assert "the gradient of" in (blocks.why_not or "")
    for (name, one), other in zip(
        trainable_parameters(model).items(), trainable_parameters(plain).values(), strict=True
    ):
        assert torch.equal(one.grad, other.grad), name
    assert "run uncompiled" in caplog.text


def test_a_first_block_without_an_adapter_leaves_the_others_compiled(tiny_llama: Path) -> None:
    model = _model(tiny_llama)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    blocks = compile_blocks(model, backend="eager")
    _losses(model, [pad_rows(make_rows(4))])
    assert blocks is not None
    assert blocks.why_not is None


def test_evaluation_is_never_compiled(tiny_llama: Path) -> None:
    def never(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    model = _model(tiny_llama)
    compile_blocks(model, backend=never)
    with torch.no_grad():
        SupervisedLoss(model.eval())(pad_rows(make_rows(2)), num_supervised=torch.tensor(1.0))


def test_a_short_training_and_one_on_a_cpu_are_not_compiled_by_themselves() -> None:
    long = {"num_parameters": 8_000_000_000, "num_tokens": 20_000_000}
    assert is_worth_it("auto", device="cuda", **long)
    assert not is_worth_it("auto", device="cpu", **long)
    assert not is_worth_it("never", device="cuda", **long)
    assert is_worth_it("always", device="cpu", num_parameters=1, num_tokens=1)
    assert not is_worth_it("auto", device="cuda", num_parameters=8_000_000_000, num_tokens=2_000_000)
    assert compiled._WORTH == 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_nothing_synchronizes_inside_a_micro_batch(tiny_llama: Path) -> None:
    model = _model(tiny_llama).cuda()
    assert use_row_attention(model)
    batch: Any = {name: value.cuda() for name, value in pad_rows(make_rows(4)).items()}  # type: ignore[attr-defined]
    count = torch.tensor(10.0, device="cuda")
    SupervisedLoss(model)(batch, num_supervised=count).backward()  # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        SupervisedLoss(model)(batch, num_supervised=count).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["loftq", "qpissa"])
def test_on_cuda_a_weight_is_paired_with_factors_as_on_the_cpu(method: Any) -> None:
    errors = []
    for device in ("cpu", "cuda"):
        weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(device)
        factors, generator = FactorSettings(rank=4, scale=2.0), torch.Generator().manual_seed(0)
        scheme = Scheme("nf4", 64, True)
        errors.append(make_pair(weight, scheme, factors, method=method, steps=2, generator=generator).error)
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_experts_run_uncompiled_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = make_experts("mixtral")
    open_experts(model)
    assert compile_blocks(model) is None
    assert "MixtralForCausalLM has experts, whose rows differ from step to step" in caplog.text
