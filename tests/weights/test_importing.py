import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graftline.errors import CheckpointError, NumberTypeError
from graftline.weights.identity import verify_identity
from graftline.weights.importing import import_base
from graftline.weights.quant.linear import load_model
from graftline.weights.reader import CheckpointReader


def test_folder_is_cast_and_complete(tmp_path: Path, tiny_llama: Path) -> None:
    digest = import_base(tiny_llama, tmp_path / "out", dtype=torch.bfloat16)
    source, out = CheckpointReader(tiny_llama), CheckpointReader(tmp_path / "out")
    assert source.names() == out.names()
    assert all(torch.equal(out.read(name), source.read(name).bfloat16()) for name in source.names())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(report.values())
    assert verify_identity(tmp_path / "out").digest == digest
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_same_weights_give_the_same_digest_however_they_came(tmp_path: Path, tiny_llama: Path) -> None:
    one = import_base(tiny_llama, tmp_path / "one", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    shutil.copytree(tiny_llama, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert import_base(tmp_path / "sharded", tmp_path / "two", dtype=torch.float32) == one


def test_quantized_folder_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is quantized \(gptq\)"):
        import_base(tmp_path / "m", tmp_path / "out", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "stored", "value", "wider"),
    [
        (torch.float16, torch.float32, 1e6, "bfloat16 or float32 or float64"),
        (torch.float16, torch.bfloat16, -7e4, "bfloat16 or float32 or float64"),
        (torch.bfloat16, torch.float64, 1e300, "float64"),
        (torch.float32, torch.float64, 1e39, "float64"),
        (torch.bfloat16, torch.float32, 3.4e38, "float32 or float64"),
    ],
)
def test_a_weight_that_its_number_type_cannot_hold_is_refused_by_name(
    tmp_path: Path, tiny_llama: Path, dtype: torch.dtype, stored: torch.dtype, value: float, wider: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    large = tensors["model.layers.1.mlp.up_proj.weight"].to(stored)
    large[3, 5] = value
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": large}, folder / "model.safetensors")
    with pytest.raises(
        NumberTypeError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight has values of .*; choose {wider}$"
    ):
        import_base(folder, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
    if dtype == torch.float16:
        with pytest.raises(NumberTypeError, match="up_proj"):
            load_model(folder, dtype=dtype)


def test_the_largest_number_of_a_type_is_written(tmp_path: Path, tiny_llama: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:2] = torch.tensor([65504.0, -65504.0])
    save_file(tensors, folder / "model.safetensors")
    import_base(folder, tmp_path / "out", dtype=torch.float16)
    assert CheckpointReader(tmp_path / "out").read("model.norm.weight")[:2].tolist() == [65504.0, -65504.0]


def test_what_a_tool_left_of_a_quantization_does_not_come_along(tmp_path: Path, tiny_llama: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None, "torch_dtype": "float16"}))
    import_base(folder, tmp_path / "out", dtype=torch.float32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    assert "torch_dtype" not in written
    assert written["dtype"] == "float32"


@pytest.mark.parametrize("name", ["nothing", "weights.bin", "model.onnx"])
def test_other_kinds_of_path_are_refused(tmp_path: Path, name: str) -> None:
    if name != "nothing":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not a base"):
        import_base(tmp_path / name, tmp_path / "out", dtype=torch.bfloat16)
