"""Adapters for llama.cpp: read back with the gguf package, row order and names by transformers' own GGUF reader."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from graftline.adapters.attach import attach
from graftline.adapters.peft_format import AdapterIdentity, AdapterWeights, save_adapter
from graftline.errors import BaseMismatchError, ExportError
from graftline.export.gguf_adapter import export_adapter
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import DequantizingReader
from graftline.weights.quant.linear import load_model
from tests.sections import adapter_section
from tests.tiny import make_tiny_llama
from tests.weights.families import edit_config


def make_adapter(base: Path, folder: Path, method: str = "lora", **more: object) -> Path:
    model = load_model(base)
    attach(model, adapter_section(method, rank=4, alpha=8.0, **more), seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, identity=AdapterIdentity(base_digest=read_identity(base).digest))
    return folder


def updates_of(file: Path, base: Path) -> dict[str, torch.Tensor]:
    """ΔW of every layer as llama.cpp computes it, by transformers' names and in its order of rows."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    config = AutoConfig.from_pretrained(base)
    processor = TENSOR_PROCESSORS.get(reader.fields["general.architecture"].contents(), TensorProcessor)(
        config=config.to_dict()
    )
    with torch.device("meta"):
        names = get_gguf_hf_weights_map(AutoModelForCausalLM.from_config(config), processor)
    found = {}
    for name in (name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")):
        A_RI, B_OR = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        update = alpha / B_OR.shape[1] * (B_OR @ A_RI)
        found[names[name]] = torch.from_numpy(np.array(processor.process(weights=update, name=name).weights))
    return found


@pytest.mark.parametrize(
    ("method", "more"), [("lora", {}), ("rslora", {"rank_pattern": {"q_proj": 2}}), ("vera", {}), ("pissa", {})]
)
def test_what_llama_cpp_adds_to_a_weight_is_what_the_adapter_adds(
    base: Path, tmp_path: Path, method: str, more: dict[str, object]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", method, **more)

    assert export_adapter(adapter, tmp_path / "out" / "adapter.gguf", base=base) == 14

    found, reader = updates_of(tmp_path / "out" / "adapter.gguf", base), DequantizingReader(base)
    weights = AdapterWeights.open(adapter)
    assert set(found) == {f"{module}.weight" for module in weights.modules()}
    for module in weights.modules():
        weight = reader.read(f"{module}.weight")
        expected = weights.fold_weight(module, weight) - weight
        torch.testing.assert_close(found[f"{module}.weight"], expected, atol=1e-5, rtol=1e-4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter.gguf"]


@pytest.mark.parametrize("change", [("num_key_value_heads",), ("head_dim",), ("num_key_value_heads", "architectures")])
def test_what_config_json_leaves_to_its_class_does_not_change_the_file(tmp_path: Path, change: tuple[str, ...]) -> None:
    base = make_tiny_llama(tmp_path / "base", num_key_value_heads=4)
    adapter = make_adapter(base, tmp_path / "adapter")
    export_adapter(adapter, tmp_path / "before.gguf", base=base)
    edit_config(base, remove=change)
    export_adapter(adapter, tmp_path / "after.gguf", base=base)
    assert (tmp_path / "after.gguf").read_bytes() == (tmp_path / "before.gguf").read_bytes()


def test_the_file_says_that_it_is_a_lora_adapter_of_that_architecture(tiny_llama: Path, tmp_path: Path) -> None:
    export_adapter(make_adapter(tiny_llama, tmp_path / "adapter"), tmp_path / "a.gguf", base=tiny_llama)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    assert [fields[key].contents() for key in keys] == ["llama", "adapter", "lora", 4.0]


@pytest.mark.parametrize(
    ("method", "more", "reason"),
    [
        ("dora", {}, "low-rank factors only, not dora"),
        ("houlsby", {}, "low-rank factors only, not houlsby"),
        ("lora", {"modules_to_save": ("lm_head",)}, "no modules_to_save"),
    ],
)
def test_what_llama_cpp_cannot_load_is_refused_with_the_reason(
    tiny_llama: Path, tmp_path: Path, method: str, more: dict[str, object], reason: str
) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", method, **more)
    with pytest.raises(ExportError, match=reason):
        export_adapter(adapter, tmp_path / "a.gguf", base=tiny_llama)
    assert not (tmp_path / "a.gguf").exists()


def test_another_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError):
        export_adapter(adapter, tmp_path / "a.gguf", base=make_tiny_llama(tmp_path / "other", seed=5))
