import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from graftline.errors import CheckpointError
from graftline.weights.identity import verify_identity
from graftline.weights.importing import import_base
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


@pytest.mark.parametrize("name", ["nothing", "weights.bin", "model.onnx"])
def test_other_kinds_of_path_are_refused(tmp_path: Path, name: str) -> None:
    if name != "nothing":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not a base"):
        import_base(tmp_path / name, tmp_path / "out", dtype=torch.bfloat16)
