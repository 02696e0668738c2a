"""Starting a training's processes: who starts whom, on one machine and on several."""

import sys
from collections.abc import Sequence

import pytest

from graftline.errors import TrainError
from graftline.train import distributed as module
from graftline.train.distributed import launch, must_launch


def test_the_first_process_launches_and_those_of_torchrun_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [must_launch(processes) for processes in (1, 2)] == [False, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not must_launch(2)
    with pytest.raises(
        TrainError, match=r"torchrun started 2 processes, train\.processes is 1.*: write train\.processes: 2"
    ):
        must_launch(1)


def _spy(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    ran: list[Sequence[str]] = []
    monkeypatch.setattr(module, "_run", lambda torchrun, on_line: ran.append(torchrun))
    return ran


def test_on_one_machine_torchrun_finds_a_port_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _spy(monkeypatch)
    launch(["tasks.train", "pets"], processes=4, on_line=print)
    assert ran == [
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=4",
            "--standalone",
            "-m",
            "tasks.train",
            "pets",
        ]
    ]


def test_one_of_several_machines_does_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _spy(monkeypatch)
    monkeypatch.setenv("PET_NNODES", "2")
    with pytest.raises(TrainError, match=r"PET_NNODES is 2, .*Run `torchrun -m tasks\.train pets` on each"):
        launch(["tasks.train", "pets"], processes=16, on_line=print)
    assert ran == []
    monkeypatch.setenv("PET_NNODES", "1")
    launch(["tasks.train", "pets"], processes=2, on_line=print)
    assert len(ran) == 1


def test_the_first_process_s_explanation_becomes_the_error() -> None:
    lines: list[str] = []
    code = "print('starting'); print('error: the base is gone'); print('error: other'); raise SystemExit(1)"
    with pytest.raises(TrainError, match=r"^the base is gone$"):
        module._run([sys.executable, "-c", code], lines.append)
    assert lines == ["starting", "error: the base is gone", "error: other"]
    with pytest.raises(TrainError, match="torchrun ended with exit code 3"):
        module._run([sys.executable, "-c", "raise SystemExit(3)"], lines.append)
