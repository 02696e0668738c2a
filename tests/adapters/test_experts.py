"""Adapters on experts: PEFT's ParamWrapper is the oracle for logits, gradients, files and merges."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from graftline.adapters import lora
from graftline.adapters.attach import adapter_layers, attach, trainable_parameters
from graftline.adapters.peft_format import (
    AdapterIdentity,
    AdapterWeights,
    attach_trained,
    load_adapter,
    save_adapter,
    write_weights,
)
from graftline.digest import of_bytes
from graftline.errors import AdapterError
from graftline.settings.model import Adapter, Quantize
from graftline.weights import experts, grouped
from graftline.weights.experts import expert_stacks
from graftline.weights.identity import BaseIdentity
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import load_model
from tests.adapters.stand_in import EXPERTS, make_experts, make_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:The following:RuntimeWarning")
BASE = BaseIdentity(of_bytes(b"base"))
IDENTITY = AdapterIdentity(base_digest=BASE.digest)
BOTH = ("experts.gate_up_proj", "experts.down_proj")
CASES = {  # our spec, and PEFT's configuration of the same adapter
    "both": (
        {"rank": 3, "alpha": 6.0, "targets": BOTH, "rank_pattern": {"experts.down_proj": 2}},
        {"r": 3, "lora_alpha": 6, "target_parameters": list(BOTH), "rank_pattern": {"experts.down_proj": 2}},
    ),
    "with attention": (
        {"rank": 3, "targets": ("q_proj", "v_proj", *BOTH), "alpha_pattern": {"experts.gate_up_proj": 5.0}},
        {
            "r": 3,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": list(BOTH),
            "alpha_pattern": {"experts.gate_up_proj": 5.0},
        },
    ),
    "one": (
        {"method": "rslora", "rank": 3, "targets": ("experts.down_proj",)},
        {"r": 3, "lora_alpha": 16, "target_parameters": ["experts.down_proj"], "use_rslora": True},
    ),
    "attention only": (
        {"rank": 3, "targets": ("q_proj", "v_proj")},
        {"r": 3, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    ),
}
ALL = [(family, case) for family in EXPERTS for case in CASES if family == "mixtral" or case == "with attention"]


def spec(**changes: object) -> Adapter:
    return Adapter(**{"method": "lora"} | changes)  # type: ignore[arg-type]


def theirs_of(family: str, case: str) -> torch.nn.Module:
    given = {"target_modules": []} | copy.deepcopy(CASES[case][1])
    return peft.get_peft_model(make_experts(family), peft.LoraConfig(**given)).eval()


def disturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(("family", "case"), ALL)
def test_our_file_loads_in_peft(family: str, case: str, tmp_path: Path):
    model, tokens = make_experts(family), make_tokens()
    base_logits = model(tokens).logits
    attach(model, spec(**CASES[case][0]), seed=0)
    assert_equal_logits(model(tokens).logits, base_logits)
    disturb(model)
    expected = model(tokens).logits
    assert (expected - base_logits).abs().max() > 0.05
    save_adapter(model, tmp_path, identity=IDENTITY)
    theirs = peft.PeftModel.from_pretrained(make_experts(family), tmp_path).eval()
    assert_equal_logits(expected, theirs(tokens).logits)
    of_transformers = make_experts(family)
    of_transformers.load_adapter(str(tmp_path))
    assert_equal_logits(expected, of_transformers.eval()(tokens).logits)


@pytest.mark.parametrize(("family", "case"), ALL)
def test_a_file_of_peft_loads_here_and_is_written_with_its_tensors(family: str, case: str, tmp_path: Path):
    tokens, theirs = make_tokens(), theirs_of(family, case)
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make_experts(family)
    load_adapter(model, tmp_path / "theirs", base=BASE, trainable=True)
    assert_equal_logits(model(tokens).logits, theirs(tokens).logits)
    save_adapter(model, tmp_path / "ours", identity=IDENTITY)
    ours, original = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[key], original[key]) for key in original)


@pytest.mark.parametrize("family", EXPERTS)
def test_gradients_are_those_of_peft(family: str, tmp_path: Path):
    theirs, tokens = theirs_of(family, "with attention"), make_tokens()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = make_experts(family)
    load_adapter(model, tmp_path, base=BASE, trainable=True)
    for each in (model, theirs):
        each(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    layers = adapter_layers(model)
    assert len(expected) == 2 * len(layers)
    for name, layer in layers.items():
        module, _, last = name.rpartition(".")
        if layer.kind == "experts":
            path = f"{module}.base_layer" if last == "gate_up_proj" else module
            A, B = (expected[f"base_model.model.{path}.lora_{key}.default.weight"] for key in "AB")
            A, B = A.unflatten(0, (4, 3)), B.unflatten(1, (3, 4)).permute(2, 0, 1)
        else:
            A, B = (expected[f"base_model.model.{name}.lora_{key}.default.weight"] for key in "AB")
        for ours, other in ((layer.A.grad, A), (layer.B.grad, B)):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


SHARING = {"shared_a": ("A", "A"), "shared_outer": ("A", "B")}  # what gate_up_proj and down_proj share


def make_shared(kind: str, family: str = "mixtral") -> torch.nn.Module:
    model = make_experts(family)
    attach(model, spec(rank=3, alpha=6.0, targets=("q_proj", *BOTH), experts=kind), seed=0)
    disturb(model)
    return model


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("kind", SHARING)
def test_a_shared_factor_is_in_the_file_for_every_expert_and_is_read_as_shared(kind: str, family: str, tmp_path: Path):
    tokens, model = make_tokens(), make_shared(kind, family)
    expected = model(tokens).logits
    assert (expected - make_experts(family)(tokens).logits).abs().max() > 0.05
    save_adapter(model, tmp_path / "first", identity=IDENTITY)
    theirs = peft.PeftModel.from_pretrained(make_experts(family), tmp_path / "first").eval()
    assert_equal_logits(expected, theirs(tokens).logits)
    of_transformers = make_experts(family)
    of_transformers.load_adapter(str(tmp_path / "first"))
    assert_equal_logits(expected, of_transformers.eval()(tokens).logits)

    again, weights = make_experts(family), AdapterWeights.open(tmp_path / "first")
    load_adapter(again, tmp_path / "first", base=BASE, trainable=True)
    shapes = {name: p.shape for name, p in trainable_parameters(model).items()}
    assert {name: p.shape for name, p in trainable_parameters(again).items()} == shapes
    assert torch.equal(again(tokens).logits, expected)
    save_adapter(again, tmp_path / "second", identity=IDENTITY)
    write_weights(weights, tmp_path / "third")
    for file in ("adapter_model.safetensors", "graftline.json"):
        first, second, third = ((tmp_path / name / file).read_bytes() for name in ("first", "second", "third"))
        assert first == second == third


@pytest.mark.parametrize("kind", SHARING)
def test_the_gradient_of_a_shared_factor_is_the_sum_over_the_experts(kind: str, tmp_path: Path):
    tokens, shared, each = make_tokens(), make_shared(kind), make_experts("mixtral")
    save_adapter(shared, tmp_path, identity=IDENTITY)
    (tmp_path / "graftline.json").unlink()  # as a file of PEFT
    load_adapter(each, tmp_path, base=BASE, trainable=True)
    for model in (shared, each):
        model(tokens, labels=tokens).loss.backward()
    layers = adapter_layers(each)
    of_stack = dict(zip(("gate_up_proj", "down_proj"), SHARING[kind], strict=True))
    for name, layer in adapter_layers(shared).items():
        for factor in "AB":
            ours, theirs = getattr(layer, factor).grad, getattr(layers[name], factor).grad
            if of_stack.get(name.rpartition(".")[2]) == factor:
                assert theirs.shape == (4, *ours.shape)
                theirs = theirs.sum(0)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize(("kind", "of_down"), [("shared_a", 48 + 4 * 32), ("shared_outer", 4 * 48 + 32)])
def test_shared_factors_are_counted_once(kind: str, of_down: int):
    coverage = attach(make_experts("mixtral"), spec(rank=3, targets=BOTH, experts=kind), seed=0)
    assert [row.num_parameters for row in coverage.rows] == [2 * 3 * (32 + 4 * 96), 2 * 3 * of_down]


def test_training_goes_on_from_an_adapter_of_the_same_form_only(tmp_path: Path):
    model = make_shared("shared_a")
    save_adapter(model, tmp_path, identity=IDENTITY)
    weights, again = AdapterWeights.open(tmp_path), make_experts("mixtral")
    same = spec(rank=3, alpha=6.0, targets=("q_proj", *BOTH), experts="shared_a")
    attach_trained(again, same, weights)
    theirs = trainable_parameters(again)
    assert all(torch.equal(theirs[name], parameter) for name, parameter in trainable_parameters(model).items())
    for other in ("each", "shared_outer"):
        with pytest.raises(AdapterError, match=f"trained with experts: shared_a, this pipeline asks for {other}"):
            attach_trained(make_experts("mixtral"), same.replace(experts=other), weights)


def test_a_shared_factor_whose_copies_differ_is_refused(tmp_path: Path):
    save_adapter(make_shared("shared_a"), tmp_path, identity=IDENTITY)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("experts.lora_A.weight"))
    tensors[key][-1] += 1  # of the last expert
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"1 experts, such as 3, have another A than expert 0, .*expected equal"):
        AdapterWeights.open(tmp_path)
    record = tmp_path / "graftline.json"
    record.write_text(record.read_text().replace("shared_a", "shared_b"))
    with pytest.raises(AdapterError, match="experts is 'shared_b'; expected one of each, shared_a, shared_outer"):
        AdapterWeights.open(tmp_path)


GROUPED_BASES = ["dense", "nf4"]


def losses_and_gradients(base: Path, kind: str, device: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    model = load_model(base, dtype=dtype)
    attach(model, spec(rank=3, targets=("q_proj", *BOTH), experts=kind), seed=0)
    disturb(model)
    model.to(device).train()
    tokens = make_tokens().to(device)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu().float() for p in trainable_parameters(model).values()])


def make_base(family: str, kind: str, folder: Path) -> Path:
    make_experts(family).save_pretrained(folder / "dense")
    if kind == "nf4":
        quantize_folder(folder / "dense", folder / "nf4", quantize=Quantize(method="nf4"))
    return folder / kind


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The grouped products that are computed."""
    found: list[int] = []
    whole = grouped.grouped_linear

    def counted(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        found.append(weight.shape[0])
        return whole(x, weight, ends)

    for module in (lora, experts):
        monkeypatch.setattr(module, "grouped_linear", counted)
    return found


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize("kind", ["each", *SHARING])
@pytest.mark.parametrize("base", GROUPED_BASES)
@pytest.mark.parametrize("family", EXPERTS)
def test_grouped_products_are_those_of_the_loop(
    family: str, base: str, kind: str, calls: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder = make_base(family, base, tmp_path)
    loss, gradients = losses_and_gradients(folder, kind, "cpu", torch.float32)
    assert not calls  # a CPU loops
    monkeypatch.setattr(grouped, "PLACES", {("cpu", torch.float32)})
    grouped_loss, grouped_gradients = losses_and_gradients(folder, kind, "cpu", torch.float32)
    # In every block the two stacks, if they are dense, and their factors that are not shared.
    num_stacks, dense = 2 if family == "qwen3-moe" else 4, base == "dense" or family == "gpt-oss"
    assert calls == [4] * num_stacks * (dense + (2 if kind == "each" else 1))
    assert grouped_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(grouped_gradients, gradients, rtol=1e-4, atol=1e-5 * float(gradients.abs().max()))


def test_a_device_whose_grouped_products_are_wrong_or_unknown_loops(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = make_base("mixtral", "dense", tmp_path)
    expected = losses_and_gradients(folder, "each", "cpu", torch.float32)
    monkeypatch.setattr(grouped, "PLACES", {("cpu", torch.float32)})

    def fails(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel")

    def is_wrong(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        shape = (len(x), weight.shape[-1]) if weight.ndim == 3 else (len(offs), len(x), weight.shape[-1])
        return x.new_full(shape, torch.nan)

    for broken, reason in ((fails, r"the product fails (no kernel)"), (is_wrong, "the product is not the loop's")):
        monkeypatch.setattr(F, "grouped_mm", broken, raising=False)
        grouped._are_right.cache_clear()
        caplog.clear()
        found = losses_and_gradients(folder, "each", "cpu", torch.float32)
        assert (found[0], bool(torch.equal(found[1], expected[1])), calls) == (expected[0], True, [])
        (line,) = [record.message for record in caplog.records if "grouped" in record.message]
        assert f"{reason}; experts are multiplied one by one" in line
    grouped._are_right.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["each", *SHARING])
@pytest.mark.parametrize("base", GROUPED_BASES)
@pytest.mark.parametrize("family", EXPERTS)
def test_on_cuda_grouped_products_in_bf16_are_those_of_the_loop(
    family: str, base: str, kind: str, calls: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder = make_base(family, base, tmp_path)
    found = losses_and_gradients(folder, kind, "cuda", torch.bfloat16)
    assert calls
    assert grouped.can_group(torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda"))
    monkeypatch.setattr(grouped, "PLACES", set())
    expected = losses_and_gradients(folder, kind, "cuda", torch.bfloat16)
    assert found[0] == pytest.approx(expected[0], rel=2e-2)
    # A router's choice between two experts that are nearly equal may be another one.
    assert torch.cosine_similarity(found[1], expected[1], dim=0) > 0.9


REFUSED: list[tuple[dict[str, object], str]] = [
    ({}, r"MixtralForCausalLM has experts .*q_proj, .*experts.gate_up_proj"),
    ({"targets": ("gate",)}, r"layers.0.mlp.gate is the router .*modules_to_save: \[gate\]"),
    ({"targets": ("experts",)}, r"mlp.experts is a MixtralExperts, no linear layer"),
    ({"method": "dora", "targets": BOTH}, r"layer of experts, which dora does not take \(lora and rslora do\)"),
    ({"method": "full", "targets": BOTH}, r"layer of experts, which full does not take"),
    ({"targets": BOTH, "dropout": 0.1}, r"dropout 0.1 and bias none; .*write dropout: 0"),
    ({"targets": ("q_proj",), "bias": "all"}, r"bias: all would train the biases of the experts"),
    ({"targets": ("q_proj",), "modules_to_save": ("experts",)}, r"mlp.experts has experts, .*name them as targets"),
    ({"targets": BOTH, "rank": 33}, r"rank 33 is above"),
    ({"targets": ("q_proj",), "experts": "shared_a"}, r"experts: shared_a was given, and no target names experts"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_is_not_for_experts_is_refused(given: dict[str, object], message: str):
    with pytest.raises(AdapterError, match=message):
        attach(make_experts("mixtral"), spec(**given), seed=0)


def test_the_router_and_the_experts_matrices_are_frozen():
    model, tokens = make_experts("mixtral"), make_tokens()
    coverage = attach(model, spec(rank=3, targets=BOTH), seed=0)
    assert all(name.endswith((".A", ".B")) for name in trainable_parameters(model))
    # For each of four experts: gate and up of 48 outputs each, down of 32; two blocks.
    assert [row.num_parameters for row in coverage.rows] == [2 * 4 * 3 * (32 + 96), 2 * 4 * 3 * (48 + 32)]
    model(tokens, labels=tokens).loss.backward()
    trained = {id(parameter) for parameter in trainable_parameters(model).values()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_parameters": ["feed_forward.w"]}, "target_parameters feed_forward.w; adapters on gate_up_proj and"),
        ({"target_parameters": ["down_proj"]}, "are not those of its target_parameters"),
        ({"target_parameters": "down_proj"}, "expected a list of names"),
        ({"r": 5, "rank_pattern": {"q_proj|v_proj": 3}}, r"for rank 5; expected \(experts x rank, in\)"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(change: dict[str, object], message: str, tmp_path: Path):
    theirs_of("mixtral", "with attention").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=message):
        AdapterWeights.open(tmp_path)


def test_an_adapter_that_was_read_is_written_with_the_same_bytes(tmp_path: Path):
    model = make_experts("mixtral")
    attach(model, spec(rank=3, targets=("q_proj", *BOTH)), seed=0)
    save_adapter(model, tmp_path / "first", identity=IDENTITY)
    write_weights(AdapterWeights.open(tmp_path / "first"), tmp_path / "second")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_bf16_and_recomputed_blocks_give_the_same_gradients_up_to_rounding():
    tokens, found = make_tokens(), []
    for dtype, recomputed in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        model = make_experts("mixtral").to(dtype)
        attach(model, spec(rank=3, targets=("q_proj", *BOTH)), seed=0)
        disturb(model)
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(tokens, labels=tokens).loss.backward()
        parameters = trainable_parameters(model).values()
        assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert torch.equal(found[0], found[1])
    # A router's choice between two experts that are nearly equal may be another one in bf16.
    assert torch.cosine_similarity(found[0], found[2], dim=0) > 0.9


def test_autocast_computes_in_its_number_type():
    model, tokens = make_experts("mixtral"), make_tokens()
    attach(model, spec(rank=3, targets=("experts.down_proj",)), seed=0)
    given: list[torch.dtype] = []
    for layer in expert_stacks(model).values():
        layer.register_forward_hook(lambda _, __, output: given.append(output.dtype))
    for layer in adapter_layers(model).values():
        layer.register_forward_hook(lambda _, __, output: given.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens).loss.backward()
    assert given == [torch.bfloat16] * 4  # gate_up_proj without an adapter, down_proj with one, in two blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("family", EXPERTS)
def test_on_cuda_experts_give_the_losses_and_gradients_of_the_cpu(family: str, is_quantized: bool, tmp_path: Path):
    make_experts(family).save_pretrained(tmp_path / "dense")
    if is_quantized:
        quantize_folder(tmp_path / "dense", tmp_path / "nf4", quantize=Quantize(method="nf4"))
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        model = load_model(tmp_path / ("nf4" if is_quantized else "dense"))
        attach(model, spec(rank=3, targets=("q_proj", *BOTH)), seed=0)
        disturb(model)
        model.to(device).train()
        tokens = make_tokens().to(device)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in trainable_parameters(model).values()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
