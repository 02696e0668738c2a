import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from graftline.errors import BaseMismatchError, CheckpointError, QuantizeError
from graftline.settings.model import Quantize
from graftline.weights.identity import check_pair, read_identity, verify_identity
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.folder import DequantizingReader, initialize, peak_bytes_bound, quantizer_record
from graftline.weights.quant.low_rank import FactorSettings, factors_digest, read_factors
from graftline.weights.quant.scheme import plan_of
from graftline.weights.reader import CheckpointReader
from tests.sections import quantize_section
from tests.tiny import make_tiny_llama

NF4, NF3 = quantize_section(), quantize_section("nf3")
MIXED = quantize_section("mixed", double_quant=False, bits={"0-0": 4, r".*v_proj$": 3, ".*": 2})
PAIRED = [
    quantize_section(code, init=init, loftq_iterations=3)
    for code in ("nf4", "nf3", "nf2", "fp8")
    for init in ("loftq", "qpissa")
]
LOFTQ = quantize_section(init="loftq")


def rank_4(module: str) -> FactorSettings | None:
    """An adapter of rank 4 and s = 2 on everything but the output projections."""
    return None if module.endswith("o_proj") else FactorSettings(4, 2.0)


def edited(folder: Path, source: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class KilledError(Exception):
    """Stands for a process that ended."""


def kill_after(count: int, kill: Callable[[], None] | None = None) -> Callable[[int, int], None]:
    def on_progress(done: int, total: int) -> None:
        if done == count:
            if kill is not None:
                kill()
            raise KilledError

    return on_progress


def test_report_has_the_measured_error_bits_and_zeros_of_every_layer(tmp_path: Path, tiny_llama: Path) -> None:
    report = initialize(tiny_llama, tmp_path / "q", quantize=MIXED, seed=0)
    source, quantized = CheckpointReader(tiny_llama), DequantizingReader(tmp_path / "q")
    assert len(report.layers) == 14
    for layer in report.layers:
        w, q = source.read(f"{layer.module}.weight"), quantized.read(f"{layer.module}.weight")
        assert layer.error == pytest.approx(((w - q).norm() / w.norm()).item(), rel=1e-4)
        assert layer.error == layer.error_alone == layer.error_plain
        assert layer.zeros == pytest.approx((q == 0).float().mean().item(), abs=1e-6)
        assert 2 < layer.bits_per_weight < 5
    assert json.loads((tmp_path / "q" / "quantization.json").read_text()) == json.loads(json.dumps(report.as_json()))


def test_mixed_precision_follows_the_first_matching_rule(tmp_path: Path, tiny_llama: Path) -> None:
    report = initialize(tiny_llama, tmp_path / "q", quantize=MIXED, seed=0)
    codes = {layer.module.removeprefix("model.layers."): layer.code for layer in report.layers}
    assert codes["0.mlp.up_proj"] == "nf4"
    assert codes["0.self_attn.v_proj"] == "nf4"
    assert codes["1.self_attn.v_proj"] == "nf3"
    assert codes["1.mlp.up_proj"] == "nf2"


def test_average_bits_of_the_papers_mixture(tmp_path: Path, tiny_llama: Path) -> None:
    mixture = quantize_section("mixed", double_quant=False, bits={"0-0": 4, ".*": 2})
    report = initialize(tiny_llama, tmp_path / "q", quantize=mixture, seed=0)
    assert report.bits_per_weight == pytest.approx(3.5)  # half of 4, half of 2, and 32/64 for the constants


def test_what_is_not_a_linear_layer_of_a_block_keeps_its_bytes(tmp_path: Path, tiny_llama: Path) -> None:
    initialize(tiny_llama, tmp_path / "q", quantize=NF4, seed=0)
    source, quantized = CheckpointReader(tiny_llama), DequantizingReader(tmp_path / "q")
    dense = [name for name in source.names() if "proj" not in name]
    assert len(dense) == 6
    assert all(torch.equal(source.read(name), quantized.read(name)) for name in dense)
    assert not any(quantized.is_quantized(name) for name in dense)


@pytest.mark.parametrize("section", PAIRED, ids=lambda section: f"{section.method}-{section.init}")
def test_pair_is_nearer_to_the_weight_than_plain_quantization_on_every_layer(
    tmp_path: Path, tiny_llama: Path, section: Quantize
) -> None:
    report = initialize(tiny_llama, tmp_path / "q", quantize=section, seed=0, factors=rank_4)
    source, quantized, factors = (
        CheckpointReader(tiny_llama),
        DequantizingReader(tmp_path / "q"),
        read_factors(tmp_path / "q"),
    )
    assert len(factors) == 12
    for layer in report.layers:
        w, q = source.read(f"{layer.module}.weight"), quantized.read(f"{layer.module}.weight")
        assert layer.error_alone == pytest.approx(((w - q).norm() / w.norm()).item(), rel=1e-3)
        plain = dequantize(quantize(w, plan_of(section).default))
        assert layer.error_plain == pytest.approx(((w - plain).norm() / w.norm()).item(), rel=1e-3)
        if layer.module.endswith("o_proj"):
            assert layer.rank == 0
            assert layer.error == layer.error_plain
            continue
        low = 2.0 * factors[layer.module]["B"] @ factors[layer.module]["A"]
        assert layer.error == pytest.approx(((w - q - low).norm() / w.norm()).item(), rel=1e-3)
        assert layer.error < layer.error_plain
        assert layer.error == min(layer.step_errors)
        assert len(layer.step_errors) == 3


def test_the_seed_decides_where_the_decompositions_start(tmp_path: Path, tiny_llama: Path) -> None:
    found = []
    for number, seed in enumerate((0, 1, 0)):
        initialize(tiny_llama, tmp_path / str(number), quantize=LOFTQ, seed=seed, factors=rank_4)
        found.append(read_factors(tmp_path / str(number)))
    first, other, again = found
    for module, pair in first.items():
        assert torch.equal(pair["A"], again[module]["A"])
        assert not torch.equal(pair["A"], other[module]["A"])


def test_base_and_factors_are_bound_to_each_other(tmp_path: Path, tiny_llama: Path) -> None:
    report = initialize(tiny_llama, tmp_path / "q", quantize=PAIRED[0], seed=0, factors=rank_4)
    other = initialize(tiny_llama, tmp_path / "r", quantize=PAIRED[1], seed=0, factors=rank_4)
    identity = verify_identity(tmp_path / "q")
    assert identity.pair == report.pair == factors_digest(tmp_path / "q")
    assert identity.source_digest == read_identity(tiny_llama).digest
    assert identity.quantizer == quantizer_record(PAIRED[0], 0)
    check_pair(identity, factors_digest(tmp_path / "q"))
    for wrong in (None, other.pair):
        with pytest.raises(BaseMismatchError, match="use it only with the adapter"):
            check_pair(identity, wrong)


def test_the_record_of_a_quantizer_has_the_words_that_older_bases_have() -> None:
    scheme = {"code": "nf4", "block_size": 64, "double_quant": True}
    alone = {"method": "none", "quantization": {"default": scheme, "rules": []}}
    assert quantizer_record(NF4, 7) == alone
    assert quantizer_record(PAIRED[0], 7) == alone | {"method": "loftq", "steps": 3, "seed": 7}
    mixed = quantizer_record(MIXED, 7)["quantization"]
    assert mixed["default"] == scheme | {"double_quant": False}
    assert [[pattern, found["code"]] for pattern, found in mixed["rules"]] == [
        [r".*\.(?:0)\.", "nf4"],
        [".*v_proj$", "nf3"],
        [".*", "nf2"],
    ]


def test_killed_process_loses_at_most_the_tensor_at_hand(tmp_path: Path, tiny_llama: Path) -> None:
    whole = initialize(tiny_llama, tmp_path / "whole", quantize=PAIRED[0], seed=0, factors=rank_4)
    for count in (3, 8, 12, 19):
        child = os.fork()
        if child == 0:
            kill = kill_after(count, lambda: os.kill(os.getpid(), signal.SIGKILL))
            initialize(tiny_llama, tmp_path / "q", quantize=PAIRED[0], seed=0, factors=rank_4, on_progress=kill)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not (tmp_path / "q").exists()
    again = initialize(tiny_llama, tmp_path / "q", quantize=PAIRED[0], seed=0, factors=rank_4)
    assert again == whole
    assert files(tmp_path / "q") == files(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 7, 14, 20])
def test_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, tiny_llama: Path, count: int) -> None:
    whole = initialize(tiny_llama, tmp_path / "whole", quantize=PAIRED[0], seed=0, factors=rank_4)
    with pytest.raises(KilledError):
        initialize(
            tiny_llama, tmp_path / "q", quantize=PAIRED[0], seed=0, factors=rank_4, on_progress=kill_after(count)
        )
    assert not (tmp_path / "q").exists()
    again = initialize(tiny_llama, tmp_path / "q", quantize=PAIRED[0], seed=0, factors=rank_4)
    assert again == whole
    assert files(tmp_path / "q") == files(tmp_path / "whole")


def test_finished_layers_of_an_interrupted_run_are_not_made_again(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KilledError):
        initialize(tiny_llama, tmp_path / "q", quantize=NF4, seed=0, on_progress=kill_after(19))
    read: list[str] = []
    original = CheckpointReader.read
    monkeypatch.setattr(CheckpointReader, "read", lambda self, name: read.append(name) or original(self, name))
    initialize(tiny_llama, tmp_path / "q", quantize=NF4, seed=0)
    assert read == CheckpointReader(tiny_llama).names()[19:]


def test_interrupted_run_with_another_plan_starts_anew(tmp_path: Path, tiny_llama: Path) -> None:
    expected = initialize(tiny_llama, tmp_path / "whole", quantize=NF3, seed=0)
    with pytest.raises(KilledError):
        initialize(tiny_llama, tmp_path / "q", quantize=NF4, seed=0, on_progress=kill_after(15))
    assert initialize(tiny_llama, tmp_path / "q", quantize=NF3, seed=0) == expected


def test_shards_are_read_and_the_result_does_not_depend_on_them(tmp_path: Path, tiny_llama: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    one = initialize(tiny_llama, tmp_path / "one", quantize=NF4, seed=0)
    assert initialize(tmp_path / "sharded", tmp_path / "two", quantize=NF4, seed=0).digest == one.digest


def test_half_precision_source_is_quantized_as_it_is(tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "bf16", dtype=torch.bfloat16)
    report = initialize(source, tmp_path / "q", quantize=PAIRED[0], seed=0, factors=rank_4)
    assert all(layer.error < layer.error_plain for layer in report.layers if layer.rank)
    assert CheckpointReader(tmp_path / "q").info("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_inf_and_nan_are_refused_with_the_tensor_named(
    tmp_path: Path, tiny_llama: Path, value: float, name: str
) -> None:
    source = edited(tmp_path / "bad", tiny_llama, lambda tensors: tensors[name][-1].fill_(value))
    with pytest.raises(QuantizeError, match=f"{name}.*holds Inf or NaN"):
        initialize(source, tmp_path / "q", quantize=NF4, seed=0)
    assert not (tmp_path / "q").exists()


def test_quantizing_a_quantized_base_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    initialize(tiny_llama, tmp_path / "q", quantize=NF4, seed=0)
    with pytest.raises(QuantizeError, match="is quantized already"):
        initialize(tmp_path / "q", tmp_path / "qq", quantize=NF4, seed=0)


def test_weight_that_is_not_two_dimensional_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def split(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].reshape(2, 64, 64)

    source = edited(tmp_path / "bad", tiny_llama, split)
    with pytest.raises(QuantizeError, match=rf"{name} has shape \(2, 64, 64\)"):
        initialize(source, tmp_path / "q", quantize=NF4, seed=0)


def test_truncated_source_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        initialize(tmp_path / "bad", tmp_path / "q", quantize=NF4, seed=0)


def test_too_little_disk_is_found_before_anything_is_written(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="its disk has 1000 free"):
        initialize(tiny_llama, tmp_path / "q", quantize=NF4, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "factors", "message"),
    [
        (quantize_section("none"), None, "quantize.method is none"),
        (LOFTQ, None, "the adapter's ranks and scales are needed"),
        (LOFTQ, lambda _: None, "found no layer with an adapter"),
        (LOFTQ, lambda _: FactorSettings(33, 1.0), "rank 33 for a weight of shape"),
        (LOFTQ, lambda _: FactorSettings(0, 1.0), "rank 0"),
        (quantize_section("mixed", bits={"model.layer.0": 2}), None, "matches no linear layer"),
        (quantize_section("mixed", bits={"lm_head": 4}), None, "head, embeddings and norms stay dense"),
        (quantize_section("mixed", bits={"model.embed_tokens": 4}), None, "stay dense"),
        (quantize_section("mixed", bits={"3-1": 4}), None, "layers 3-1; expected the smaller number first"),
        (quantize_section("mixed", bits={"(": 4}), None, r"'\(' is not a regular expression"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path,
    tiny_llama: Path,
    section: Quantize,
    factors: Callable[[str], FactorSettings | None] | None,
    message: str,
) -> None:
    with pytest.raises(QuantizeError, match=message):
        initialize(tiny_llama, tmp_path / "q", quantize=section, seed=0, factors=factors)
    assert not (tmp_path / "q").exists()


def test_bound_is_four_times_the_largest_tensor_and_a_constant(tiny_llama: Path) -> None:
    largest = 512 * 64 * 4
    assert peak_bytes_bound(tiny_llama) == 4 * largest + 700_000_000
