import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graftline.digest import Digest, of_bytes
from graftline.errors import TrainError
from graftline.train.checkpoint import (
    Journal,
    Replay,
    latest_checkpoint,
    load_trainable,
    new_checkpoint,
    replace_folder,
    save_object,
    save_trainable,
)
from graftline.train.loop import replay_limits
from graftline.train.results import StepMetrics

_INPUTS, _OTHER = of_bytes(b"this"), of_bytes(b"other")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def _write(work: Path, step: int) -> Path:
    with new_checkpoint(work, step, inputs=_INPUTS) as folder:
        save_trainable(_model(), folder)
    return work / f"checkpoint-{step}"


def _step(number: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(
        step=number, total_steps=9, loss=loss, grad_norm=1.0, learning_rate=0.1, tokens=5, supervised_tokens=2
    )


def _journal(work: Path, *, resumed_step: int = 0, inputs: Digest = _INPUTS) -> Journal:
    checkpoint = work / f"checkpoint-{resumed_step}" if resumed_step else None
    return Journal(work, inputs=inputs, checkpoint=checkpoint, replay=Replay(told=1e-3, refused=1e-2))


def test_only_trainable_parameters_are_written_and_they_come_back(tmp_path: Path) -> None:
    saved, changed = _model(), _model()
    save_trainable(saved, tmp_path)
    with torch.no_grad():
        changed[1].weight.zero_()
    load_trainable(changed, tmp_path)
    assert torch.equal(changed[1].weight, saved[1].weight)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * 10 + 250


def test_parameters_of_another_adapter_are_refused(tmp_path: Path) -> None:
    save_trainable(_model(), tmp_path)
    with pytest.raises(TrainError, match="holds 2 parameters that are not the 4 trainable ones"):
        load_trainable(_model().requires_grad_(True), tmp_path)


def test_the_newest_two_checkpoints_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (5, 9, 10, 100):
        _write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    assert latest_checkpoint(tmp_path, inputs=_INPUTS) == tmp_path / "checkpoint-100"


def test_a_checkpoint_that_was_not_finished_leaves_the_one_before(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    half = new_checkpoint(tmp_path, 10, inputs=_INPUTS)
    (half.__enter__() / "half").write_text("x")
    assert not half.__exit__(KeyError, KeyError(), None)
    (tmp_path / ".checkpoint-15.part").mkdir()  # what a kill leaves
    assert latest_checkpoint(tmp_path, inputs=_INPUTS) == tmp_path / "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add", "no identity"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    _write(tmp_path, 5)
    newest = _write(tmp_path, 10)
    weights = newest / "adapter.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    if damage == "flip":
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(data[:-3])
    elif damage == "remove":
        weights.unlink()
    elif damage == "add":
        (newest / "extra").write_text("x")
    else:
        (newest / "graftline.json").unlink()
    assert latest_checkpoint(tmp_path, inputs=_INPUTS) == tmp_path / "checkpoint-5"


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    with pytest.raises(TrainError, match="checkpoint-5 belongs to a training with other rows, settings or adapter"):
        latest_checkpoint(tmp_path, inputs=_OTHER)


def test_no_space_for_a_checkpoint_names_the_folder_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file where the folder should be")
    with pytest.raises(TrainError, match=r"cannot write .*checkpoint-5: Not a directory; make space there"):
        _write(tmp_path / "work", 5)


def test_a_journal_goes_on_after_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    first = _journal(tmp_path)
    for number in (1, 2, 3):
        first.append(_step(number, loss=float(number)))
    second = _journal(tmp_path, resumed_step=2)
    assert second.losses == (1.0, 2.0)
    second.append(_step(3, loss=3.0))
    second.append(_step(4, loss=4.0))
    assert _journal(tmp_path, resumed_step=4).losses == (1.0, 2.0, 3.0, 4.0)


def test_a_replayed_loss_that_differs_a_little_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = _journal(tmp_path)
    for number in (1, 2):
        first.append(_step(number, loss=2.0))
    second = _journal(tmp_path, resumed_step=1)
    second.append(_step(2, loss=2.01))
    assert "step 2 has loss 2.01 after the resume, but 2 was recorded before" in caplog.text


def test_steps_that_a_power_loss_took_from_the_journal_come_from_the_checkpoint(tmp_path: Path) -> None:
    first = _journal(tmp_path)
    for number in (1, 2, 3):
        first.append(_step(number, loss=float(number)))
    (tmp_path / "checkpoint-3").mkdir()
    first.copy_to(tmp_path / "checkpoint-3")
    path = tmp_path / "steps.jsonl"
    whole = path.read_text()
    for left in (whole.splitlines(keepends=True)[:2], []):
        path.write_text("".join(left))
        assert _journal(tmp_path, resumed_step=3).losses == (1.0, 2.0, 3.0)
        assert path.read_text() == whole


def test_a_replayed_loss_that_differs_from_the_recorded_one_stops_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _journal(tmp_path)
    for number in (1, 2, 3):
        first.append(_step(number, loss=2.0))
    second = _journal(tmp_path, resumed_step=1)
    second.append(_step(2, loss=2.0001))
    assert not caplog.records
    with pytest.raises(TrainError, match=r"step 3 has loss 2\.1 after the resume, but 2 was recorded before"):
        second.append(_step(3, loss=2.1))


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "not json\n", '{"step": 7}\n'])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, tail: str) -> None:
    first = _journal(tmp_path)
    for number in (1, 2):
        first.append(_step(number))
    path = tmp_path / "steps.jsonl"
    whole = path.read_text()
    path.write_text(whole + tail)
    _journal(tmp_path, resumed_step=2)
    assert path.read_text() == whole


def test_a_journal_of_another_training_or_one_that_lacks_steps_is_refused(tmp_path: Path) -> None:
    _journal(tmp_path).append(_step(1))
    with pytest.raises(TrainError, match="belongs to a training with other rows"):
        _journal(tmp_path, inputs=_OTHER)
    with pytest.raises(TrainError, match="holds 1 of the 4 steps before the checkpoint"):
        _journal(tmp_path, resumed_step=4)


def test_a_journal_line_holds_every_metric(tmp_path: Path) -> None:
    _journal(tmp_path).append(_step(1))
    line = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[1])
    assert set(line) == {
        "step", "total_steps", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "score"
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange two names at once")
def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "best-3"
    final.mkdir()
    (final / "weights").write_text("old", encoding="utf-8")
    there: list[bool] = []
    remove = shutil.rmtree

    def look(path: Path, **options: bool) -> None:
        there.append((final / "weights").exists())
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    with replace_folder(final) as folder:
        (folder / "weights").write_text("new", encoding="utf-8")
    assert there
    assert all(there)
    assert (final / "weights").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best-3"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told_though_torch_hides_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        save_object({"state": torch.zeros(50_000)}, Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(TrainError, match=r"cannot write .*checkpoint-1: No space left on device; make space there"):
        _fill_the_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _fill_the_disk(work: Path) -> None:
    with new_checkpoint(work, 1, inputs=_INPUTS) as folder:
        (folder / "state.pt").symlink_to("/dev/full")
        save_object({"state": torch.zeros(50_000)}, folder / "state.pt")


@pytest.mark.parametrize(("precision", "told"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_a_gpu_s_noise_warns_where_the_same_difference_on_a_cpu_stops_the_training(precision: str, told: float) -> None:
    assert replay_limits(precision, "cpu") == Replay(told=told, refused=told)
    on_gpu = replay_limits(precision, "cuda")
    assert (on_gpu.told, on_gpu.refused) == pytest.approx((told, 10 * told))
