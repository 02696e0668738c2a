"""Models and adapters made by code: tiny ones for tests and --quick, random large ones, cut ones, known ones."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.peft_config import AdapterIdentity
from graftline.adapters.peft_format import save_adapter
from graftline.data.template import template_digest
from graftline.digest import write_json
from graftline.settings.model import Adapter, MethodName
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.low_rank import factors_digest, read_factors
from graftline.weights.reader import CheckpointReader, read_architecture, read_json_object
from graftline.weights.writer import CheckpointWriter, copy_sidecars

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = [
    "Definition: a small animal that lives in water\nCategory: animal",
    "Definition: a tall plant with green leaves\nCategory: plant",
    "Definition: a person who writes software for a living\nCategory: person",
    "user assistant system the quick brown fox jumps over the lazy dog 0123456789",
]


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 512 tokens with ChatML's special tokens, saved to ``folder``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    core.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|pad|>",
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    """About 160 k parameters, grouped-query attention (4 heads, 2 key-value heads), tied embeddings."""
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return LlamaConfig(**(settings | changes))


def make_tiny_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random tiny Llama with its tokenizer, saved as a model folder."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(tiny_llama_config(**changes))
    model.to(dtype)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_adapter(
    base: Path,
    folder: Path,
    method: MethodName = "lora",
    *,
    rank: int = 16,
    seed: int = 0,
    scale: float = 0.02,
    template: str = "tokenizer",
) -> Path:
    """An adapter of rank (or width) ``rank`` on every linear layer; its values differ by ``scale`` from their start."""
    model, identity = load_model(base), read_identity(base)
    initial = read_factors(base) if identity.pair else None
    attach(model, Adapter(method=method, rank=rank, alpha=float(rank)), seed=seed, initial=initial)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    made_for = AdapterIdentity(
        base_digest=identity.digest,
        quantizer=identity.quantizer,
        template_digest=template_digest(load_tokenizer(base), template),
        initial_digest=factors_digest(base) if identity.pair else None,
    )
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(model, folder, identity=made_for)
    return folder


def first_blocks(model: Path, folder: Path, count: int) -> Path:
    """The model without its later blocks, made where it is not there yet."""
    if folder.exists():
        return folder
    reader, architecture = CheckpointReader(model), read_architecture(model)
    with CheckpointWriter(folder) as writer:
        for name in reader.names():
            if (architecture.block_of(name) or 0) < count:
                writer.add(name, reader.read(name))
        copy_sidecars(model, writer.stage)
        config = read_json_object(model / "config.json")
        layers = {"layer_types": config["layer_types"][:count]} if config.get("layer_types") else {}
        write_json(writer.stage / "config.json", config | layers | {"num_hidden_layers": count})
        writer.finish()
    return folder


LARGE = {"hidden": 3072, "intermediate": 8192, "vocabulary": 128_256, "blocks": 28}
"""3.2 billion parameters."""
SMALL = {"hidden": 96, "intermediate": 256, "vocabulary": 512, "blocks": 4}


def make_random(folder: Path, *, hidden: int, intermediate: int, vocabulary: int, blocks: int) -> Path:
    """A Llama of random bf16 weights in shards of 1 GB, written one tensor at a time."""
    with CheckpointWriter(folder, max_shard_bytes=10**9) as writer:
        for name, tensor in _random_tensors(hidden, intermediate, vocabulary, blocks):
            writer.add(name, tensor)
        config = _llama(hidden, intermediate, blocks, 24, 8, vocabulary)
        about = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "dtype": "bfloat16"}
        write_json(writer.stage / "config.json", config.to_dict() | about)
        writer.finish()
    return folder


def _random_tensors(hidden: int, inner: int, vocabulary: int, blocks: int) -> Iterator[tuple[str, Tensor]]:
    """The blocks share one random draw, scaled differently: drawing 3 billion numbers would take most of the time."""
    key_value = hidden // 3
    heads = {"q": hidden, "k": key_value, "v": key_value, "o": hidden}
    shapes = {f"self_attn.{name}_proj": (rows, hidden) for name, rows in heads.items()}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    draw = (torch.randn(inner * hidden, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    embeddings = draw.repeat(vocabulary * hidden // draw.numel() + 1)[: vocabulary * hidden]
    yield "model.embed_tokens.weight", embeddings.view(-1, hidden)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    for block in range(blocks):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{block}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16)
        for name, shape in shapes.items():
            yield f"model.layers.{block}.{name}.weight", (draw[: shape[0] * shape[1]] * (1 + block / 64)).view(shape)


def _llama(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=1 << 19,
        tie_word_embeddings=False,
    )


KNOWN: dict[str, PretrainedConfig] = {
    "Llama 2 7B": _llama(4096, 11008, 32, 32, 32, 32000),
    "Llama 2 13B": _llama(5120, 13824, 40, 40, 40, 32000),
    "Qwen2.5 32B": Qwen2Config(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Llama 2 70B": _llama(8192, 28672, 80, 64, 8, 32000),
    "Llama 3.1 8B": _llama(4096, 14336, 32, 32, 8, 128256),
    "Llama 3.1 70B": _llama(8192, 28672, 80, 64, 8, 128256),
    "Llama 3.1 405B": _llama(16384, 53248, 126, 128, 8, 128256),
}
"""Sizes of well-known models, as in their config.json."""
