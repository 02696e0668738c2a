import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from graftline.errors import TrainError
from graftline.train.batches import MicroBatch, pad_rows
from graftline.train.loss import AfterHead, SupervisedLoss, check_head, head_loss, log_likelihoods
from tests.train.rows import lora_model, make_rows

_TARGETS = {"linear layers": "all-linear", "linear layers and head": ["q_proj", "v_proj", "down_proj", "lm_head"]}


def _usual_loss(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Full logits, cross-entropy over all positions: what the chunked loss must equal."""
    mask = batch["input_ids"] != 0  # the rows' own tokens start at 4
    logits = model(input_ids=batch["input_ids"], attention_mask=mask.long(), use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1)[batch["predict_at"]], batch["targets"], reduction="mean")


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("targets", _TARGETS.values(), ids=_TARGETS.keys())
def test_loss_and_gradients_equal_those_of_full_logits(tiny_llama: Path, targets: str | list[str]) -> None:
    model = lora_model(tiny_llama, targets=targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first: then A would have no gradient to compare
                parameter.normal_(std=0.02)
    batch = pad_rows(make_rows(6))
    expected = _usual_loss(model, batch)
    expected.backward()
    wanted = _gradients(model)
    actual = SupervisedLoss(model)(batch, num_supervised=torch.tensor(len(batch["targets"])))
    actual.backward()
    found = _gradients(model)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert found.keys() == wanted.keys()
    assert len(found) == 28 if targets == "all-linear" else any("lm_head" in name for name in found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_the_chunk_size_changes_nothing(chunk: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11)
    hidden_NH, targets_N = torch.randn(7, 8, requires_grad=True), torch.randint(11, (7,))
    expected = F.cross_entropy(head(hidden_NH), targets_N, reduction="sum")
    wanted = torch.autograd.grad(2 * expected, (hidden_NH, head.weight, head.bias))
    actual = head_loss(head, hidden_NH, targets_N, chunk_tokens=chunk)
    found = torch.autograd.grad(2 * actual, (hidden_NH, head.weight, head.bias))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(found, wanted)


def test_the_head_sees_one_chunk_of_supervised_positions_at_a_time(tiny_llama: Path) -> None:
    model = lora_model(tiny_llama)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    batch = pad_rows(make_rows(8))
    hidden_BTH = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
    head_loss(
        model.get_output_embeddings(), hidden_BTH.flatten(0, 1)[batch["predict_at"]], batch["targets"], chunk_tokens=4
    )
    assert max(seen) == 4
    assert sum(seen) == len(batch["targets"]) < batch["input_ids"].numel()


def test_without_gradients_the_loss_is_the_same_number() -> None:
    torch.manual_seed(0)
    head, hidden_NH, targets_N = torch.nn.Linear(8, 11), torch.randn(7, 8, requires_grad=True), torch.randint(11, (7,))
    with torch.no_grad():
        assert head_loss(head, hidden_NH, targets_N, chunk_tokens=3).item() == pytest.approx(
            head_loss(head, hidden_NH, targets_N).item()
        )


def test_right_padding_does_not_change_a_row(tiny_llama: Path) -> None:
    model = lora_model(tiny_llama).eval()
    rows = make_rows(5)
    loss, one = SupervisedLoss(model), torch.tensor(1)
    with torch.no_grad():
        together = loss(pad_rows(rows), num_supervised=one)
        alone = sum(loss(pad_rows([row]), num_supervised=one) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_class_that_changes_its_logits_in_an_unknown_way_is_refused(tiny_llama: Path) -> None:
    model = lora_model(tiny_llama)
    model.register_forward_hook(lambda _, __, out: dataclasses.replace(out, logits=out.logits + 1))
    with pytest.raises(TrainError, match="changes its logits after the output layer in a way"):
        check_head(model, [5, 6, 7])


@pytest.mark.parametrize(
    "after", [AfterHead(divisor=3.0), AfterHead(cap=0.5), AfterHead(divisor=0.25, cap=2.0)], ids=str
)
@pytest.mark.parametrize("chunk", [2, 100])
def test_what_a_model_does_after_its_head_is_in_loss_and_gradients(after: AfterHead, chunk: int) -> None:
    torch.manual_seed(0)
    head, hidden_NH, targets_N = torch.nn.Linear(8, 11), torch.randn(7, 8, requires_grad=True), torch.randint(11, (7,))
    logits_NV = head(hidden_NH) / after.divisor
    logits_NV = logits_NV if after.cap is None else torch.tanh(logits_NV / after.cap) * after.cap
    expected = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden_NH, head.weight, head.bias))
    actual = head_loss(head, hidden_NH, targets_N, after=after, chunk_tokens=chunk)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (hidden_NH, head.weight, head.bias)), wanted)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, hidden_NH, targets_N, after=after, chunk_tokens=chunk), expected)


def test_a_plain_head_passes_the_check_and_leaves_the_model_in_its_mode(tiny_llama: Path) -> None:
    model = lora_model(tiny_llama).train()
    check_head(model, [5, 6, 7])
    assert model.training


@pytest.mark.parametrize(
    "after", [AfterHead(), AfterHead(divisor=3.0), AfterHead(cap=0.5), AfterHead(2.0, 0.5)], ids=str
)
def test_weights_of_positions_and_what_follows_the_head_are_in_one_gradient(after: AfterHead) -> None:
    torch.manual_seed(0)
    head, targets_N = torch.nn.Linear(8, 20), torch.arange(7)
    hidden_NH, weights_N = torch.randn(7, 8, requires_grad=True), torch.tensor([0.5, -1.0, 0.25, 1.0, -0.5, 0.0, 2.0])
    logits_NV = head(hidden_NH) / after.divisor
    logits_NV = logits_NV if after.cap is None else torch.tanh(logits_NV / after.cap) * after.cap
    each_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    expected = (weights_N * each_N).sum()
    actual = head_loss(head, hidden_NH, targets_N, after=after, chunk_tokens=2, weights_N=weights_N)
    torch.testing.assert_close(actual, expected)
    inputs = (hidden_NH, *head.parameters())
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))
    with torch.no_grad():
        weighted = head_loss(head, hidden_NH, targets_N, after=after, chunk_tokens=2, weights_N=weights_N)
    torch.testing.assert_close(weighted, expected.detach())
    likelihoods = log_likelihoods(head, hidden_NH, targets_N, after=after, chunk_tokens=2)
    torch.testing.assert_close(likelihoods, -each_N.detach())
