"""Configurations of well-known models: sizes only, as in their config.json."""

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config


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


MODELS: dict[str, PretrainedConfig] = {
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
