import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from graftline.adapters.weights import AdapterWeights
from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.train.compiled import CompiledBlocks, compile_blocks
from graftline.train.distributed import launch, save_verified, trainable_digest, verify_replicas
from graftline.train.trainer import train
from graftline.weights.quant.folder import quantize_folder
from tests.sections import quantize_section, train_section
from tests.train.processes import run_processes
from tests.train.rows import lora_model, make_rows
from tests.train.two_processes import train_one

_ROWS = make_rows(40)
_SETTINGS = train_section(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=3, device="cpu")


@pytest.mark.slow
def test_torchrun_trains_dense_and_4_bit_bases_replicated_and_sharded(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_folder(tiny_llama, tmp_path / "nf4", quantize=quantize_section("nf4", double_quant=True))
    bases = {"dense": tiny_llama, "nf4": tmp_path / "nf4"}
    lines: list[str] = []
    command = ["tests.train.two_processes", *map(str, bases.values()), str(tmp_path / "two")]
    launch(command, processes=2, on_line=lines.append)
    for kind, base in bases.items():
        one = train_one(base, tmp_path / "one" / kind, batch_size=8, sharding=False)
        single = load_file(tmp_path / "one" / kind / "checkpoint-4" / "adapter.safetensors")
        for layout in ("replicated", "sharded"):
            folder = tmp_path / "two" / f"{base.name}-{layout}"
            assert json.loads((folder / "losses.json").read_text()) == pytest.approx(one.losses, rel=1e-5)
            double = load_file(folder / "checkpoint-4" / "adapter.safetensors")
            assert double.keys() == single.keys()
            for name, tensor in single.items():
                torch.testing.assert_close(double[name], tensor, rtol=1e-3, atol=1e-4)
            # What was saved, whole, by process 0 is what process 1 would have saved: compared by digest while saving.
            assert len(AdapterWeights.open(folder / "adapter").modules()) == 14


@pytest.mark.parametrize("sharding", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_give_the_result_of_one(
    tiny_llama: Path, tmp_path: Path, sharding: bool, accumulation: int
) -> None:
    one = train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS.replace(batch_size=8), work=tmp_path / "one")
    settings = _SETTINGS.replace(batch_size=4 // accumulation, gradient_accumulation=accumulation, sharding=sharding)

    def body(rank: int) -> None:
        result = train(lora_model(tiny_llama, seed=1 + rank), _ROWS, settings=settings, work=tmp_path / "two")
        assert result.losses == pytest.approx(one.losses, rel=1e-5)
        assert result.tokens == one.tokens

    assert run_processes(body) == [0, 0]
    single, double = (load_file(tmp_path / name / "checkpoint-6" / "adapter.safetensors") for name in ("one", "two"))
    assert double.keys() == single.keys()
    for name, tensor in single.items():
        torch.testing.assert_close(double[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_with_compiled_blocks_over_a_quantized_base_give_the_result_of_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_folder(tiny_llama, tmp_path / "nf4", quantize=quantize_section("nf4", double_quant=True))
    one = train_one(tmp_path / "nf4", tmp_path / "one", batch_size=8, sharding=False)
    blocks: list[CompiledBlocks | None] = []
    monkeypatch.setattr(
        "graftline.train.trainer.compile_blocks",
        lambda model: blocks.append(compile_blocks(model, backend="aot_eager")),
    )

    def body(rank: int) -> None:
        result = train_one(tmp_path / "nf4", tmp_path / "two", batch_size=4, sharding=False, compile="always")
        assert [each and each.why_not for each in blocks] == [None]
        assert blocks[0] is not None
        assert result.losses == pytest.approx(one.losses, rel=1e-5)

    assert run_processes(body) == [0, 0]
    single, double = (load_file(tmp_path / name / "checkpoint-4" / "adapter.safetensors") for name in ("one", "two"))
    for name, tensor in single.items():
        torch.testing.assert_close(double[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_sharded_base_goes_on_where_only_one_process_has_rows_with_a_shared_prefix(
    tiny_llama: Path, tmp_path: Path
) -> None:
    # Each step: two equal rows for one process, two different ones for the other.
    rows = [Encoded([9] * 12 + [at, at], [False] * 12 + [True, True]) for at in (4, 4)] + make_rows(2)

    def body(rank: int) -> None:
        train(lora_model(tiny_llama), rows, settings=_SETTINGS.replace(batch_size=2, sharding=True), work=tmp_path)

    assert run_processes(body) == [0, 0]


def test_two_processes_go_on_from_their_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    def run(work: Path, steps_until_death: int) -> list[int]:
        def body(rank: int) -> None:
            def on_step(metrics: object) -> None:
                if getattr(metrics, "step", 0) == steps_until_death:
                    raise KeyboardInterrupt

            model = lora_model(tiny_llama, dropout=0.1)
            result = train(model, _ROWS, settings=_SETTINGS, work=work, on_step=on_step)
            assert result.steps == 6

        return run_processes(body)

    assert run(tmp_path / "whole", 0) == [0, 0]
    assert run(tmp_path / "cut", 4)[0] == 1
    assert run(tmp_path / "cut", 0) == [0, 0]
    whole, cut = ((tmp_path / name / "checkpoint-6" / "adapter.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_a_saved_adapter_that_is_not_what_is_held_is_refused() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    saved = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    assert verify_replicas(layer, saved) == trainable_digest(saved)
    saved["bias"][0] += 1e-6
    with pytest.raises(TrainError, match=r"processes \[0\] hold another one"):
        verify_replicas(layer, saved)


def test_a_process_that_drifted_is_found(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.fill_(float(rank))
        saved = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
        with pytest.raises(TrainError, match=r"processes \[1\] hold another one"):
            verify_replicas(layer, saved)

    assert run_processes(body) == [0, 0]


def test_a_sharded_base_is_not_evaluated_in_training(tiny_llama: Path, tmp_path: Path) -> None:
    settings = _SETTINGS.replace(sharding=True, evaluate_every=1)
    with pytest.raises(TrainError, match="a sharded base cannot be evaluated in training"):
        train(lora_model(tiny_llama), _ROWS, settings=settings, work=tmp_path, evaluate=lambda model: 0.0)


def test_an_adapter_that_another_process_would_save_otherwise_is_found(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        save_verified(lambda folder: (folder / "same").write_text("1"), _made(tmp_path / "adapter"))
        assert (tmp_path / "adapter" / "same").read_text() == "1"
        with pytest.raises(TrainError, match=r"saved by process 0, but processes \[1\] hold another adapter"):
            save_verified(lambda folder: (folder / "own").write_text(str(rank)), _made(tmp_path / "other"))

    assert run_processes(body) == [0, 0]


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
