"""Layouts that save work, and the proof on the model itself that they change nothing.

Packed: several rows in one sequence, kept apart by their positions (graftline.train.packing).

Behind a shared prefix: what all rows of a micro-batch begin with (a system prompt, an instruction) runs once, and the
rows attend to its keys and values. The gradient through them is the sum over the rows: the same as when each row has
its own copy.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from graftline.data.template import Encoded
from graftline.train.batches import MicroBatch, pad_rows
from graftline.train.packing import attention_arguments

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of hidden states, relative to the largest of them."""


def hidden_states(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Last hidden states (B, T, H) of the decoder's body for a micro-batch in any layout."""
    ids_BT = batch["input_ids"]
    if "prefix_ids" not in batch:
        apart: dict[str, Tensor | int] = {}
        if "position_ids" in batch:
            apart = attention_arguments(batch["position_ids"], implementation=model.config._attn_implementation)
        return model.base_model(input_ids=ids_BT, use_cache=False, **apart).last_hidden_state
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=batch["prefix_ids"], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(ids_BT))
    return model.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=True).last_hidden_state


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether rows behind a shared prefix have the hidden states that they have alone."""
    try:
        return _difference(model, pad_rows(_probes(model), shared_prefix=_PREFIX)) is None
    except (TypeError, ValueError, AttributeError):
        return False  # an architecture without a cache of keys and values


_PREFIX, _LENGTHS = 5, (12, 6, 17)


def _probes(model: PreTrainedModel) -> list[Encoded]:
    """Three rows of random tokens, the first five equal."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist()
    prefix = ids[:_PREFIX]
    starts = [sum(_LENGTHS[:at]) for at in range(len(_LENGTHS))]
    rows = [prefix + ids[start + _PREFIX : start + length] for start, length in zip(starts, _LENGTHS, strict=True)]
    return [Encoded(row, [at > _PREFIX for at in range(len(row))]) for row in rows]


@torch.no_grad()
def _difference(model: PreTrainedModel, batch: MicroBatch) -> float | None:
    """Relative difference at the predicting positions between ``batch`` and each probe alone; None if tolerable."""
    probes = _probes(model)
    was_training = model.training
    model.eval()
    together_NH = _predicting(model, batch)
    apart_NH = torch.cat([_predicting(model, pad_rows([probe])) for probe in probes])
    model.train(was_training)
    difference = float((together_NH.float() - apart_NH.float()).abs().max() / apart_NH.float().abs().max())
    return None if difference < _TOLERANCE.get(together_NH.dtype, 0.0) else difference


def _predicting(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    device = next(model.parameters()).device
    on_device: MicroBatch = {name: tensor.to(device) for name, tensor in batch.items()}  # type: ignore[assignment,attr-defined]
    return hidden_states(model, on_device).flatten(0, 1)[on_device["predict_at"]]
