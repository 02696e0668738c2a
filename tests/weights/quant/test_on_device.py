"""Quantization and its factors on another device than the CPU."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from graftline.settings.model import Quantize
from graftline.weights.quant.blockwise import NestedConstants, QuantizedWeight, dequantize, quantize
from graftline.weights.quant.folder import device_bytes_bound, initialize
from graftline.weights.quant.low_rank import FactorSettings
from graftline.weights.quant.report import REPORT_FILE, initialize_paired, initialize_plain
from graftline.weights.quant.scheme import FP8, Scheme
from graftline.weights.reader import CheckpointReader
from tests.sections import quantize_section
from tests.spy_device import back, on_other_device, other_device

SCHEMES = {
    "nf4": Scheme("nf4", 64, True),
    "nf4, plain constants": Scheme("nf4", 64, False),
    "nf3": Scheme("nf3", 64, True),
    "nf2": Scheme("nf2", 128, True),
    "fp8": FP8,
}
FACTORS = FactorSettings(rank=4, scale=0.5)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Its blocks do not end with its rows, and the last one is short."""
    return torch.randn(90, 70, generator=torch.Generator().manual_seed(0)).bfloat16()


def parts(quantized: QuantizedWeight) -> list[torch.Tensor]:
    held = quantized.absmax
    return [
        quantized.packed,
        *([held.codes, held.absmax, held.offset] if isinstance(held, NestedConstants) else [held]),
    ]


@pytest.mark.parametrize("kind", SCHEMES)
def test_plain_codes_and_constants_are_the_cpus_and_nothing_stays_behind_there(kind: str, weight: torch.Tensor) -> None:
    expected = initialize_plain("layer", weight, SCHEMES[kind])
    with other_device():
        found = initialize_plain("layer", on_other_device(weight), SCHEMES[kind])
        assert all(map(torch.equal, map(back, parts(found.quantized)), parts(expected.quantized)))
        dense = dequantize(found.quantized, torch.bfloat16)
    assert torch.equal(back(dense), dequantize(expected.quantized, torch.bfloat16))
    assert found.report == expected.report


@pytest.mark.parametrize("method", ["loftq", "qpissa"])
@pytest.mark.parametrize("kind", ["nf4", "nf3", "nf2", "fp8"])
def test_a_paired_layer_is_made_where_its_weight_lies(kind: str, method: Any, weight: torch.Tensor) -> None:
    given: dict[str, Any] = {"method": method, "steps": 3, "seed": 1}
    expected = initialize_paired("layer", weight, SCHEMES[kind], FACTORS, **given)
    with other_device():
        found = initialize_paired("layer", on_other_device(weight), SCHEMES[kind], FACTORS, **given)
        assert found.factors is not None
        A_RI, B_OR = map(back, found.factors)
        assert torch.equal(back(found.quantized.packed), expected.quantized.packed)
    assert expected.factors is not None
    torch.testing.assert_close((A_RI, B_OR), expected.factors, rtol=1e-6, atol=1e-6)
    assert found.report.error == pytest.approx(expected.report.error, rel=1e-6)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_pieces_of_a_device_give_the_cpus_bytes(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [parts(quantize(weight, scheme)) for scheme in SCHEMES.values()]
    monkeypatch.setattr("graftline.weights.quant.blockwise.PIECE", 4096 * 6)
    found = [parts(quantize(weight, scheme)) for scheme in SCHEMES.values()]
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


def test_the_next_tensor_is_read_while_one_is_quantized(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = CheckpointReader(tiny_llama).names()
    begun = {name: threading.Event() for name in names}
    read, make = CheckpointReader.read, initialize_plain

    def noted(self: CheckpointReader, name: str) -> torch.Tensor:
        begun[name].set()
        return read(self, name)

    def waiting(module: str, *args: Any) -> Any:
        following = names[names.index(f"{module}.weight") + 1]
        assert begun[following].wait(60), f"{following} is not read before {module} is done"
        return make(module, *args)

    monkeypatch.setattr(CheckpointReader, "read", noted)
    monkeypatch.setattr("graftline.weights.quant.folder.initialize_plain", waiting)
    initialize(tiny_llama, tmp_path / "q", quantize=quantize_section(), seed=0)


def test_a_failed_write_ends_the_initialization(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("graftline.weights.quant.folder.InitOutput.add_layer", refuse)
    with pytest.raises(OSError, match="the disk is full"):
        initialize(tiny_llama, tmp_path / "q", quantize=quantize_section(), seed=0)
    assert not (tmp_path / "q").exists()


def test_the_bound_on_a_gpu_is_that_of_the_weights_that_are_quantized(tiny_llama: Path) -> None:
    reader = CheckpointReader(tiny_llama)
    largest = max(reader.info(name).num_bytes for name in reader.names() if name.endswith("_proj.weight"))
    assert device_bytes_bound(tiny_llama) == 4 * largest + 700_000_000


@pytest.mark.gpu
@cuda
def test_a_plain_folder_made_on_a_gpu_has_the_bytes_of_the_cpus(tiny_llama: Path, tmp_path: Path) -> None:
    for method in ("nf4", "nf3", "nf2", "fp8"):
        for device in ("cpu", "cuda"):
            out = tmp_path / f"{method}-{device}"
            initialize(tiny_llama, out, quantize=Quantize(method=method), seed=0, device=device)
        found, expected = files(tmp_path / f"{method}-cuda"), files(tmp_path / f"{method}-cpu")
        reports = [json.loads(each.pop(REPORT_FILE)) for each in (found, expected)]
        assert found == expected
        layers = [report.pop("layers") for report in reports]  # measured errors are sums in another order
        assert reports[0] == reports[1]
        for one, other in zip(*layers, strict=True):
            assert one == {
                key: pytest.approx(value, rel=1e-4) if key.startswith("error") else value
                for key, value in other.items()
            }


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("method", ["loftq", "qpissa"])
def test_on_a_gpu_a_paired_layers_error_is_the_cpus(method: Any, record_property: Any) -> None:
    W_OI = torch.randn(512, 768, generator=torch.Generator().manual_seed(0)).bfloat16()
    given: dict[str, Any] = {"method": method, "steps": 5, "seed": 1}
    expected = initialize_paired("layer", W_OI, SCHEMES["nf4"], FACTORS, **given)
    found = initialize_paired("layer", W_OI.cuda(), SCHEMES["nf4"], FACTORS, **given)
    assert found.report.error == pytest.approx(expected.report.error, rel=1e-3)
    differing = found.quantized.packed.cpu().ne(expected.quantized.packed).double().mean()
    record_property("share of differing bytes", float(differing))
