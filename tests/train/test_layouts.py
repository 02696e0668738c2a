from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.data.template import Encoded
from graftline.train.batches import MicroBatch, can_share_prefix, pack_rows, pad_rows, shared_prefix
from graftline.train.loss import SupervisedLoss
from tests.train.rows import lora_model, make_rows

_PREFIX = [7, 9, 11, 13, 15, 17, 19, 21, 23, 25]
_ROWS = [Encoded(_PREFIX + row.input_ids, [False] * len(_PREFIX) + row.supervised) for row in make_rows(5)]
_LAYOUTS = {"packed": pack_rows(_ROWS), "behind a shared prefix": pad_rows(_ROWS, shared_prefix=len(_PREFIX))}


def _attend(folder: Path, implementation: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)


def _loss_and_gradients(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = SupervisedLoss(model)(batch, num_supervised=torch.tensor(len(batch["targets"])))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("batch", _LAYOUTS.values(), ids=_LAYOUTS.keys())
def test_loss_and_gradients_are_those_of_padded_rows(tiny_llama: Path, batch: MicroBatch) -> None:
    model = lora_model(tiny_llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    expected, wanted = _loss_and_gradients(model, pad_rows(_ROWS))
    actual, found = _loss_and_gradients(model, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_model_whose_cache_loses_keys_does_not_share_prefixes(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _attend(tiny_llama, "sdpa")
    assert can_share_prefix(model)
    monkeypatch.setattr("transformers.DynamicCache.batch_repeat_interleave", lambda cache, repeats: cache.reset())
    assert not can_share_prefix(model)


def test_the_shared_prefix_ends_before_a_token_that_predicts() -> None:
    assert shared_prefix(_ROWS) == len(_PREFIX)
    early = Encoded([*_PREFIX, 5], [False] * 4 + [True] * 7)
    assert shared_prefix([*_ROWS, early]) == 3  # token 4 is the first supervised one, token 3 predicts it
    assert shared_prefix([_ROWS[0]]) == 0
    assert shared_prefix([_ROWS[0], Encoded([1, 2, 3], [False, False, True])]) == 0
