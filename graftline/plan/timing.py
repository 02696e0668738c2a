"""How long a micro-batch will take, from the step's own code on a model of one and of two blocks with made-up weights.

The difference of the two is a block; what is left of the first is embedding, head and loss. The model has at most 4,096
words and the micro-batch at most 512 tokens: both parts are then continued linearly to the real number of blocks,
words and tokens. Attention over long rows grows faster than that, so their time is estimated too low.
"""

import copy
import time
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from graftline.adapters.attach import attach
from graftline.plan.memory import Workload, untrained
from graftline.plan.trace import StepShape, block_linears, empty_batch
from graftline.settings.model import Adapter
from graftline.train.loss import SupervisedLoss
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear

_MOST_WORDS, _MOST_TOKENS = 4096, 512
_AT_MOST_SECONDS = 0.5
"""Time after which a step is not repeated any more; the fastest counts."""
_STAND_IN = LlamaConfig(
    vocab_size=_MOST_WORDS,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=8,
    tie_word_embeddings=True,
)


def measure_micro_batch(config: PretrainedConfig, workload: Workload, *, limit_bytes: float) -> float | None:
    """Seconds of one micro-batch, forward and backward, on this device now, with as many threads as torch has here.

    Returns:
        None where two blocks alone need more than ``limit_bytes``.
    """
    shape, text = workload.shape, config.get_text_config()
    words = min(text.vocab_size, _MOST_WORDS)
    small = _small_shape(shape)
    if 8.0 * _block_parameters(config, words) > limit_bytes:  # two blocks in fp32, before one is quantized
        return None
    one, two = (_best_seconds(_small_config(config, blocks, words), workload, small) for blocks in (1, 2))
    seconds = continue_to(text.num_hidden_layers, one, two, words=text.vocab_size / words)
    return seconds * (shape.rows * shape.tokens) / (small.rows * small.tokens)


def stand_in_micro_batch(config: PretrainedConfig, workload: Workload, *, limit_bytes: float) -> float | None:
    """Seconds of one micro-batch by the relation of multiplications to those of a small Llama, which is measured.

    For a base of which not even two blocks can be tried here. Matrices of another size run at another speed, so this is
    a rough figure; docs/training.md says how rough.

    Returns:
        None where not even the small Llama fits into ``limit_bytes``.
    """
    adapter = workload.adapter
    rank = min(adapter.rank, _STAND_IN.hidden_size // 2)
    general = Adapter(method=adapter.method, rank=rank, alpha=adapter.alpha, dropout=adapter.dropout)
    seconds = measure_micro_batch(_STAND_IN, replace(workload, adapter=general), limit_bytes=limit_bytes)
    return seconds and seconds * _products(config, workload.shape) / _products(_STAND_IN, workload.shape)


def _products(config: PretrainedConfig, shape: StepShape) -> float:
    """Multiplications of one pass: each token with the blocks' linear layers, each supervised one with the head."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    blocks = sum(layer.weight.numel() for layer in block_linears(model).values())
    head = model.get_output_embeddings().weight.numel()
    return float(blocks * shape.rows * shape.tokens + head * shape.supervised_tokens)


def continue_to(blocks: int, one: float, two: float, *, words: float) -> float:
    """Seconds with so many blocks and ``words`` times the vocabulary, from those with one and with two blocks."""
    block = min(one, max(0.0, two - one))
    return blocks * block + (one - block) * words


def _small_shape(shape: StepShape) -> StepShape:
    tokens = min(shape.tokens, _MOST_TOKENS)
    rows = max(1, min(shape.rows, _MOST_TOKENS // tokens))
    share = rows * tokens / (shape.rows * shape.tokens)
    supervised = min(rows * tokens, max(1, round(shape.supervised_tokens * share)))
    # Without the prefix: what it saves depends on the micro-batch, and one pass over the rows is the upper limit.
    return replace(shape, rows=rows, tokens=tokens, supervised_tokens=supervised, prefix_tokens=0)


def _small_config(config: PretrainedConfig, blocks: int, words: int) -> PretrainedConfig:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = blocks, words, None
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:blocks]
    return small


def _block_parameters(config: PretrainedConfig, words: int) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_small_config(config, 1, words))
    return sum(parameter.numel() for parameter in model.parameters())


def _best_seconds(config: PretrainedConfig, workload: Workload, shape: StepShape) -> float:
    model = _made_up(config, workload)
    loss, batch = SupervisedLoss(model), empty_batch(shape, device=workload.device)
    autocast = torch.autocast(workload.device, shape.dtype, enabled=shape.dtype != torch.float32)
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < _AT_MOST_SECONDS:
        started = time.perf_counter()
        with autocast:
            value = loss(batch, num_supervised=torch.tensor(1, device=workload.device))
        value.backward()
        value.item()  # waits for a CUDA device
        best = min(best, time.perf_counter() - started)
    return best


def _made_up(config: PretrainedConfig, workload: Workload) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=workload.shape.dtype)
    model.to_empty(device=workload.device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)  # what memory happens to hold may be no number, and slow
    if workload.quantization is not None:
        for name, layer in block_linears(model).items():
            quantized = quantize(layer.weight.detach().float(), workload.quantization)
            model.set_submodule(name, QuantLinear(quantized, layer.bias))
    attach(model, untrained(workload.adapter), seed=0)
    model.train()
    if workload.shape.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model
