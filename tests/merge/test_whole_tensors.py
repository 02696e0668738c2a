"""Whole tensors that PEFT writes beside its factors: loaded and merged, they compute what they do in PEFT."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from graftline.adapters.attach import adapter_layers, attach, attachment_of
from graftline.adapters.peft_config import AdapterIdentity
from graftline.adapters.peft_format import AdapterWeights, load_adapter, save_adapter, write_weights
from graftline.errors import AdapterError, ExportError, MergeError
from graftline.export.gguf_adapter import export_adapter as export_gguf
from graftline.export.onnx_export import export_graph, graph_parameters
from graftline.export.onnx_session import GraphLayout
from graftline.merge.fold import merge_folder
from graftline.settings.model import Adapter
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from tests.tiny import make_tiny_llama
from tests.weights.families import IDS, edit_config, edit_tensors, make_family

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
LLAMA, GEMMA, GPT2 = "LlamaForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel"
LINEAR = {LLAMA: "q_proj", GEMMA: "q_proj", GPT2: "c_attn"}
EMBEDDING = {LLAMA: "embed_tokens", GEMMA: "embed_tokens", GPT2: "wte"}


def make_base(folder: Path, name: str, *, tied: bool) -> Path:
    """A base that is tied (or not) by its class where the class is, as folders on the hub are."""
    make_family(folder, name, tie_word_embeddings=tied)
    by_class = name in (GEMMA, GPT2)
    return edit_config(folder, remove=("tie_word_embeddings",)) if tied == by_class else folder


def make_adapter(base: Path, folder: Path, *, save: dict[str, object] | None = None, **settings: object) -> Tensor:
    """An adapter that PEFT wrote, and the logits that PEFT computes with it once it has read it again."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder, **save or {})
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return again(IDS).logits


FORMS = {
    "saved embedding": lambda e, q: {"target_modules": [q], "modules_to_save": [e]},
    "saved head": lambda e, q: {"target_modules": [q], "modules_to_save": ["lm_head"]},
    "both saved": lambda e, q: {"target_modules": [q], "modules_to_save": [e, "lm_head"]},
    "saved and kept tied": lambda e, q: {"target_modules": [q], "modules_to_save": [e], "ensure_weight_tying": True},
    "head saved and kept tied": lambda e, q: {
        "target_modules": [q], "modules_to_save": ["lm_head"], "ensure_weight_tying": True,
    },
    "embedding adapted": lambda e, q: {"target_modules": [q, e]},
    "head adapted": lambda e, q: {"target_modules": [q, "lm_head"]},
    "both adapted": lambda e, q: {"target_modules": [q, e, "lm_head"]},
    "adapted and kept tied": lambda e, q: {"target_modules": [q, e], "ensure_weight_tying": True},
    "written beside": lambda e, q: {"target_modules": [q], "save": {"save_embedding_layers": True}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "tied"), [(LLAMA, True), (LLAMA, False), (GEMMA, True), (GPT2, True)])
def test_a_file_of_peft_loads_and_merges_to_what_peft_computes(
    tmp_path: Path, name: str, tied: bool, form: str
) -> None:
    base = make_base(tmp_path / "base", name, tied=tied)
    expected = make_adapter(base, tmp_path / "adapter", **FORMS[form](EMBEDDING[name], LINEAR[name]))

    model = load_model(base)
    load_adapter(model, tmp_path / "adapter", base=read_identity(base))
    merge_folder(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)

    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(load_model(tmp_path / "merged")(IDS).logits, expected, rtol=0, atol=1e-4)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_copies_of_the_base_change_nothing_and_stand_in_nobodys_way(tmp_path: Path, tied: bool) -> None:
    base = make_tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    save = {"save_embedding_layers": True}
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], save=save)
    weights = AdapterWeights.open(tmp_path / "adapter")
    assert weights.beside == {"model.embed_tokens.weight", "lm_head.weight"}

    model = load_model(base)
    load_adapter(model, tmp_path / "adapter", base=read_identity(base))
    report = merge_folder(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    export_graph(base, tmp_path / "graph")

    assert attachment_of(model).saved_modules == ()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not report.untied
    assert graph_parameters(weights, GraphLayout.read(tmp_path / "graph"), base)
    assert export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", base=base) == 2


def test_an_embedding_that_was_trained_and_is_not_announced_is_taken_as_peft_takes_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LLAMA, tied=False)
    save = {"save_embedding_layers": True}
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], save=save)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.weight"] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    model = load_model(base)
    load_adapter(model, tmp_path / "adapter", base=read_identity(base))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-4)
    with pytest.raises(ExportError, match="no modules_to_save"):
        export_gguf(tmp_path / "adapter", tmp_path / "a.gguf", base=base)
    # Read and written again it is the same adapter.
    write_weights(AdapterWeights.open(tmp_path / "adapter"), tmp_path / "again")
    again = load_model(base)
    load_adapter(again, tmp_path / "again", base=read_identity(base))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_resized_vocabulary_is_refused_with_what_to_do_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LLAMA, tied=True)
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(100)
    model = peft.get_peft_model(grown, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")  # PEFT sees the other size itself, and writes both
    ours = load_model(base)
    with pytest.raises(AdapterError, match=r"\(100, 32\), the base's has \(96, 32\).*resize_token_embeddings"):
        load_adapter(ours, tmp_path / "adapter", base=read_identity(base))
    assert not adapter_layers(ours)
    with pytest.raises(AdapterError, match="resize_token_embeddings"):
        merge_folder(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)


def test_a_saved_module_of_another_size_is_not_merged(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LLAMA, tied=False)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(90, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"lm_head\.weight has shape \(90, 32\) in the adapter and \(96, 32\)"):
        merge_folder(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("given", [{"embed_tokens": [1, 2]}, [1, 2]])
def test_trained_token_rows_are_refused_with_what_to_do(tmp_path: Path, given: object) -> None:
    base = make_base(tmp_path / "base", LLAMA, tied=True)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=given)
    with pytest.raises(AdapterError, match=r"uses trainable_token_indices.*merge_and_unload"):
        AdapterWeights.open(tmp_path / "adapter")


def test_dora_on_a_scaled_embedding_is_refused_for_peft_itself_gives_two_answers(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", GEMMA, tied=True)
    unmerged = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], use_dora=True)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        assert (model.merge_and_unload().eval()(IDS).logits - unmerged).abs().max() > 0.01
    with pytest.raises(AdapterError, match=r"embed_tokens is a GemmaTextScaledWordEmbedding.*defined in two ways"):
        load_adapter(load_model(base), tmp_path / "adapter", base=read_identity(base))
    with pytest.raises(MergeError, match="scales its embedding, and DoRA on it is defined in two ways"):
        merge_folder(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)


@pytest.mark.parametrize("stored_twice", [True, False])
def test_full_fine_tuning_of_a_tied_base_stays_tied_however_the_base_was_stored(
    tmp_path: Path, stored_twice: bool
) -> None:
    """A head that was stored beside the embedding must not keep the values from before the training."""
    base = make_base(tmp_path / "base", LLAMA, tied=True)
    if stored_twice:
        edit_tensors(base, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    model = load_model(base)
    attach(model, Adapter(method="full"), seed=0)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.3 * torch.randn(96, 32, generator=torch.Generator().manual_seed(0)))
        expected = model(IDS).logits
    save_adapter(model, tmp_path / "adapter", identity=AdapterIdentity(base_digest=read_identity(base).digest))
    report = merge_folder(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert not report.untied
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "merged")(IDS).logits, expected)


def test_tensors_that_nothing_announces_stay_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LLAMA, tied=True)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.norm.weight"] = torch.zeros(32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="announces neither as a target nor"):
        AdapterWeights.open(tmp_path / "adapter")
