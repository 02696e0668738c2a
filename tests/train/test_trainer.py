import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

import graftline.train.loop
from graftline.adapters.attach import attach
from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.settings.model import Adapter
from graftline.train.devices import weight_dtype
from graftline.train.results import StepMetrics, TrainResult, ignore_step
from graftline.train.trainer import train
from graftline.weights.quant.linear import load_model
from tests.sections import train_section
from tests.train.killing import kill_at, run_and_die
from tests.train.rows import lora_model, make_rows, trainable

_ROWS = make_rows(40)
_SETTINGS = train_section(steps=12, batch_size=8, learning_rate=1e-2, checkpoint_every=4, device="cpu")


def _final_bytes(work: Path) -> bytes:
    return (work / "checkpoint-12" / "adapter.safetensors").read_bytes()


def test_the_loss_falls_on_a_task_that_can_be_learned(tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    settings = _SETTINGS.replace(steps=60, checkpoint_every=0, learning_rate=5e-3)
    result = train(
        lora_model(tiny_llama, targets=["q_proj", "up_proj", "lm_head"]),
        _ROWS,
        settings=settings,
        work=tmp_path,
        on_step=seen.append,
    )
    assert sum(result.losses[-10:]) / 10 < 0.5 * result.losses[0]
    assert [metrics.step for metrics in seen] == list(range(1, 61))
    assert result.losses == tuple(metrics.loss for metrics in seen)
    assert result.steps == 60
    assert result.tokens == sum(metrics.tokens for metrics in seen) == 12 * sum(len(row.input_ids) for row in _ROWS)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.peak_bytes > 100 << 20  # a Python process with torch


def test_only_adapters_change(tiny_llama: Path, tmp_path: Path) -> None:
    model = lora_model(tiny_llama)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = trainable(model)
    train(model, _ROWS, settings=_SETTINGS.replace(steps=3), work=tmp_path)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("killed_at", "accumulation", "dropout"), [(1, 1, 0.0), (4, 1, 0.2), (6, 2, 0.2), (8, 2, 0.0), (11, 4, 0.2)]
)
def test_a_training_killed_at_any_step_ends_with_the_bytes_of_one_that_was_not(
    tiny_llama: Path, tmp_path: Path, killed_at: int, accumulation: int, dropout: float
) -> None:
    settings = _SETTINGS.replace(gradient_accumulation=accumulation, batch_size=8 // accumulation)

    def run(work: Path, on_step: Callable[[StepMetrics], None]) -> TrainResult:
        return train(lora_model(tiny_llama, dropout=dropout), _ROWS, settings=settings, work=work, on_step=on_step)

    whole = run(tmp_path / "whole", ignore_step)
    assert run_and_die(lambda: run(tmp_path / "killed", kill_at(killed_at))) == signal.SIGKILL
    resumed = run(tmp_path / "killed", ignore_step)
    assert resumed.losses == whole.losses
    assert resumed.tokens == whole.tokens
    assert _final_bytes(tmp_path / "killed") == _final_bytes(tmp_path / "whole")


def test_a_training_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(work: Path) -> object:
        return train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS, work=work)

    def killed() -> None:
        save = graftline.train.loop.save_trainable

        def save_and_die(model: PreTrainedModel, folder: Path) -> None:
            save(model, folder)
            if "checkpoint-8" in folder.name:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(graftline.train.loop, "save_trainable", save_and_die)
        run(tmp_path / "killed")

    assert run_and_die(killed) == signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        ".checkpoint-8.part",
        "checkpoint-4",
        "steps.jsonl",
    ]
    run(tmp_path / "killed")
    run(tmp_path / "whole")
    assert _final_bytes(tmp_path / "killed") == _final_bytes(tmp_path / "whole")


def test_a_finished_training_returns_at_once_with_the_trained_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    first = train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS, work=tmp_path)
    model = lora_model(tiny_llama)
    second = train(model, _ROWS, settings=_SETTINGS, work=tmp_path, on_step=lambda _: pytest.fail("a step was run"))
    assert second.losses == first.losses
    assert second.tokens_per_second == 0
    saved = load_file(tmp_path / "checkpoint-12" / "adapter.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainable(model).items())


def test_checkpoints_hold_the_trainable_parameters_and_nothing_of_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    model = lora_model(tiny_llama)
    train(model, _ROWS, settings=_SETTINGS, work=tmp_path)
    assert load_file(tmp_path / "checkpoint-12" / "adapter.safetensors").keys() == trainable(model).keys()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_k_micro_batches_are_one_batch(tiny_llama: Path, tmp_path: Path, pieces: int) -> None:
    def run(accumulation: int) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
        model = lora_model(tiny_llama)
        settings = _SETTINGS.replace(steps=4, batch_size=8 // accumulation, gradient_accumulation=accumulation)
        result = train(model, _ROWS, settings=settings, work=tmp_path / str(accumulation))
        return result.losses, trainable(model)

    (whole, whole_weights), (cut, cut_weights) = run(1), run(pieces)
    assert cut == pytest.approx(whole, rel=1e-6)
    for name, tensor in whole_weights.items():
        torch.testing.assert_close(cut_weights[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 2e-2}, {"seed": 1}, {"steps": 13}, {"batch_size": 4}], ids=lambda c: next(iter(c))
)
def test_a_work_folder_of_a_training_with_other_settings_is_refused(
    tiny_llama: Path, tmp_path: Path, change: dict[str, float]
) -> None:
    train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS, work=tmp_path)
    with pytest.raises(TrainError, match="belongs to a training with other rows, settings or adapter"):
        train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS.replace(**change), work=tmp_path)


def test_a_resume_on_another_base_is_stopped_by_its_first_loss(tiny_llama: Path, tmp_path: Path) -> None:
    run_and_die(lambda: train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS, work=tmp_path, on_step=kill_at(6)))
    model = lora_model(tiny_llama)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.base_layer.weight.mul_(1.5)
        model.model.norm.weight.mul_(1.1)
    with pytest.raises(TrainError, match=r"step 5 has loss .* after the resume, but .* was recorded before"):
        train(model, _ROWS, settings=_SETTINGS, work=tmp_path)


def test_a_loss_that_is_not_a_number_stops_the_run_and_writes_the_batch_out(tiny_llama: Path, tmp_path: Path) -> None:
    model = lora_model(tiny_llama)
    poisoned = _ROWS[7].input_ids[0]
    model.get_input_embeddings().register_forward_hook(
        lambda _, ids, out: out.masked_fill((ids[0] == poisoned)[..., None], float("nan"))
    )
    with pytest.raises(TrainError, match=r"at step \d+ the loss is nan; .*offending-batch-\d+\.json") as caught:
        train(model, _ROWS, settings=_SETTINGS, work=tmp_path)
    (path,) = tmp_path.glob("offending-batch-*.json")
    written = json.loads(path.read_text())
    assert f"at step {written['step']} " in str(caught.value)
    assert len(written["rows"]) == 8
    assert any(poisoned in row["input_ids"] for row in written["rows"])
    assert all(row["input_ids"] == _ROWS[row["row"]].input_ids for row in written["rows"])


def test_a_loss_that_explodes_stops_the_run_before_its_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    settings = _SETTINGS.replace(steps=60, learning_rate=10.0, max_grad_norm=0.0, checkpoint_every=1)
    with pytest.raises(TrainError, match=r"at step \d+ the loss is .*far above that of a random guess"):
        train(lora_model(tiny_llama, targets=["lm_head"]), _ROWS, settings=settings, work=tmp_path)
    (path,) = tmp_path.glob("offending-batch-*.json")
    stopped_at = json.loads(path.read_text())["step"]
    assert not (tmp_path / f"checkpoint-{stopped_at}").exists()


@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_gradients_are_clipped_to_the_given_norm(tiny_llama: Path, tmp_path: Path, limit: float) -> None:
    reported: list[float] = []
    used: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        used.append(torch.cat(gradients).norm().item())

    hook = register_optimizer_step_pre_hook(look)
    settings = _SETTINGS.replace(steps=2, max_grad_norm=limit)
    model = lora_model(tiny_llama)
    train(model, _ROWS, settings=settings, work=tmp_path, on_step=lambda m: reported.append(m.grad_norm))
    hook.remove()
    assert min(reported) > 1e-3  # what is reported is the norm before clipping
    assert used == pytest.approx([limit] * 2 if limit else reported, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run_and_writes_the_batch_out(tiny_llama: Path, tmp_path: Path) -> None:
    model = lora_model(tiny_llama)
    weight = model.model.layers[0].mlp.gate_proj.lora_B["default"].weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        TrainError, match=r"at step 1 the norm of the gradients is (inf|nan); .*offending-batch-1\.json"
    ):
        train(model, _ROWS, settings=_SETTINGS, work=tmp_path)
    assert len(json.loads((tmp_path / "offending-batch-1.json").read_text())["rows"]) == 8


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    tiny_llama: Path, tmp_path: Path, scheduler: str, expected: list[float]
) -> None:
    rates: list[float] = []
    settings = _SETTINGS.replace(steps=6, warmup_steps=2, scheduler=scheduler, learning_rate=1.0e-2)
    model = lora_model(tiny_llama)
    train(model, _ROWS, settings=settings, work=tmp_path, on_step=lambda m: rates.append(m.learning_rate))
    assert rates == pytest.approx([1e-2 * factor for factor in expected], rel=1e-5)


def test_bf16_trains_fp32_adapters_to_about_the_same_loss(tiny_llama: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        model = lora_model(tiny_llama)
        settings = _SETTINGS.replace(precision=precision)
        losses[precision] = train(model, _ROWS, settings=settings, work=tmp_path / precision).losses
        assert {tensor.dtype for tensor in trainable(model).values()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


@pytest.mark.parametrize(
    "given",
    [
        *({"method": method} for method in ("lora", "rslora", "dora", "pissa", "vera", "houlsby", "pfeiffer")),
        {"method": "lora", "modules_to_save": ("lm_head",)},
    ],
    ids=str,
)
def test_a_base_held_in_bf16_trains_every_method_in_fp32(
    tiny_llama: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    spec, losses = Adapter(rank=4, **given), []
    for dtype in (weight_dtype(torch.bfloat16, spec), torch.float32):
        model = load_model(tiny_llama, dtype=dtype)
        attach(model, spec, seed=0)
        assert {tensor.dtype for tensor in trainable(model).values()} == {torch.float32}
        settings = _SETTINGS.replace(precision="bf16", steps=3, learning_rate=1e-3)
        losses.append(train(model, _ROWS, settings=settings, work=tmp_path / f"{dtype}").losses)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_model_without_adapters_and_one_with_half_precision_adapters_are_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="no trainable parameter; attach an adapter first"):
        train(lora_model(tiny_llama).requires_grad_(False), _ROWS, settings=_SETTINGS, work=tmp_path)
    with pytest.raises(TrainError, match=r"lora_A.* is torch\.bfloat16; adapters are trained in torch\.float32"):
        train(lora_model(tiny_llama).bfloat16(), _ROWS, settings=_SETTINGS, work=tmp_path)


def test_memory_that_does_not_suffice_says_what_to_change(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: object, **kwargs: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("graftline.train.loss.head_loss", out_of_memory)
    with pytest.raises(TrainError, match=r"memory did not suffice .*lower train\.batch_size"):
        train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS, work=tmp_path)


@pytest.mark.parametrize("change", ["packing", "gradient_checkpointing"])
def test_the_layout_and_recomputing_change_no_loss(tiny_llama: Path, tmp_path: Path, change: str) -> None:
    usual = train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS, work=tmp_path / "usual")
    settings = _SETTINGS.replace(**{change: True})
    changed = train(lora_model(tiny_llama), _ROWS, settings=settings, work=tmp_path / change)
    assert changed.losses == pytest.approx(usual.losses, rel=1e-4)
    assert changed.tokens == usual.tokens


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_runs_each_layer_again_in_the_backward_pass(
    tiny_llama: Path, tmp_path: Path, checkpointing: bool
) -> None:
    model, calls = lora_model(tiny_llama), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += torch.is_grad_enabled()

    model.model.layers[1].mlp.act_fn.register_forward_hook(count)
    settings = _SETTINGS.replace(steps=3, gradient_checkpointing=checkpointing)
    train(model, _ROWS, settings=settings, work=tmp_path)
    assert calls == (6 if checkpointing else 3)


def test_rows_behind_a_shared_prefix_have_the_loss_of_a_run_without_one(tiny_llama: Path, tmp_path: Path) -> None:
    prefix = list(range(20, 40))
    rows = [Encoded(prefix + row.input_ids, [False] * len(prefix) + row.supervised) for row in _ROWS]
    widths: list[int] = []
    model = lora_model(tiny_llama)
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: widths.append(ids[0].shape[1]))
    shared = train(model, rows, settings=_SETTINGS, work=tmp_path / "shared")
    settings = _SETTINGS.replace(gradient_checkpointing=True)  # which has no cache to share
    apart = train(lora_model(tiny_llama), rows, settings=settings, work=tmp_path / "apart")
    assert shared.losses == pytest.approx(apart.losses, rel=1e-4)
    assert max(widths) <= 24  # the longest row has 44
