"""A quantized base, merged and requantized: what must hold exactly, and what is only reported."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.peft_format import AdapterIdentity, load_adapter, save_adapter
from graftline.errors import AdapterError, BaseMismatchError, MergeError
from graftline.merge.fold import merge_folder
from graftline.merge.parity import ParityLimits, requantize_folder
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import DequantizingReader
from graftline.weights.quant.linear import load_model
from tests.merge.conftest import compare
from tests.sections import adapter_section, quantize_section
from tests.tiny import make_tiny_llama

SEQUENCES = [[5, 6, 7, 8, 9, 10], list(range(20, 60))]


def make_adapter(base: Path, folder: Path, *, size: float = 0.05, method: str = "lora") -> Path:
    model = load_model(base)
    attach(model, adapter_section(method, rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, identity=AdapterIdentity(base_digest=read_identity(base).digest))
    return folder


def unmerged(base: Path, adapter: Path) -> torch.nn.Module:
    model = load_model(base)
    load_adapter(model, adapter, base=read_identity(base))
    return model


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "vera"])
def test_a_merge_into_the_dequantized_base_answers_as_the_unmerged_model(
    method: str, nf4: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(nf4, tmp_path / "adapter", method=method)
    report = merge_folder(nf4, adapter, tmp_path / "merged", dtype=torch.float32)
    assert report.base_choice == "dequantized"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    limits = ParityLimits.for_dtype(torch.float32)
    assert compare(unmerged(nf4, adapter), merged, SEQUENCES, limits=limits).passed


def test_a_merge_into_the_original_is_another_model_and_says_so(tiny_llama: Path, nf4: Path, tmp_path: Path) -> None:
    adapter = make_adapter(nf4, tmp_path / "adapter")
    report = merge_folder(nf4, adapter, tmp_path / "merged", dtype=torch.float32, original=tiny_llama)
    assert report.base_choice == "original"
    assert report.base_digest == read_identity(tiny_llama).digest
    parity = compare(
        unmerged(nf4, adapter),
        load_model(tmp_path / "merged"),
        SEQUENCES,
        limits=ParityLimits.for_dtype(torch.float32),
    )
    assert not parity.passed


def test_an_original_that_is_not_the_bases_own_is_refused(nf4: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=5)
    adapter = make_adapter(nf4, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="was quantized from"):
        merge_folder(nf4, adapter, tmp_path / "merged", dtype=torch.float32, original=other)


def test_bottlenecks_cannot_be_merged_and_the_reason_is_given(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", method="houlsby")
    with pytest.raises(AdapterError, match="cannot be folded, because"):
        merge_folder(tiny_llama, adapter, tmp_path / "merged", dtype=torch.float32)
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def merged(nf4: Path, tmp_path: Path) -> Path:
    merge_folder(nf4, make_adapter(nf4, tmp_path / "adapter"), tmp_path / "merged", dtype=torch.float32)
    return tmp_path / "merged"


def test_the_report_is_what_its_formulas_say(nf4: Path, merged: Path, tmp_path: Path) -> None:
    report = requantize_folder(merged, tmp_path / "again", base=nf4, quantize=quantize_section())
    assert len(report.layers) == 14
    assert report.vanished == pytest.approx(1 - sum(layer.kept for layer in report.layers) / 14)
    readers = [DequantizingReader(folder) for folder in (nf4, merged, tmp_path / "again")]
    for layer in report.layers:
        base, exact, rounded = (reader.read(f"{layer.name}.weight").double() for reader in readers)
        update = exact - base
        assert layer.kept == pytest.approx(float(((rounded - base) * update).sum() / (update * update).sum()), rel=1e-4)
        assert layer.noise == pytest.approx(float((rounded - exact).norm() / update.norm()), rel=1e-4)
        assert layer.update == pytest.approx(float(update.norm() / base.norm()), rel=1e-4)


def test_a_large_update_is_kept_and_a_tiny_one_drowns_in_noise(nf4: Path, tmp_path: Path) -> None:
    noise = {}
    for size in (0.003, 1.0):
        adapter = make_adapter(nf4, tmp_path / f"adapter-{size}", size=size)
        merge_folder(nf4, adapter, tmp_path / f"merged-{size}", dtype=torch.float32)
        report = requantize_folder(
            tmp_path / f"merged-{size}", tmp_path / f"again-{size}", base=nf4, quantize=quantize_section()
        )
        noise[size] = report.noise
    assert noise[1.0] < 0.2
    assert noise[0.003] > 0.5


def test_without_rows_the_codes_and_constants_are_those_of_bitsandbytes(
    nf4: Path, merged: Path, tmp_path: Path
) -> None:
    requantize_folder(merged, tmp_path / "again", base=nf4, quantize=quantize_section())
    dense, stored = (load_file(folder / "model.safetensors") for folder in (merged, tmp_path / "again"))
    names = [name for name in dense if f"{name}.absmax" in stored]
    assert len(names) == 14
    for name in names:
        packed, state = bnb.quantize_4bit(dense[name], blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(stored[name].view(-1), packed.view(-1)), name
        assert torch.equal(stored[f"{name}.absmax"].view(-1), state.absmax.view(-1)), name


def test_requantizing_an_unchanged_base_is_refused(nf4: Path, tmp_path: Path) -> None:
    adapter = make_adapter(nf4, tmp_path / "adapter", size=0.0)
    merge_folder(nf4, adapter, tmp_path / "merged", dtype=torch.float32)
    with pytest.raises(MergeError, match="the same weights"):
        requantize_folder(tmp_path / "merged", tmp_path / "again", base=nf4, quantize=quantize_section())
