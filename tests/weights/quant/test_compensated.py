"""Rounding whose errors are made up for by the columns that follow, against a dense computation and every choice."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftline.errors import QuantizeError
from graftline.weights.identity import read_identity
from graftline.weights.quant.blockwise import QuantizedWeight, dequantize, quantize
from graftline.weights.quant.compensated import quantize_compensated, sweep
from graftline.weights.quant.folder import Calibration, DequantizingReader, quantize_folder
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.scheme import FP8, Scheme, code_table
from graftline.weights.quant.weighted import DAMPING, FullMetric, InputMoments
from tests.sections import quantize_section
from tests.weights.families import make_family

# Blocks that cross rows, and rows of several blocks; constants in 32 and in 8 bits; a scale a row.
SCHEMES = [Scheme("nf4", 32, False), Scheme("nf4", 64, True), Scheme("nf3", 64, False), Scheme("nf2", 32, True), FP8]
NF4 = SCHEMES[1]
ROWS = [[(5 * at + 3 * row + 4) % 90 + 4 for at in range(4 + row)] for row in range(12)]


def alike(num_rows: int, num_inputs: int, *, seed: int = 0) -> Tensor:
    """Inputs (N, I) that mostly lie in a few directions, as activations do."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(num_rows, 4, generator=draw) @ torch.randn(4, num_inputs, generator=draw)
    return few + 0.3 * torch.randn(num_rows, num_inputs, generator=draw)


def metric_of(x_NI: Tensor) -> FullMetric:
    moments = InputMoments(x_NI.shape[1], "full")
    moments.add(x_NI)
    metric = moments.metric("layer")
    assert isinstance(metric, FullMetric)
    return metric


def weight(num_outputs: int, num_inputs: int, *, seed: int = 1) -> Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def error_on(x_NI: Tensor, exact_OI: Tensor, quantized: QuantizedWeight) -> float:
    return float((x_NI @ (dequantize(quantized) - exact_OI).T).norm())


def levels(quantized: QuantizedWeight) -> Tensor:
    """What each weight (O, I) could have become under its constant: (codes, O, I)."""
    count = 256 if quantized.scheme.code == "fp8" else 2**quantized.scheme.bits
    bits = torch.arange(count, dtype=torch.uint8)
    table = bits.view(torch.float8_e4m3fn).float() if count == 256 else code_table(quantized.scheme.code)
    # The largest value is that of one code, so that dividing by it gives the constants.
    ones = QuantizedWeight(torch.full_like(quantized.packed, 0x38 if count == 256 else 0xFF), *vars_of(quantized))
    return table[table.isfinite()].view(-1, 1, 1) * dequantize(ones)


def vars_of(quantized: QuantizedWeight) -> tuple[Any, tuple[int, ...], Scheme]:
    return quantized.absmax, quantized.shape, quantized.scheme


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.code}-{scheme.block_size}")
@pytest.mark.parametrize("num_inputs", [48, 131])
def test_each_code_is_the_nearest_to_what_a_dense_elimination_leaves(scheme: Scheme, num_inputs: int) -> None:
    """Optimal Brain Quantization column by column in float64, whose inverse is made anew at each step."""
    W_OI, x_NI = weight(6, num_inputs), alike(300, num_inputs)
    quantized = quantize_compensated(W_OI, scheme, metric_of(x_NI), sweeps=0)
    R_II = (x_NI.T @ x_NI / len(x_NI)).double()
    R_II += DAMPING * R_II.diagonal().mean() * torch.eye(num_inputs, dtype=torch.float64)
    taken_OI, choices, left_OI = dequantize(quantized).double(), levels(quantized).double(), W_OI.double()
    for at in range(num_inputs):
        distance = (left_OI[:, at] - taken_OI[:, at]).abs()
        nearest = (choices[:, :, at] - left_OI[:, at]).abs().amin(0)
        assert bool((distance <= nearest + 1e-5).all()), at
        inverse = R_II[at:, at:].inverse()
        error_O = (left_OI[:, at] - taken_OI[:, at]) / inverse[0, 0]
        left_OI[:, at:] -= error_O[:, None] * inverse[0]


def test_no_choice_of_codes_is_much_better_and_rounding_to_the_nearest_is_worse() -> None:
    """Every one of the 4^6 rows of codes, for each of 20 rows of weights."""
    scheme = Scheme("nf2", 32, False)
    W_OI, x_NI = weight(20, 6), alike(200, 6)
    found, nearest = quantize_compensated(W_OI, scheme, metric_of(x_NI)), quantize(W_OI, scheme)
    choices = levels(found)
    least = 0.0
    for row in range(20):
        each = torch.tensor(list(itertools.product(*choices[:, row].T.tolist())))
        least += float((x_NI @ (each - W_OI[row]).T).square().sum(0).min())
    errors = [error_on(x_NI, W_OI, quantized) for quantized in (found, nearest)]
    assert least**0.5 <= errors[0] < 1.2 * least**0.5
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2], FP8], ids=lambda scheme: scheme.code)
def test_inputs_that_do_not_correlate_give_the_nearest_codes(scheme: Scheme) -> None:
    W_OI = weight(8, 96)
    metric = FullMetric(torch.diag(torch.linspace(0.1, 3, 96)))
    found, plain = quantize_compensated(W_OI, scheme, metric), quantize(W_OI, scheme)
    assert torch.equal(found.packed, plain.packed)
    assert torch.equal(torch.as_tensor(found.absmax), torch.as_tensor(plain.absmax))


def test_a_few_tokens_of_a_hundredfold_size_do_not_decide_how_the_others_are_rounded() -> None:
    """As the first token of a text in the layers with massive activations."""
    W_OI, x_NI = weight(32, 96), alike(400, 96)
    x_NI[::40] = 300 * alike(10, 96, seed=5)
    parts, errors = (x_NI[1:40], x_NI[::40]), []
    for evened in (False, True):
        moments = InputMoments(96, "full", evened=evened)
        for part in x_NI.split(100):
            moments.add(part)
        metric = moments.metric("layer")
        assert isinstance(metric, FullMetric)
        found = quantize_compensated(W_OI, NF4, metric)
        errors.append([error_on(rows, W_OI, found) for rows in parts])
    (others, _), (others_evened, large_evened) = errors
    assert others_evened < 0.8 * others
    assert large_evened < 0.8 * error_on(parts[1], W_OI, quantize(W_OI, NF4))


@pytest.fixture(scope="module")
def updated() -> tuple[Tensor, Tensor, Tensor]:
    """A weight on the code book's values, an update of it that is far below a step, and inputs."""
    on_codes_OI = dequantize(quantize(weight(32, 128), NF4))
    return on_codes_OI, 0.004 * weight(32, 2, seed=2) @ weight(2, 128, seed=3).sign(), alike(400, 128)


def share_of(update_OI: Tensor, found_OI: Tensor, x_NI: Tensor) -> float:
    """How much of an update's effect on the output is in another one's: 1 for all of it."""
    wanted, found = x_NI @ update_OI.T, x_NI @ found_OI.T
    return float((wanted * found).sum() / wanted.square().sum())


def test_an_update_below_half_a_step_reaches_the_output_whole(updated: tuple[Tensor, Tensor, Tensor]) -> None:
    before_OI, update_OI, x_NI = updated
    merged_OI = before_OI + update_OI
    metric = metric_of(x_NI)
    nearest, alone, whole = (
        share_of(update_OI, dequantize(quantized) - before_OI, x_NI)
        for quantized in (
            quantize(merged_OI, NF4),
            quantize_compensated(merged_OI, NF4, metric),
            quantize_compensated(merged_OI, NF4, metric, before_OI),
        )
    )
    assert nearest < 0.2
    assert alone < 0.8
    assert 0.85 < whole < 1.15


def test_deciding_again_leaves_less_noise_than_deciding_once(updated: tuple[Tensor, Tensor, Tensor]) -> None:
    before_OI, update_OI, x_NI = updated
    metric, target_OI = metric_of(x_NI), before_OI + 1.5 * update_OI
    R_II, choices = metric.L_II @ metric.L_II.T, levels(quantize(target_OI, NF4))

    def nearest(left_NI: Tensor, at: int) -> Tensor:
        distance = (choices[:, :, at] - left_NI[:, at]).abs()
        return choices[:, :, at].gather(0, distance.argmin(0, keepdim=True))[0]

    def error(found_OI: Tensor) -> float:
        return float(metric.scale(found_OI - target_OI).norm())

    taken_OI = dequantize(quantize_compensated(target_OI, NF4, metric, sweeps=0))
    errors = [error(taken_OI)]
    for _ in range(20):
        sweep(target_OI, R_II, taken_OI, nearest)
        errors.append(error(taken_OI))
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))
    assert errors[3] < 0.9 * errors[0]


def test_no_update_and_one_that_is_kept_anyway_are_rounded_as_they_are(updated: tuple[Tensor, Tensor, Tensor]) -> None:
    before_OI, update_OI, x_NI = updated
    for merged_OI in (before_OI.clone(), before_OI + 300 * update_OI):
        alone = quantize_compensated(merged_OI, NF4, metric_of(x_NI))
        assert torch.equal(quantize_compensated(merged_OI, NF4, metric_of(x_NI), before_OI).packed, alone.packed)


def test_zeros_outliers_and_rows_fewer_than_inputs_give_finite_weights() -> None:
    W_OI, x_NI = weight(40, 70), alike(5, 70)
    W_OI[3] = 0
    W_OI[7, 11] = 9.0
    x_NI[:, 20:40] = 0
    for scheme in SCHEMES:
        for inputs in (x_NI, torch.zeros_like(x_NI)):
            found = dequantize(quantize_compensated(W_OI, scheme, metric_of(inputs)))
            assert bool(found.isfinite().all())
            assert float((found - W_OI).abs().max()) < 9.0


def hidden(folder: Path) -> Tensor:
    model = load_model(folder)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0] for row in ROWS])


@pytest.mark.parametrize(
    ("family", "method"), [("LlamaForCausalLM", "nf4"), ("GPT2LMHeadModel", "nf2"), ("GPT2LMHeadModel", "fp8")]
)
def test_a_folder_rounded_on_rows_answers_nearer_to_its_source(tmp_path: Path, family: str, method: str) -> None:
    source, errors = make_family(tmp_path / "source", family), []
    for name, calibration in (("compensated", Calibration(ROWS)), ("nearest", None)):
        report = quantize_folder(source, tmp_path / name, quantize=quantize_section(method), calibration=calibration)
        errors.append(float((hidden(tmp_path / name) - hidden(source)).norm()))
    assert errors[0] < errors[1]
    assert report.layers[0].output_error is None
    quantizers = [read_identity(tmp_path / name).quantizer or {} for name in ("compensated", "nearest")]
    assert [quantizer.get("rounding") for quantizer in quantizers] == ["compensated", None]


def test_the_report_says_how_far_the_outputs_are_off_on_the_rows(tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "LlamaForCausalLM")
    report = quantize_folder(source, tmp_path / "out", quantize=quantize_section("nf3"), calibration=Calibration(ROWS))
    dense = DequantizingReader(tmp_path / "out")
    assert len(report.layers) == 14
    for layer in report.layers:
        assert 0 < (layer.output_error or 0) < (layer.output_error_plain or 0)
        before = DequantizingReader(source).read(f"{layer.module}.weight")
        rest = dense.read(f"{layer.module}.weight") - before
        assert layer.error == pytest.approx(float(rest.norm() / before.norm()), rel=1e-4)
        assert layer.error >= layer.error_plain  # the weight is further off, its output nearer


class KilledError(Exception):
    """Stands for a process that ended."""


def kills() -> Iterator[int]:
    yield from (6, 13, 20)  # inside the first block, at the first layer of the second, at the end


def test_an_interrupted_run_is_resumed_with_the_same_bytes_and_other_rows_start_anew(tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "LlamaForCausalLM")

    def run(out: str, rows: list[list[int]], last: int = 10**9) -> None:
        def kill(done: int, total: int) -> None:
            if done == last:
                raise KilledError

        quantize_folder(
            source, tmp_path / out, quantize=quantize_section(), calibration=Calibration(rows), on_progress=kill
        )

    run("whole", ROWS)
    with pytest.raises(KilledError):
        run("again", ROWS[:2], 13)
    for last in kills():
        with pytest.raises(KilledError):
            run("again", ROWS, last)
    run("again", ROWS)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("rows", [[], [[]]])
def test_rows_without_a_token_are_refused(tmp_path: Path, rows: list[list[int]]) -> None:
    source = make_family(tmp_path / "source", "LlamaForCausalLM")
    with pytest.raises(QuantizeError, match="the rounding is compensated, and no calibration rows were given"):
        quantize_folder(source, tmp_path / "out", quantize=quantize_section(), calibration=Calibration(rows))
    assert not (tmp_path / "out").exists()
