"""Adapters on experts folded into files: PEFT's merge is the oracle, transformers loads the result."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.peft_format import AdapterIdentity, load_exact, save_adapter
from graftline.errors import MergeError
from graftline.merge.fold import merge_folder
from graftline.settings.model import Adapter, Quantize
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import load_model
from tests.adapters.stand_in import EXPERTS, make_experts, make_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
SPEC = Adapter(method="lora", rank=3, alpha=6.0, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"))


def train(base: Path, out: Path, spec: Adapter = SPEC) -> None:
    model, generator = load_model(base), torch.Generator().manual_seed(7)
    attach(model, spec, seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, out, identity=AdapterIdentity(base_digest=read_identity(base).digest))


@pytest.mark.parametrize("kind", ["shared_a", "shared_outer"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_shared_factor_is_merged_into_every_expert(family: str, kind: str, tmp_path: Path):
    make_experts(family).save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "adapter", SPEC.replace(experts=kind))
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    tokens = make_tokens()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    unmerged = load_exact(tmp_path / "base", tmp_path / "adapter")(tokens).logits
    tolerance = 1e-5 * float(unmerged.detach().abs().max())
    torch.testing.assert_close(loaded(tokens).logits, unmerged, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_merge_is_that_of_peft_and_is_stored_as_the_base_is(family: str, tmp_path: Path):
    make_experts(family).save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "adapter")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(make_experts(family), tmp_path / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "theirs"))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    tokens = make_tokens()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    unmerged = load_exact(tmp_path / "base", tmp_path / "adapter")(tokens).logits
    torch.testing.assert_close(
        loaded(tokens).logits, unmerged, rtol=0, atol=1e-5 * float(unmerged.detach().abs().max())
    )


def test_a_merge_into_quantized_experts_answers_as_the_adapter(tmp_path: Path):
    make_experts("mixtral").save_pretrained(tmp_path / "dense")
    quantize_folder(tmp_path / "dense", tmp_path / "base", quantize=Quantize(method="nf4"))
    train(tmp_path / "base", tmp_path / "adapter")
    report = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert report.num_folded == 2 * (1 + 4 * 3)
    tokens = make_tokens()
    unmerged = load_exact(tmp_path / "base", tmp_path / "adapter")(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5 * float(unmerged.detach().abs().max()))


def test_a_router_that_is_trained_whole_is_merged(tmp_path: Path):
    make_experts("mixtral").save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "adapter", SPEC.replace(modules_to_save=("gate",)))
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    tokens = make_tokens()
    unmerged = load_exact(tmp_path / "base", tmp_path / "adapter")(tokens).logits
    theirs = peft.PeftModel.from_pretrained(make_experts("mixtral"), tmp_path / "adapter")(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    for other in (theirs, merged):
        torch.testing.assert_close(other, unmerged, rtol=0, atol=1e-5 * float(unmerged.detach().abs().max()))


def test_a_rank_that_means_another_number_of_experts_is_refused(tmp_path: Path):
    make_experts("mixtral").save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "adapter", SPEC.replace(targets=("experts.down_proj",)))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 3', '"r": 2'))  # 12 rows: four experts of rank 3, six of rank 2
    with pytest.raises(MergeError, match=r"experts.down_proj has matrices of 4 tensors .* for 6 experts"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
