"""Starting a training's processes: who starts whom, on one machine and on several."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from graftline.adapters.peft_format import AdapterIdentity
from graftline.digest import of_json
from graftline.errors import TrainError
from graftline.settings import parse_config
from graftline.train import adapter
from graftline.train import distributed as module
from graftline.train.distributed import launch, must_launch
from graftline.workflow import training
from tests.sections import adapter_section, train_section
from tests.workflow.tiny_project import tiny_settings


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


class ReachedError(Exception):
    pass


def test_each_process_selects_its_gpu_before_it_asks_about_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(kind: str) -> None:
        assert kind == "cuda"
        raise ReachedError

    monkeypatch.setattr(training, "resolve_device", lambda _: "cuda")
    monkeypatch.setattr(training, "start_processes", stop)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: pytest.fail("asked about GPU 0"))
    document = {"pipelines": {"pets": tiny_settings()}, "channels": {"production": {}}}
    pipeline = parse_config(yaml.safe_dump(document).encode(), Path("pipelines.yaml")).pipeline("pets")
    none = Path("nowhere")
    with pytest.raises(ReachedError):
        training.train_here(pipeline, None, rows=none, encoded=none, out=none)  # type: ignore[arg-type]


def test_each_process_loads_its_base_onto_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: Path, *, device: str, dtype: torch.dtype) -> None:
        assert (device, dtype) == ("cuda:1", torch.bfloat16)
        raise ReachedError

    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, value in (("resolve_device", "cuda"), ("resolve_precision", "bf16"), ("used_bytes", 0)):
        monkeypatch.setattr(adapter, name, lambda *_, _value=value: _value)
    monkeypatch.setattr(adapter, "return_freed_tensors", lambda _: None)
    monkeypatch.setattr(adapter, "load_base", load)
    none = Path("nowhere")
    with pytest.raises(ReachedError):
        adapter.train_adapter(
            [],
            [],
            settings=train_section(steps=1),
            adapter=adapter_section("lora"),
            identity=AdapterIdentity(base_digest=of_json("base")),
            folders=adapter.Folders(base=none, out=none, work=none, trackers=none),
            planned={},
        )
