"""`graftline export` on a tiny real model: what it writes loads there, or it says why it cannot."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from graftline.adapters.attach import attach
from graftline.adapters.peft_format import AdapterIdentity, save_adapter
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from tests.cli.conftest import Run
from tests.sections import adapter_section


def make_adapter(base: Path, folder: Path, method: str) -> Path:
    model = load_model(base)
    attach(model, adapter_section(method, rank=4, alpha=8.0, rank_pattern={"q_proj": 2}), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, identity=AdapterIdentity(base_digest=read_identity(base).digest))
    return folder


@pytest.mark.parametrize("target", ["peft", "vllm"])
def test_an_exported_adapter_gives_the_same_logits(run: Run, tiny_llama: Path, tmp_path: Path, target: str) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", "lora")

    ended = run("export", str(adapter), str(tmp_path / "out"), "--base", str(tiny_llama), "--target", target)

    assert ended.code == 0, ended.err
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = PeftModel.from_pretrained(load_model(tiny_llama), adapter)(ids).logits
    found = PeftModel.from_pretrained(load_model(tiny_llama), tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_dora_is_refused_for_vllm_with_the_reason_and_nothing_is_written(
    run: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", "dora")

    ended = run("export", str(adapter), str(tmp_path / "out"), "--base", str(tiny_llama), "--target", "vllm")

    assert ended.code == 2
    assert "DoRA" in ended.err or "dora" in ended.err
    assert not (tmp_path / "out").exists()


def test_an_onnx_adapter_comes_with_its_graph(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", "dora")

    ended = run("export", str(adapter), str(tmp_path / "out"), "--base", str(tiny_llama), "--target", "onnx")

    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / "adapter.onnx_adapter").is_file()
