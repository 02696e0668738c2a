import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from graftline.errors import TrainError
from graftline.train.results import TrainResult
from graftline.train.trainer import train
from tests.sections import train_section
from tests.train.rows import lora_model, make_rows, trainable

_ROWS = make_rows(40)
_SETTINGS = train_section(
    steps=12, batch_size=4, learning_rate=1e-2, checkpoint_every=3, evaluate_every=2, device="cpu"
)


def _scores(*scores: float) -> Callable[[PreTrainedModel], float]:
    given: Iterator[float] = iter(scores)
    return lambda model: next(given)


def _run(folder: Path, work: Path, evaluate: Callable[[PreTrainedModel], float], **changes: int) -> tuple[
    TrainResult, dict[str, torch.Tensor]
]:  # fmt: skip
    model = lora_model(folder, dropout=0.1)
    result = train(model, _ROWS, settings=_SETTINGS.replace(**changes), work=work, evaluate=evaluate)
    return result, trainable(model)


def test_the_model_ends_with_the_adapter_of_the_best_score(tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    given = iter([5, 3, 4, 4, 3, 9])

    def evaluate(model: PreTrainedModel) -> float:
        seen.append(trainable(model))
        return next(given)

    result, weights = _run(tiny_llama, tmp_path, evaluate)
    assert (result.steps, result.best_step) == (12, 4)
    assert all(torch.equal(weights[name], tensor) for name, tensor in seen[1].items())
    assert not all(torch.equal(weights[name], tensor) for name, tensor in seen[4].items())


def test_the_training_stops_after_patience_evaluations_without_a_better_score(tiny_llama: Path, tmp_path: Path) -> None:
    first, weights = _run(tiny_llama, tmp_path, _scores(5, 3, 4, 3), patience=2)
    assert (first.steps, first.best_step) == (8, 4)
    # Run again, it neither trains nor evaluates.
    second, again = _run(tiny_llama, tmp_path, _scores(), patience=2)
    assert second.losses == first.losses
    assert second.best_step == 4
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_the_training(tiny_llama: Path, tmp_path: Path, score: float) -> None:
    """No later score is below NaN: the adapter that gave it would be kept, and nothing could be written of it."""
    with pytest.raises(TrainError, match=f"after step 2 .* is {score}; a finite one is expected"):
        _run(tiny_llama, tmp_path, _scores(score))


def test_a_killed_training_finds_the_same_best_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    def by_weights(model: PreTrainedModel) -> float:
        torch.rand(3)  # an evaluation that draws random numbers must not move the training's
        return float(sum(tensor.abs().sum() for name, tensor in trainable(model).items() if "lora_A" in name))

    whole, weights = _run(tiny_llama, tmp_path / "whole", by_weights)
    child = os.fork()
    if child == 0:
        calls: list[int] = []

        def and_die(model: PreTrainedModel) -> float:
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return by_weights(model)

        try:
            _run(tiny_llama, tmp_path / "killed", and_die)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    resumed, again = _run(tiny_llama, tmp_path / "killed", by_weights)
    assert (resumed.losses, resumed.best_step) == (whole.losses, whole.best_step)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_evaluation_and_its_interval_are_given_together(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="evaluate_every is 0 and an evaluation is given"):
        _run(tiny_llama, tmp_path, _scores(), evaluate_every=0)
    with pytest.raises(TrainError, match="evaluate_every is 2 and an evaluation is not given"):
        train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS, work=tmp_path)


def test_the_best_adapter_at_the_newest_checkpoint_is_kept_beside_the_best_of_all(
    tiny_llama: Path, tmp_path: Path
) -> None:
    _run(tiny_llama, tmp_path, _scores(5, 3, 4, 2, 1, 9))  # after steps 2, 4, … 12; checkpoints after 9 and 12
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-10", "best-8"]
