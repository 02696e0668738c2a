"""Folders that transformers loads and that are spelt otherwise than it writes them itself."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.errors import CheckpointError
from graftline.export.onnx_export import export_graph, logit_difference
from graftline.export.onnx_session import GraphSession
from graftline.weights.importing import import_base
from graftline.weights.model_folder import ModelReader
from graftline.weights.quant.folder import DequantizingReader
from graftline.weights.quant.linear import load_model
from tests.tiny import make_tokenizer
from tests.weights.families import FAMILIES, IDS, edit_tensors, logits, make_family, split, write_index

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rotary_buffers(folder: Path) -> None:
    old = {
        f"model.layers.{i}.self_attn.rotary_emb.{name}": torch.ones(4)
        for i in range(2)
        for name in ("inv_freq", "cos_cached")
    }
    edit_tensors(folder, lambda tensors: tensors | old)


def rotary_buffer_in_the_index(folder: Path) -> None:
    weight_map = split(folder)
    write_index(folder, weight_map | {"model.rotary_emb.inv_freq": "model-00001-of-00002.safetensors"})


def head_only(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors | {HEAD: tensors.pop(EMBEDDING)})


def head_and_embedding(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors | {HEAD: tensors[EMBEDDING]})


def head_of_other_values(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors | {HEAD: 2 * tensors[EMBEDDING].flip(0)})


def tied_head_in_the_index(folder: Path) -> None:
    weight_map = split(folder)
    write_index(folder, weight_map | {HEAD: "model-00002-of-00002.safetensors"}, metadata={"total_size": 1})


def head_only_in_shards(folder: Path) -> None:
    head_only(folder)
    write_index(folder, split(folder))


def unlisted_tensors(folder: Path) -> None:
    weight_map = split(folder, **{"v_head.weight": torch.ones(2)})
    write_index(folder, {name: shard for name, shard in weight_map.items() if "layernorm" not in name})


def a_tensor_in_both_shards(folder: Path) -> None:
    """The same values: which of two different ones transformers takes is an accident."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = split(folder, **{EMBEDDING: tensors[EMBEDDING]})
    write_index(folder, weight_map)


def a_single_file_beside_an_index(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "keep")
    weight_map = split(folder, **{"model.norm.weight": torch.zeros(32)})
    write_index(folder, weight_map)
    (folder / "keep").rename(folder / "model.safetensors")


def parts_that_the_class_lacks(folder: Path) -> None:
    more = {"v_head.summary.weight": torch.ones(1, 32), "vision_tower.patch.weight": torch.ones(3)}
    edit_tensors(folder, lambda tensors: tensors | more)


def without_prefix(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {name.partition(".")[2]: tensor for name, tensor in tensors.items()})


FORMS = [
    rotary_buffers, rotary_buffer_in_the_index, head_only, head_and_embedding, head_of_other_values,
    tied_head_in_the_index, head_only_in_shards, unlisted_tensors, a_tensor_in_both_shards,
    a_single_file_beside_an_index, parts_that_the_class_lacks, without_prefix,
]  # fmt: skip


@pytest.mark.parametrize("change", FORMS)
def test_a_folder_of_another_form_computes_what_it_does_in_transformers(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = make_family(tmp_path / "m", "LlamaForCausalLM", tie_word_embeddings=True, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16, vocab_size=512)  # fmt: skip
    make_tokenizer(folder)
    change(folder)
    expected = logits(folder)

    import_base(folder, tmp_path / "imported", dtype=torch.float32)

    with torch.no_grad():
        assert torch.equal(load_model(folder)(IDS).logits, expected)
        assert torch.equal(load_model(tmp_path / "imported")(IDS).logits, expected)
    torch.testing.assert_close(logits(tmp_path / "imported"), expected, rtol=0, atol=1e-5)
    export_graph(folder, tmp_path / "graph")
    assert logit_difference(GraphSession(tmp_path / "graph"), load_model(folder), list(range(4, 24))) < 1e-3


def test_an_index_needs_no_metadata(tmp_path: Path) -> None:
    """transformers 5.23 wants the key, and reads nothing in it."""
    folder = make_family(tmp_path / "m", "LlamaForCausalLM")
    expected = logits(folder)
    index = folder / "model.safetensors.index.json"
    write_index(folder, split(folder))
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text(encoding="utf-8"))["weight_map"]}))
    with torch.no_grad():
        assert torch.equal(load_model(folder)(IDS).logits, expected)


def old_gpt2(folder: Path) -> None:
    """As the first GPT-2 on the hub: no prefix, and the causal masks of every block among the weights."""
    masks = {
        f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 4, 4) for i in range(2) for name in ("bias", "masked_bias")
    }
    edit_tensors(
        folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in (tensors | masks).items()}
    )


def test_the_first_gpt2_is_imported_with_its_biases_and_without_its_masks(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "m", "GPT2LMHeadModel")
    expected = logits(folder)
    old_gpt2(folder)

    import_base(folder, tmp_path / "imported", dtype=torch.float32)

    names = ModelReader(tmp_path / "imported").names()
    assert "transformer.h.0.attn.c_attn.bias" in names
    assert not [name for name in names if name.endswith((".attn.bias", ".attn.masked_bias"))]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "imported")(IDS).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_imported_as_it_is(tmp_path: Path, name: str) -> None:
    folder = make_family(tmp_path / "m", name)
    import_base(folder, tmp_path / "imported", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "imported")(IDS).logits, logits(folder))


def test_what_is_left_out_beside_the_model_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_family(tmp_path / "m", "LlamaForCausalLM")
    parts_that_the_class_lacks(folder)
    with caplog.at_level(logging.WARNING):
        ModelReader(folder)
    assert "2 tensors are left out, LlamaForCausalLM does not have them: v_head.summary.weight" in caplog.text


def test_two_tensors_where_the_class_ties_are_two_in_the_imported_folder_too(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "m", "GemmaForCausalLM")
    head_of_other_values(folder)
    import_base(folder, tmp_path / "imported", dtype=torch.float32)
    assert DequantizingReader(tmp_path / "imported").config.tie_word_embeddings is False
    assert torch.equal(logits(tmp_path / "imported"), logits(folder))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_reader_is_the_embedding_where_they_are_tied(tmp_path: Path, tied: bool) -> None:
    folder = make_family(tmp_path / "m", "LlamaForCausalLM", tie_word_embeddings=tied)
    reader = DequantizingReader(folder)
    head, embedding = reader.find(HEAD), reader.find(EMBEDDING)
    assert head is not None
    assert embedding is not None
    assert torch.equal(head, embedding) == tied
    assert reader.find("model.nothing") is None


def lacks(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up" not in n})


def lacks_what_the_index_names(folder: Path) -> None:
    weight_map = split(folder)
    gone = "model.layers.1.mlp.up_proj.weight"
    shard = folder / weight_map[gone]
    save_file({n: t for n, t in load_file(shard).items() if n != gone}, shard, metadata={"format": "pt"})
    write_index(folder, weight_map)


def lacks_its_head(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if n != HEAD})


def has_a_layer_more(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors | {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)})


def has_a_bias_more(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors | {"model.layers.1.mlp.up_proj.bias": torch.ones(48)})


def has_another_width(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors | {"model.norm.weight": torch.ones(31)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacks, r"lacks 1 tensors of LlamaForCausalLM, for example 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (lacks_what_the_index_names, r"index\.json names 'model\.layers\.1\.mlp\.up_proj\.weight' in model-0000\d-of"),
        (lacks_its_head, r"lacks 1 tensors of LlamaForCausalLM, for example 'lm_head\.weight'"),
        (has_a_layer_more, r"'model\.layers\.2\.mlp\.up_proj\.weight' has no place.*num_hidden_layers"),
        (has_a_bias_more, r"'model\.layers\.1\.mlp\.up_proj\.bias' is not a parameter.*a setting of config\.json"),
        (has_another_width, r"'model\.norm\.weight' has shape \(31,\), config\.json asks for \(32,\)"),
    ],
)
def test_a_folder_that_is_not_the_model_is_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = make_family(tmp_path / "m", "LlamaForCausalLM", tie_word_embeddings=False)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        import_base(folder, tmp_path / "imported", dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
