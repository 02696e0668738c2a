"""Experts as layers: transformers is the oracle for what a folder computes, bitsandbytes for the codes."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.errors import CheckpointError, TrainError
from graftline.settings.model import Quantize
from graftline.weights.experts import expert_stacks, open_experts
from graftline.weights.model_folder import ModelReader, check_tensors
from graftline.weights.quant.folder import DequantizingReader, quantize_folder
from graftline.weights.quant.linear import load_model, load_shares
from tests.adapters.stand_in import EXPERTS, make_experts, make_tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, as transformers writes it."""
    made = {}
    for family in EXPERTS:
        made[family] = tmp_path_factory.mktemp(family)
        make_experts(family).save_pretrained(made[family])
    return made


@pytest.mark.parametrize("family", EXPERTS)
def test_a_folder_is_loaded_and_computes_the_same(family: str, folders: dict[str, Path]):
    check_tensors(ModelReader(folders[family]))
    tokens, model = make_tokens(), load_model(folders[family])
    assert len(expert_stacks(model)) == (2 if family == "qwen3-moe" else 4)
    assert torch.equal(model(tokens).logits, make_experts(family)(tokens).logits)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_in_16_bits_can_stay_so_in_fp32_arithmetic(family: str, tmp_path: Path):
    make_experts(family).to(torch.bfloat16).save_pretrained(tmp_path)
    kept, tokens = load_model(tmp_path, keep=True), make_tokens()
    assert {stack.weight.dtype for stack in expert_stacks(kept).values()} == {torch.bfloat16}
    assert torch.equal(kept(tokens).logits, load_model(tmp_path)(tokens).logits)


def test_a_model_with_the_same_configuration_stays_as_it_is():
    model, tokens = make_experts("mixtral"), make_tokens()
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert other.config is model.config
    before = other(tokens).logits
    open_experts(model)
    open_experts(model)
    assert torch.equal(other(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)
    assert not expert_stacks(other)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_each_experts_matrix_has_the_codes_of_bitsandbytes(family: str, folders: dict[str, Path], tmp_path: Path):
    quantize_folder(folders[family], tmp_path / "nf4", quantize=Quantize(method="nf4"))
    source, made = ModelReader(folders[family]), ModelReader(tmp_path / "nf4")
    experts = [name for name in source.names() if ".experts." in name]
    assert len(experts) == 4 * 3 * (1 if family == "qwen3-moe" else 2)
    for name in experts:
        codes, _ = bnb.quantize_4bit(source.read(name), quant_type="nf4", compress_statistics=True)
        assert torch.equal(made.read(name), codes)
    # The quantized base computes with the dequantized matrices, and so do its gradients.
    tokens, model, dense = make_tokens(), load_model(tmp_path / "nf4"), load_model(folders[family])
    reader = DequantizingReader(tmp_path / "nf4")
    dense.load_state_dict({name: reader.read(name) for name in reader.names() if ".experts." not in name}, strict=False)
    for path, stack in expert_stacks(dense).items():
        matrices = [expert_stacks(model)[path].matrix(expert, torch.float32) for expert in range(4)]
        stack.weight.data = torch.stack(matrices)
    embeddings = [each.get_input_embeddings()(tokens).detach().requires_grad_() for each in (model, dense)]
    for each, embedded in zip((model, dense), embeddings, strict=True):
        each(inputs_embeds=embedded).logits.square().sum().backward()
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits)
    torch.testing.assert_close(embeddings[0].grad, embeddings[1].grad)


def test_experts_in_one_tensor_stay_dense(folders: dict[str, Path], tmp_path: Path):
    quantize_folder(folders["gpt-oss"], tmp_path / "nf4", quantize=Quantize(method="nf4"))
    model = load_model(tmp_path / "nf4")
    assert not any(stack.is_quantized for stack in expert_stacks(model).values())
    assert torch.isfinite(model(make_tokens()).logits).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"), r"lacks 1 .*experts.2.gate_proj"),
        (lambda t: t.update({"model.layers.0.block_sparse_moe.experts.4.w1.weight": torch.zeros(48, 32)}), "no place"),
        (
            lambda t: t.update({"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.zeros(32, 48)}),
            r"shape \(32, 48\), config.json asks for \(48, 32\)",
        ),
    ],
)
def test_a_damaged_folder_is_refused(change, message: str, folders: dict[str, Path], tmp_path: Path):
    tensors = load_file(folders["mixtral"] / "model.safetensors")
    change(tensors)
    (tmp_path / "config.json").write_bytes((folders["mixtral"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (load_model, lambda folder: check_tensors(ModelReader(folder))):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_experts_are_not_divided_over_processes(folders: dict[str, Path]):
    with pytest.raises(TrainError, match=r"MixtralForCausalLM has experts.*train.sharding: false"):
        load_shares(folders["mixtral"], device="cpu", dtype=torch.float32)
