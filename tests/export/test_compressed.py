"""FP8 and W4A16 as compressed-tensors lays them out: read with that library, and loaded by transformers on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from graftline.adapters.peft_format import load_exact
from graftline.errors import CheckpointError, ExportError
from graftline.export.compressed import FORMATS, Format, compress_folder, pack, to_fp8, to_int4
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.weighted import InputMoments
from tests.sections import quantize_section
from tests.tiny import make_tiny_llama
from tests.weights.families import make_family

ROWS = [[(7 * row + 3 * at) % 50 + 3 for at in range(24)] for row in range(12)]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    """The tiny Llama in every layout; what it holds lies beside it, dense."""
    folder = tmp_path_factory.mktemp("compressed")
    for kind in FORMATS:
        compress_folder(tiny_llama, folder / kind, kind, dense=folder / f"{kind}-dense", rows=ROWS)
    return {kind: folder / kind for kind in FORMATS}


@pytest.mark.parametrize("kind", FORMATS)
def test_transformers_loads_it_and_computes_with_the_weights_that_were_judged(
    made: dict[Format, Path], kind: Format
) -> None:
    pytest.importorskip("compressed_tensors")
    theirs = AutoModelForCausalLM.from_pretrained(made[kind], dtype=torch.float32)
    ours = load_exact(made[kind].with_name(f"{kind}-dense"))
    ids = torch.tensor(ROWS[:3])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


def test_packed_codes_are_those_of_the_library() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = torch.randint(-8, 8, (5, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(pack(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack_from_int32(pack(codes), 4, codes.shape), codes)


def test_codes_lie_in_an_int32_from_the_lowest_bits_up() -> None:
    codes = torch.tensor([[-8, -7, 0, 7, -8, -8, -8, 7]], dtype=torch.int8)
    assert pack(codes).tolist() == [[-0x10000000 + 0x0000F810]]


def equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_outside_the_blocks_keep_their_bytes_and_are_named_as_left_out(
    made: dict[Format, Path], tiny_llama: Path, kind: Format
) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, made[kind]))
    kept = {name for name in before if name in after and equal(before[name], after[name])}
    assert "model.embed_tokens.weight" in kept
    assert {name for name in before if "norm" in name} <= kept
    assert not any("proj" in name for name in kept)
    config = json.loads((made[kind] / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["quant_method"] == "compressed-tensors"


def test_a_row_in_fp8_is_within_half_a_step_of_its_code() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    made = to_fp8(weight, torch.bfloat16)
    assert made.parts["weight"].dtype == torch.float8_e4m3fn
    assert made.parts["weight_scale"].shape == (16, 1)
    # Three bits behind the leading one, and the scale's own rounding, which can cut the largest weight.
    assert bool(((made.dense - weight).abs() <= weight.abs() / 16 + made.parts["weight_scale"].float() / 512).all())
    assert not made.dense[3].any()


def test_calibrated_codes_err_less_on_the_inputs_than_rounded_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(64, 64, generator=draw) / 8
    inputs = torch.randn(2000, 64, generator=draw) @ mixed  # correlated, as activations are
    weight = torch.randn(32, 64, generator=draw)
    full, none = InputMoments(64, "full"), torch.eye(64)
    full.add(inputs)
    calibrated = to_int4(weight, torch.float32, group=32, L_II=full.metric("layer").L_II)  # type: ignore[attr-defined]
    rounded = to_int4(weight, torch.float32, group=32, L_II=none)
    errors = [float(((made.dense - weight) @ inputs.T).square().mean()) for made in (calibrated, rounded)]
    assert errors[0] < 0.7 * errors[1]
    # Without correlation nothing is passed on: every weight is the nearest code of its group.
    scale = rounded.parts["weight_scale"].repeat_interleave(32, 1)
    assert torch.equal(rounded.dense, (weight / scale).round().clamp(-8, 7) * scale)


def test_a_sixteen_bit_model_keeps_its_type_and_scales_are_of_that_type(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    compress_folder(model, tmp_path / "out", "w4a16", dense=tmp_path / "dense", rows=ROWS)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("scale")} == {torch.bfloat16}
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


def test_what_the_layouts_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, tiny_llama: Path) -> None:
    def refused(folder: Path, kind: Format, message: str, rows: list[list[int]] = ROWS) -> None:
        with pytest.raises(ExportError, match=message):
            compress_folder(folder, tmp_path / "out", kind, dense=tmp_path / "dense", rows=rows)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*part"))

    quantize_folder(tiny_llama, tmp_path / "nf4", quantize=quantize_section())
    refused(tmp_path / "nf4", "fp8", "quantized already")
    refused(make_family(tmp_path / "gpt2", "GPT2LMHeadModel"), "fp8", "no nn.Linear layers")
    refused(make_family(tmp_path / "moe", "MixtralForCausalLM"), "fp8", "MixtralForCausalLM has experts")
    refused(tiny_llama, "w4a16", "no calibration rows were given", [])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        compress_folder(tiny_llama, tmp_path / "there", "fp8", dense=tmp_path / "dense")
