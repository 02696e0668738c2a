"""Models for the export tests."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from graftline.export.onnx_export import export_graph
from tests.tiny import make_tiny_llama, make_tokenizer


def make_tiny_qwen2(folder: Path, *, seed: int = 0) -> Path:
    """A random tiny Qwen2: biases on q, k and v that are not zero, a head of its own, three heads a key-value head."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        use_sliding_window=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds of base that the graph supports. Read-only."""
    make = {"llama": make_tiny_llama, "qwen2": make_tiny_qwen2}[request.param]
    return make(tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="session")
def graph(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The serving graph of ``base``. Read-only."""
    folder = tmp_path_factory.mktemp("graph") / "graph"
    export_graph(base, folder)
    return folder
