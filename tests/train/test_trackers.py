import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from graftline.errors import TrainError
from graftline.train.results import StepMetrics, TrainResult, ignore_step
from graftline.train.trainer import train
from tests.sections import train_section
from tests.train.killing import kill_at, run_and_die
from tests.train.rows import lora_model, make_rows

_SETTINGS = train_section(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2, evaluate_every=3, device="cpu")


def _train(
    folder: Path,
    work: Path,
    report_to: Sequence[str],
    *,
    on_step: Callable[[StepMetrics], None] = ignore_step,
) -> TrainResult:
    given = iter([0.5, 0.25])

    def evaluate(model: PreTrainedModel) -> float:
        return next(given)

    settings = _SETTINGS.replace(report_to=tuple(report_to))
    rows, model = make_rows(24), lora_model(folder)
    return train(model, rows, settings=settings, work=work, on_step=on_step, evaluate=evaluate, trackers=work / "told")


def _tensorboard(work: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(work / "told" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def _dvclive(work: Path, name: str) -> list[tuple[int, float]]:
    lines = (work / f"told/dvclive/plots/metrics/{name}.tsv").read_text().splitlines()[1:]
    return [(int(step), float(value)) for step, value in (line.split("\t") for line in lines)]


def test_tensorboard_and_dvclive_hold_every_loss_and_score(tiny_llama: Path, tmp_path: Path) -> None:
    result = _train(tiny_llama, tmp_path, ["tensorboard", "dvclive"])
    assert [step for step, _ in _tensorboard(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6]
    for told in (_tensorboard(tmp_path, "train/loss"), _dvclive(tmp_path, "loss")):
        assert [loss for _, loss in told] == pytest.approx(result.losses, rel=1e-6)
    assert _tensorboard(tmp_path, "eval/loss") == [(3, 0.5), (6, 0.25)]
    assert _dvclive(tmp_path, "eval/loss") == [(3, 0.5), (6, 0.25)]
    assert [rate for _, rate in _dvclive(tmp_path, "learning_rate")] == [1e-2] * 6


@pytest.mark.parametrize("tracker", ["tensorboard", "dvclive"])
def test_a_resumed_training_has_one_curve_without_gaps_and_repetitions(
    tiny_llama: Path, tmp_path: Path, tracker: str
) -> None:
    # after checkpoint 4
    assert run_and_die(lambda: _train(tiny_llama, tmp_path, [tracker], on_step=kill_at(5))) == signal.SIGKILL
    result = _train(tiny_llama, tmp_path, [tracker])
    told = _tensorboard(tmp_path, "train/loss") if tracker == "tensorboard" else _dvclive(tmp_path, "loss")
    assert [loss for _, loss in told] == pytest.approx(result.losses, rel=1e-6)
    assert [step for step, _ in told] == [1, 2, 3, 4, 5, 6]


def test_who_is_told_does_not_change_the_training(tiny_llama: Path, tmp_path: Path) -> None:
    first = _train(tiny_llama, tmp_path, [])
    second = _train(tiny_llama, tmp_path, ["dvclive"])  # the same work folder: finished already
    assert second.losses == first.losses


def test_mlflow_holds_every_loss(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not in this environment (docs/training.md)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    result = _train(tiny_llama, tmp_path, ["mlflow"])
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    history = sorted(client.get_metric_history(run.info.run_id, "loss"), key=lambda point: point.step)
    assert [(point.step, point.value) for point in history] == [
        (step, pytest.approx(loss)) for step, loss in enumerate(result.losses, 1)
    ]
    assert [point.value for point in client.get_metric_history(run.info.run_id, "eval_loss")] == [0.5, 0.25]


def test_a_tracker_that_is_not_installed_says_how_to_get_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainError, match=r"train\.report_to names mlflow, which is not installed; run: pip install"):
        _train(tiny_llama, tmp_path, ["mlflow"])


def test_wandb_holds_every_loss_without_a_network(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not in this environment (docs/training.md)")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    result = _train(tiny_llama, tmp_path, ["wandb"])
    (file,) = (tmp_path / "told" / "wandb").rglob("*.wandb")
    # Its own reader is not public; values stand in the file as JSON.
    values = {float(value) for value in re.findall(rb"\d+\.\d+", file.read_bytes())}
    assert all(any(abs(value - loss) < 1e-6 for value in values) for loss in result.losses)
