from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.errors import TrainError
from graftline.train.batches import MicroBatch, pack_rows, pad_rows, shared_prefix
from graftline.train.layouts import can_share_prefix, check_packing, hidden_states
from graftline.train.loss import SupervisedLoss
from tests.train.rows import Row, lora_model, make_rows

_PREFIX = [7, 9, 11, 13, 15, 17, 19, 21, 23, 25]
_ROWS = [Row(_PREFIX + row.input_ids, [False] * len(_PREFIX) + row.supervised) for row in make_rows(5)]
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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_of_packed_rows_are_those_of_each_row_alone(tiny_llama: Path, implementation: str) -> None:
    model = _attend(tiny_llama, implementation).eval()
    rows = make_rows(6)
    with torch.no_grad():
        together = model.lm_head(hidden_states(model, pack_rows(rows)))[0]
        apart = torch.cat([model(input_ids=torch.tensor([row.input_ids])).logits[0] for row in rows])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    check_packing(model)


def test_an_attention_that_mixes_packed_rows_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _attend(tiny_llama, "sdpa")
    # What kernels without block-diagonal masks do: one causal mask over everything.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(TrainError, match="attention implementation 'sdpa' of LlamaForCausalLM mixes packed rows"):
        check_packing(model)


def test_a_model_whose_cache_loses_keys_does_not_share_prefixes(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _attend(tiny_llama, "sdpa")
    assert can_share_prefix(model)
    monkeypatch.setattr("transformers.DynamicCache.batch_repeat_interleave", lambda cache, repeats: cache.reset())
    assert not can_share_prefix(model)


def test_the_shared_prefix_ends_before_a_token_that_predicts() -> None:
    assert shared_prefix(_ROWS) == len(_PREFIX)
    early = Row([*_PREFIX, 5], [False] * 4 + [True] * 7)
    assert shared_prefix([*_ROWS, early]) == 3  # token 4 is the first supervised one, token 3 predicts it
    assert shared_prefix([_ROWS[0]]) == 0
    assert shared_prefix([_ROWS[0], Row([1, 2, 3], [False, False, True])]) == 0


def test_packed_positions_start_anew_at_each_row_and_nothing_is_padding() -> None:
    batch = pack_rows([Row([5, 6, 7], [False, True, True]), Row([8, 9], [False, True])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["predict_at"].tolist() == [0, 1, 3]
    assert batch["targets"].tolist() == [6, 7, 9]
