import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftline.adapters.base import embedding_scale
from graftline.errors import CheckpointError
from graftline.weights.reader import ARCHITECTURES, read_architecture

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_the_class_in_transformers(name: str) -> None:
    arch, model_class = ARCHITECTURES[name], getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**SMALL))
    kind = Conv1D if arch.conv1d else nn.Linear
    inside = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kind) and n != arch.head}
    assert inside == {n for n, _ in model.named_parameters() if arch.is_linear_weight(n)}
    assert {arch.block_of(n) for n in inside} == {0, 1}
    assert isinstance(model.get_submodule(arch.embedding), nn.Embedding)
    assert arch.scales_embedding == (embedding_scale(model.get_submodule(arch.embedding)) is not None)
    assert model.get_submodule(arch.head).weight.shape == (64, 32)
    assert not arch.is_linear_weight(f"{arch.head}.weight")
    assert not arch.is_linear_weight(f"{arch.embedding}.weight")


def test_architecture_of_a_folder_is_read(tiny_llama: Path) -> None:
    assert read_architecture(tiny_llama).name == "LlamaForCausalLM"


@pytest.mark.parametrize("given", [None, [], ["MambaForCausalLM"], ["LlamaForCausalLM", "X"], "LlamaForCausalLM", [1]])
def test_unknown_architecture_is_refused_and_the_known_ones_are_listed(tmp_path: Path, given: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": given}))
    with pytest.raises(CheckpointError, match=r"exactly one of .*LlamaForCausalLM"):
        read_architecture(tmp_path)
