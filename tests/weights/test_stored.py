"""Weights that stay 16-bit in memory, in fp32 arithmetic; and logits that are computed a chunk at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from graftline.adapters.peft_format import AdapterWeights, put_on_model
from graftline.weights import head
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import QuantLinear, load_model
from graftline.weights.stored import StoredEmbedding, StoredLinear, arithmetic_of
from studies.models import make_adapter
from tests.sections import quantize_section

IDS = torch.arange(4, 36).view(2, 16)


@pytest.fixture(scope="module")
def bf16_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "base"
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(folder)
    for file in (*tiny_llama.glob("tokenizer*"), *tiny_llama.glob("chat_template*")):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def held_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.parameters())


@torch.no_grad()
def test_a_kept_bf16_model_gives_the_bytes_of_fp32_in_half_the_memory(bf16_llama: Path) -> None:
    exact, kept = load_model(bf16_llama), load_model(bf16_llama, keep=True)
    assert torch.equal(kept(IDS).logits, exact(IDS).logits)
    assert kept(IDS).logits.dtype == torch.float32
    assert held_bytes(kept) < 0.51 * held_bytes(exact)
    assert (arithmetic_of(kept), arithmetic_of(exact)) == (torch.float32, torch.float32)
    assert arithmetic_of(load_model(bf16_llama, dtype=torch.bfloat16)) == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "vera", "houlsby"])
def test_an_adapter_on_a_kept_model_computes_what_it_does_on_an_fp32_one(
    bf16_llama: Path, tmp_path: Path, method: str
) -> None:
    folder = make_adapter(bf16_llama, tmp_path / "adapter", method=method, rank=4)
    exact, kept = load_model(bf16_llama), load_model(bf16_llama, keep=True)
    for model in (exact, kept):
        put_on_model(model, AdapterWeights.open(folder))
        model.eval()
    assert torch.equal(kept(IDS).logits, exact(IDS).logits)


def test_quantized_and_fp32_weights_stay_what_they_are(tiny_llama: Path, bf16_llama: Path, tmp_path: Path) -> None:
    quantize_folder(bf16_llama, tmp_path / "nf4", quantize=quantize_section())
    model = load_model(tmp_path / "nf4", keep=True)
    kinds = {type(layer) for layer in model.modules()}
    assert {QuantLinear, StoredEmbedding, StoredLinear} <= kinds  # the head is dense
    assert not any(isinstance(layer, StoredLinear) for layer in load_model(tiny_llama, keep=True).modules())


def test_a_wide_head_is_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.weights.stored._PIECE", 24)
    layer = StoredLinear(8, 10, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 8)
    expected = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


SIZES: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CAPPED = Gemma2Config(
    **SIZES, hidden_size=16, intermediate_size=16, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05
)
CASES = {
    "logits that are capped": lambda: Gemma2ForCausalLM(CAPPED),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=1, n_head=2, n_embd=16, n_positions=64)),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CASES)
def test_chunks_of_logits_are_what_the_model_computes_of_all_positions(kind: str) -> None:
    model: PreTrainedModel = CASES[kind]().eval()
    hidden_NH = head.hidden_states(model, input_ids=IDS).flatten(0, 1)
    chunk_bytes = 4 * 64 * 5  # five positions
    parts = list(head.logits_of(model, hidden_NH, chunk_bytes=chunk_bytes))
    assert [(first, len(part)) for first, part in parts] == [*[(at, 5) for at in range(0, 30, 5)], (30, 2)]
    torch.testing.assert_close(torch.cat([part for _, part in parts]), model(IDS).logits.flatten(0, 1))
    alone = head.without_decoder(model)
    again = torch.cat([part for _, part in head.logits_of(alone, hidden_NH, chunk_bytes=chunk_bytes)])
    torch.testing.assert_close(again, model(IDS).logits.flatten(0, 1))
    assert sum(p.numel() for p in alone.parameters()) == 64 * 16


@torch.no_grad()
def test_logits_of_a_16_bit_model_are_computed_in_fp32(bf16_llama: Path) -> None:
    model = load_model(bf16_llama, dtype=torch.bfloat16)
    hidden_NH = head.hidden_states(model, input_ids=IDS).flatten(0, 1)
    ((_, logits_NV),) = head.logits_of(model, hidden_NH)
    assert logits_NV.dtype == torch.float32
    assert torch.equal(logits_NV, hidden_NH.float() @ model.lm_head.weight.float().T)
    assert type(model.lm_head) is torch.nn.Linear  # as it was
