import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graftline.adapters.attach import attach
from graftline.settings.model import Optimizer
from graftline.train import optimizers
from graftline.train.optimizers import make_optimizer, restore_paging
from graftline.train.trainer import train
from graftline.weights.quant.linear import load_model
from tests.sections import adapter_section, train_section
from tests.train.rows import lora_model, make_rows

_BITSANDBYTES: list[Optimizer] = ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def _parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {
        "q.A": (4, 64),
        "q.B": (64, 4),
        "q.magnitude": (64,),
        "up.lora_B.weight": (64, 4),
        "head.weight": (100, 90),
    }
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_b_and_vectors_have_their_own_learning_rates_and_vectors_no_weight_decay() -> None:
    parameters = _parameters()
    settings = train_section(steps=1, learning_rate=1e-3, lr_ratio_b=16, lr_ratio_vectors=10, weight_decay=0.1)
    groups = make_optimizer(parameters, settings).param_groups
    by_id = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert {name: by_id[id(p)] for name, p in parameters.items()} == {
        "q.A": (1e-3, 0.1),
        "q.B": (1.6e-2, 0.1),
        "up.lora_B.weight": (1.6e-2, 0.1),
        "q.magnitude": (1e-2, 0.0),
        "head.weight": (1e-3, 0.1),
    }


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", {"A": 1.0, "B": 16.0}),
        ("rslora", {"A": 1.0, "B": 16.0}),
        ("pissa", {"A": 1.0, "B": 16.0}),
        ("dora", {"A": 1.0, "B": 16.0, "m": 10.0}),
        ("vera", {"d": 10.0, "b": 10.0}),
    ],
)
def test_every_method_s_own_parameters_get_their_rates(
    tiny_llama: Path, method: str, expected: dict[str, float]
) -> None:
    model = load_model(tiny_llama)
    attach(model, adapter_section(method, rank=4), seed=0)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = train_section(steps=1, learning_rate=1.0, lr_ratio_b=16, lr_ratio_vectors=10)
    rates = {id(p): group["lr"] for group in make_optimizer(parameters, settings).param_groups for p in group["params"]}
    found = {(name.rsplit(".", 1)[-1], rates[id(p)]) for name, p in parameters.items()}
    assert found == set(expected.items())


def test_a_schedule_scales_every_group_alike(tiny_llama: Path, tmp_path: Path) -> None:
    model = lora_model(tiny_llama)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    settings = train_section(steps=1, learning_rate=1e-3, lr_ratio_b=16, batch_size=4, device="cpu")
    train(model, make_rows(8), settings=settings, work=tmp_path)
    moved = {
        name: (dict(model.named_parameters())[name] - tensor).abs().max().item() for name, tensor in before.items()
    }
    # Adam's first update has the size of the learning rate
    assert all(size == pytest.approx(1.6e-2, rel=1e-2) for size in moved.values())


@pytest.mark.parametrize("optimizer", _BITSANDBYTES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_optimizers_on_a_cpu_follow_adamw(optimizer: Optimizer) -> None:
    ours, reference = _parameters(), _parameters()
    settings = train_section(steps=1, learning_rate=1e-2, optimizer=optimizer, weight_decay=0.1)
    tested, adamw = make_optimizer(ours, settings), make_optimizer(reference, train_section(steps=1, weight_decay=0.1))
    for group in adamw.param_groups:
        group["lr"] = 1e-2
    for seed in range(5):
        _step(tested, ours, seed)
        _step(adamw, reference, seed)
    for name, parameter in ours.items():
        exact = "32bit" in optimizer or parameter.numel() < 4096
        worst = (parameter - reference[name]).abs().max().item()
        assert worst < (1e-5 if exact else 1e-2), name
    is_8bit = tested.state[ours["head.weight"]]["state1"].dtype == torch.uint8
    assert is_8bit == (optimizer != "paged_adamw_32bit")


@pytest.mark.parametrize("optimizer", _BITSANDBYTES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_states_go_on_bit_for_bit_after_they_were_saved(optimizer: Optimizer, tmp_path: Path) -> None:
    settings = train_section(steps=1, optimizer=optimizer)
    whole, cut = _parameters(), _parameters()
    first, second = make_optimizer(whole, settings), make_optimizer(cut, settings)
    for seed in (0, 1):
        _step(first, whole, seed)
        _step(second, cut, seed)
    torch.save(second.state_dict(), tmp_path / "optimizer.pt")
    third = make_optimizer(cut, settings)
    third.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    restore_paging(third)
    _step(first, whole, 2)
    _step(third, cut, 2)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_paged_optimizer_on_a_cpu_says_that_it_does_not_page(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_optimizer(_parameters(), train_section(steps=1, optimizer="paged_adamw_8bit"))
    assert "paged_adamw_8bit: a CPU has no paged memory" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged memory needs CUDA")
def test_paged_states_are_paged_again_after_a_resume() -> None:
    parameters = {"w": nn.Parameter(torch.randn(400, 400, device="cuda"))}
    settings = train_section(steps=1, optimizer="paged_adamw_32bit")
    first = make_optimizer(parameters, settings)
    _step(first, parameters, 0)
    second = make_optimizer(parameters, settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert restore_paging(second) == 2
    state = second.state[parameters["w"]]
    assert state["state1"].is_paged
    assert torch.equal(state["state1"].cpu(), first.state[parameters["w"]]["state1"].cpu())


def test_only_large_states_on_a_gpu_go_back_into_paged_memory() -> None:
    large, small = 100_000, 99_999
    on_cpu = {"state1": torch.zeros(large), "state2": torch.zeros(large), "step": 3}
    assert list(optimizers._pageable(on_cpu)) == []
    with FakeTensorMode():  # a CUDA tensor without a GPU
        on_gpu = {"state1": torch.empty(large, device="cuda"), "state2": torch.empty(small, device="cuda"), "step": 3}
        assert [key for key, _ in optimizers._pageable(on_gpu)] == ["state1"]
    assert list(optimizers._pageable({"step": 3, "state1": None})) == []
