"""Tiny real models made by code, so that unit tests load no weights from anywhere."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def tiny_llama_config(**changes: object) -> LlamaConfig:
    """About 160 k parameters, grouped-query attention (4 heads, 2 key-value heads), tied embeddings."""
    settings: dict[str, object] = {
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


def make_tiny_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A random tiny Llama with its tokenizer, saved as a model folder."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(**changes)).to(dtype)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder
