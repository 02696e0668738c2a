from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftline.errors import CheckpointError
from graftline.weights.quant.low_rank import FACTORS_FILE, factors_digest, read_factors

FACTORS = {"model.layers.0.q.lora_A": torch.randn(4, 8), "model.layers.0.q.lora_B": torch.randn(6, 4)}


def test_factors_are_read_by_module(tmp_path: Path) -> None:
    save_file(FACTORS, tmp_path / FACTORS_FILE)
    found = read_factors(tmp_path)
    assert found.keys() == {"model.layers.0.q"}
    assert torch.equal(found["model.layers.0.q"]["A"], FACTORS["model.layers.0.q.lora_A"])
    assert torch.equal(found["model.layers.0.q"]["B"], FACTORS["model.layers.0.q.lora_B"])


def test_digest_depends_on_the_values_only(tmp_path: Path) -> None:
    save_file(FACTORS, tmp_path / FACTORS_FILE, metadata={"a": "b"})
    one = factors_digest(tmp_path)
    save_file(FACTORS, tmp_path / FACTORS_FILE)
    assert factors_digest(tmp_path) == one
    save_file(FACTORS | {"model.layers.0.q.lora_B": torch.zeros(6, 4)}, tmp_path / FACTORS_FILE)
    assert factors_digest(tmp_path) != one


@pytest.mark.parametrize("names", [["m.lora_A"], ["m.lora_A", "m.lora_C"], ["m.weight"]])
def test_file_without_pairs_is_refused(tmp_path: Path, names: list[str]) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / FACTORS_FILE)
    with pytest.raises(CheckpointError, match="not exactly lora_A and lora_B"):
        read_factors(tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=FACTORS_FILE):
        read_factors(tmp_path)
