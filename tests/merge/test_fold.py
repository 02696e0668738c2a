"""The streamed merge against peft's, on every shape of trouble: ties, base mix-ups, damage, interruption."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.peft_config import AdapterIdentity, write_identity
from graftline.errors import BaseMismatchError, MergeError, NumberTypeError
from graftline.merge.fold import merge_folder
from graftline.weights.identity import read_identity
from tests.tiny import make_tiny_llama

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def peft_adapter(base: Path, folder: Path, config: peft.PeftConfig) -> PreTrainedModel:
    """An adapter with random factors in ``folder``, and the peft model it was saved from."""
    torch.manual_seed(3)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def lora(**settings: object) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"} | settings
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def belongs_to(adapter: Path, base: Path, method: str = "lora") -> None:
    write_identity(adapter, AdapterIdentity(base_digest=read_identity(base).digest), method=method)


@pytest.mark.parametrize(
    ("settings", "dtype", "tolerance"),
    [
        ({}, torch.float32, 1e-5),
        ({"use_rslora": True}, torch.float32, 1e-5),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 1}}, torch.float32, 1e-5),
        ({}, torch.bfloat16, 0.02),
        ({}, torch.float16, 0.003),
    ],
)
def test_merged_logits_equal_pefts(
    settings: dict[str, object], dtype: torch.dtype, tolerance: float, tiny_llama: Path, tmp_path: Path
) -> None:
    unmerged = peft_adapter(tiny_llama, tmp_path / "adapter", lora(**settings))
    report = merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=tolerance, rtol=0)
    assert report.num_folded == 14
    assert report.base_choice == "dense"
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}


def test_the_sum_is_rounded_once(tiny_llama: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora())
    merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "exact", dtype=torch.float32)
    merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "rounded", dtype=torch.bfloat16)
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "rounded" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16()), name


def test_transformers_loads_the_folder_with_its_tokenizer_and_type(tiny_llama: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora())
    report = merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"} <= names
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert read_identity(tmp_path / "merged").digest == report.digest
    assert report.base_digest == read_identity(tiny_llama).digest


def test_adapting_the_head_of_a_tied_model_leaves_the_embedding_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    unmerged = peft_adapter(tiny_llama, tmp_path / "adapter", lora(target_modules=["lm_head", "q_proj"]))
    report = merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert report.untied
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tiny_llama / "model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(weights["lm_head.weight"], base["model.embed_tokens.weight"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-5, rtol=0)


def test_adapting_the_embedding_of_a_tied_model_leaves_the_head_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    unmerged = peft_adapter(tiny_llama, tmp_path / "adapter", lora(target_modules=["embed_tokens"]))
    merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tiny_llama / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], base["model.embed_tokens.weight"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-5, rtol=0)


def test_a_tied_model_without_an_adapted_head_stays_tied(tiny_llama: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora())
    report = merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert not report.untied
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_modules_trained_whole_replace_the_bases(tiny_llama: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora(modules_to_save=["norm"]))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved["base_model.model.model.norm.weight"] += 1
    save_file(saved, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(weights["model.norm.weight"], saved["base_model.model.model.norm.weight"])


def test_an_adapter_of_another_base_is_refused_and_both_digests_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=1)
    peft_adapter(other, tmp_path / "adapter", lora())
    belongs_to(tmp_path / "adapter", other)
    with pytest.raises(BaseMismatchError) as caught:
        merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert str(read_identity(other).digest) in str(caught.value)
    assert str(read_identity(tiny_llama).digest) in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_deeper_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    deeper = make_tiny_llama(tmp_path / "deeper", num_hidden_layers=3)
    peft_adapter(deeper, tmp_path / "adapter", lora())
    with pytest.raises(MergeError, match=r"no tensor model\.layers\.2\."):
        merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)


def test_a_weight_that_overflows_fp16_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora(lora_alpha=4e6))
    with pytest.raises(NumberTypeError, match=r"which float16 cannot hold \(at most 6\.55e\+04\); choose bfloat16 or"):
        merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_with_nan_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    peft_adapter(tiny_llama, tmp_path / "adapter", lora())
    with pytest.raises(MergeError, match=r"model\.norm\.weight has values that are not finite"):
        merge_folder(broken, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)


def test_an_existing_folder_is_not_overwritten(tiny_llama: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora())
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(MergeError, match="exists"):
        merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_an_integer_type_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="float32, float16, bfloat16"):
        merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.int8)


@pytest.mark.parametrize("stop_after", [1, 5, 9, 13, 17, 20])
def test_an_interrupted_merge_leaves_nothing_and_the_next_one_is_whole(
    stop_after: int, tiny_llama: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora())

    def interrupt(done: int, total: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32, on_progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    merge_folder(tiny_llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_progress_counts_every_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_llama, tmp_path / "adapter", lora())
    seen: list[tuple[int, int]] = []
    report = merge_folder(
        tiny_llama,
        tmp_path / "adapter",
        tmp_path / "merged",
        dtype=torch.float32,
        on_progress=lambda *at: seen.append(at),
    )
    assert seen == [(done, report.num_tensors) for done in range(1, report.num_tensors + 1)]
