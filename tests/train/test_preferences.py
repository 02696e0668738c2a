"""DPO, ORPO and KTO against their papers' formulas, written out on whole logits, and a training that prefers."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach
from graftline.adapters.base import adapters_off
from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.settings.model import Adapter, MethodName
from graftline.settings.objective import Objective
from graftline.train.batches import pad_rows
from graftline.train.preferences import PreferenceLoss, interleaved, mismatched, pair_losses, steps_of_pairs
from graftline.train.trainer import train
from tests.sections import train_section

DPO, ORPO = Objective(kind="dpo", beta=0.3), Objective(kind="orpo", beta=0.3)
KTO = Objective(kind="kto", beta=0.3)
ALL = pytest.mark.parametrize("objective", [DPO, ORPO, KTO], ids=lambda objective: objective.kind)


def rows(count: int = 3) -> list[Encoded]:
    """Pairs in turn: a prompt of 9 tokens, answers of 2 to 5, the chosen one of even tokens."""
    found = []
    for pair in range(count):
        prompt = [(7 * pair + 3 * at) % 90 + 4 for at in range(9)]
        for kind in (0, 1):
            answer = [2 * ((pair * 5 + at * 3) % 40) + 10 + kind for at in range(2 + (pair + 2 * kind) % 4)]
            found.append(Encoded(prompt + answer, [False] * 9 + [True] * len(answer)))
    return found


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return found


def adapted(model: PreTrainedModel, method: MethodName = "lora") -> PreTrainedModel:
    """With an adapter that changes what the model computes."""
    attach(model, Adapter(method=method, rank=4, alpha=8), seed=0)
    chooser = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=chooser))
    return model


def sums(model: PreTrainedModel, pairs: list[Encoded]) -> Tensor:
    """Log-likelihood of each answer, from whole logits, row by row."""
    found = []
    for row in pairs:
        log_p = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        at = [place for place, learned in enumerate(row.supervised) if learned]
        found.append(torch.stack([log_p[place - 1, row.input_ids[place]] for place in at]).sum())
    return torch.stack(found)


def by_the_paper(model: PreTrainedModel, pairs: list[Encoded], objective: Objective) -> Tensor:
    chosen, rejected = sums(model, pairs).view(-1, 2).unbind(1)
    if objective.kind == "dpo":
        with torch.no_grad(), adapters_off(model):
            chosen_0, rejected_0 = sums(model, pairs).view(-1, 2).unbind(1)
        return -F.logsigmoid(objective.beta * ((chosen - chosen_0) - (rejected - rejected_0))).mean()
    if objective.kind == "kto":
        with torch.no_grad(), adapters_off(model):
            chosen_0, rejected_0 = sums(model, pairs).view(-1, 2).unbind(1)
        z = from_base(model, [Encoded(*mixed(pairs, at)) for at in range(len(pairs))]).mean().clamp(min=0)
        good = 1 - torch.sigmoid(objective.beta * (chosen - chosen_0 - z))
        bad = 1 - torch.sigmoid(objective.beta * (z - rejected + rejected_0))
        return torch.cat([good, bad]).mean()
    sizes = torch.tensor([sum(row.supervised) for row in pairs]).view(-1, 2)
    p_w, p_l = (chosen / sizes[:, 0]).exp(), (rejected / sizes[:, 1]).exp()
    ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return (-chosen / sizes[:, 0] - objective.beta * torch.sigmoid(ratio.log()).log()).mean()


def mixed(pairs: list[Encoded], at: int) -> tuple[list[int], list[bool]]:
    """A row's prompt, of 9 tokens, with the answer of the same kind of the pair before, in a circle."""
    before = pairs[(at - 2) % len(pairs)]
    return [*pairs[at].input_ids[:9], *before.input_ids[9:]], list(before.supervised)


@torch.no_grad()
def from_base(model: PreTrainedModel, pairs: list[Encoded]) -> Tensor:
    """How much likelier each answer is than with the base, in nats."""
    with adapters_off(model):
        base = sums(model, pairs)
    return sums(model, pairs) - base


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@ALL
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_loss_and_gradient_are_those_of_the_papers_in_chunks_of_any_size(
    model: PreTrainedModel, objective: Objective, chunk: int | None
) -> None:
    model = adapted(model)
    loss = PreferenceLoss(model, objective, chunk_tokens=chunk)
    found = loss(pad_rows(rows()), num_supervised=torch.tensor(3))
    expected = by_the_paper(model, rows(), objective)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    right = gradients(model, expected)
    for name, gradient in gradients(model, found).items():
        assert torch.allclose(gradient, right[name], rtol=1e-3, atol=1e-6), name
    with torch.no_grad():
        assert float(loss(pad_rows(rows()), num_supervised=torch.tensor(3))) == pytest.approx(float(found.detach()))


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "houlsby"])
def test_with_the_adapter_off_the_model_is_its_base(model: PreTrainedModel, method: MethodName) -> None:
    ids = torch.tensor([rows()[0].input_ids])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        changed = adapted(model, method)(input_ids=ids).logits
        with adapters_off(model):
            off = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    assert not torch.allclose(changed, before, atol=1e-4)
    assert torch.equal(off, before)
    assert torch.equal(again, changed)


def test_published_values_of_dpo_and_orpo() -> None:
    """Equal log-ratios give ln 2; ORPO's odds are those of the likelihood by token."""
    even = torch.tensor([[-4.0, -6.0]])
    sizes = torch.tensor([[2, 3]])
    assert float(pair_losses(even, even, sizes, DPO)) == pytest.approx(math.log(2))
    assert float(pair_losses(even, even, sizes, ORPO)) == pytest.approx(2.0 + 0.3 * math.log(2))
    moved = torch.tensor([[-3.0, -7.0]])
    assert float(pair_losses(moved, even, sizes, DPO)) == pytest.approx(math.log(1 + math.exp(-0.6)))


def test_what_kto_compares_with_are_prompts_with_answers_of_another_pair(model: PreTrainedModel) -> None:
    """Behind a shared prefix too; and it is above 0 here, so that the comparison above is one."""
    model, pairs = adapted(model), rows()
    for at, (ids, supervised) in enumerate(mixed(pairs, at) for at in range(len(pairs))):
        assert ids[9:] == [token for token, learned in zip(ids, supervised, strict=True) if learned], at
    expected = from_base(model, [Encoded(*mixed(pairs, at)) for at in range(len(pairs))]).mean()
    assert float(expected) > 0.01
    loss = PreferenceLoss(model, KTO)
    found = loss._moved(mismatched(pad_rows(pairs)))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    same = [Encoded([5, 6, 7, *row.input_ids], [False] * 3 + list(row.supervised)) for row in pairs]
    behind = loss._moved(mismatched(pad_rows(same, shared_prefix=3)))
    assert float(behind) == pytest.approx(float(loss._moved(mismatched(pad_rows(same)))), rel=1e-4)


def test_a_likelihood_of_one_has_a_finite_loss() -> None:
    certain = torch.tensor([[0.0, -50.0]], requires_grad=True)
    loss = pair_losses(certain, torch.zeros(1, 2), torch.tensor([[2, 2]]), ORPO).sum()
    loss.backward()
    assert bool(loss.isfinite() & certain.grad.isfinite().all())  # type: ignore[union-attr]


def test_pairs_stay_together() -> None:
    pairs = rows(4)
    both = interleaved(pairs[::2], pairs[1::2])
    assert [row.input_ids for row in both] == [row.input_ids for row in pairs]
    steps = torch.tensor([[2, 0], [1, 3]]).numpy()
    assert steps_of_pairs(steps).tolist() == [[4, 5, 0, 1], [2, 3, 6, 7]]
    with pytest.raises(TrainError, match="2 chosen and 1 rejected answers"):
        interleaved(pairs[:2], pairs[:1])


@ALL
def test_a_training_prefers_the_chosen_answers_however_a_step_is_split(
    tmp_path: Path, tiny_llama: Path, objective: Objective
) -> None:
    losses = []
    for parts in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        attach(model, Adapter(method="lora", rank=4, alpha=8), seed=0)
        pairs = rows(8)
        settings = train_section(
            steps=24, batch_size=8 // parts, gradient_accumulation=parts, learning_rate=5e-3, objective=objective
        )
        with torch.no_grad():
            before = sums(model, pairs).view(-1, 2)
        result = train(model, pairs, settings=settings, work=tmp_path / str(parts))
        with torch.no_grad():
            after = sums(model, pairs).view(-1, 2)
        margins = (after - before)[:, 0] - (after - before)[:, 1]
        assert bool((margins > 0).all())
        losses.append(result.losses)
    if objective.kind != "kto":  # whose reference point is of a micro-batch
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    if objective.kind == "kto":
        assert losses[0][0] == losses[1][0] == pytest.approx(0.5, rel=1e-5)
    if objective.kind == "dpo":
        assert losses[0][0] == pytest.approx(math.log(2), rel=1e-5)  # the adapter is still the base
    assert losses[0][-1] < losses[0][0]


def test_rows_that_are_no_pairs_or_cannot_be_mixed_are_refused(tmp_path: Path, model: PreTrainedModel) -> None:
    with pytest.raises(TrainError, match="objective kto with a batch_size of 1"):
        train(adapted(model), rows(), settings=train_section(steps=1, batch_size=1, objective=KTO), work=tmp_path)


def test_an_odd_number_of_rows_is_refused(tmp_path: Path, model: PreTrainedModel) -> None:
    with pytest.raises(TrainError, match="objective dpo with 3 rows"):
        train(adapted(model), rows()[:3], settings=train_section(steps=1, objective=DPO), work=tmp_path)


def test_small_gradients_are_not_lost_in_16_bits(model: PreTrainedModel) -> None:
    """As in fp16 on a GPU, where the loss is scaled up before its gradient is taken."""
    objective, batch, scale = Objective(kind="dpo", beta=1e-6), pad_rows(rows()), 2.0**14
    model.requires_grad_(False)
    found = []
    for make in (model.float, model.half):
        make()
        weight = model.get_parameter("model.norm.weight").requires_grad_()
        loss = PreferenceLoss(model, objective)(batch, num_supervised=torch.tensor(3))
        (gradient,) = torch.autograd.grad(scale * loss, weight)
        found.append(gradient.float() / scale)
    assert found[0].norm() > 0
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()
