"""Starts that make a layer's output right on calibration rows, against LoftQ's, which makes its weight right."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graftline.errors import QuantizeError
from graftline.settings.model import Quantize
from graftline.settings.start import Weighting
from graftline.weights.identity import read_identity
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.folder import DequantizingReader, initialize, peak_bytes_bound
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.low_rank import FactorSettings, QuantizedPair, make_pair, read_factors
from graftline.weights.quant.scheme import Scheme
from graftline.weights.quant.weighted import DAMPING, InputMoments, make_weighted_pair
from graftline.weights.reader import ARCHITECTURES
from tests.sections import quantize_section
from tests.weights.families import FAMILIES, make_family

NF2 = Scheme("nf2", 32, double_quant=False)
FACTORS = FactorSettings(rank=4, scale=2.0)
ROWS = [[(5 * at + 3 * row + 4) % 90 + 4 for at in range(4 + row)] for row in range(12)]


def section(weighting: Weighting) -> Quantize:
    return quantize_section("nf3", init={"kind": "loftq", "weighting": weighting}, loftq_iterations=3)


def rank_4(module: str) -> FactorSettings | None:
    return None if module.endswith(("o_proj", "attn.c_proj", "attention.dense")) else FACTORS


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """A weight (24, 32), and inputs (200, 32) that are large and alike in a few directions."""
    chooser = torch.Generator().manual_seed(0)
    few = torch.randn(200, 5, generator=chooser) @ torch.randn(5, 32, generator=chooser)
    scales = torch.logspace(-1, 1, 32)
    return torch.randn(24, 32, generator=chooser), (few + 0.3 * torch.randn(200, 32, generator=chooser)) * scales


def paired(W_OI: Tensor, x_NI: Tensor, weighting: Weighting, *, steps: int = 4) -> QuantizedPair:
    generator = torch.Generator().manual_seed(1)
    if weighting == "none":
        return make_pair(W_OI, NF2, FACTORS, method="loftq", steps=steps, generator=generator)
    moments = InputMoments(W_OI.shape[1], weighting)
    for part in x_NI.split(64):
        moments.add(part)
    return make_weighted_pair(W_OI, NF2, FACTORS, metric=moments.metric("layer"), steps=steps, generator=generator)


def rest_of(W_OI: Tensor, pair: QuantizedPair) -> Tensor:
    return W_OI - dequantize(pair.quantized) - FACTORS.scale * pair.B_OR @ pair.A_RI


def root_of(x_NI: Tensor, weighting: Weighting) -> Tensor:
    """A factor of the damped moments, another one than the Cholesky factor."""
    moments = x_NI.T @ x_NI / len(x_NI)
    if weighting == "diagonal":
        moments = moments.diagonal().diag()
    moments += DAMPING * moments.diagonal().mean() * torch.eye(32)
    values, vectors = torch.linalg.eigh(moments)
    return vectors @ values.sqrt().diag() @ vectors.T


def test_the_more_of_the_inputs_is_known_the_nearer_is_the_output(layer: tuple[Tensor, Tensor]) -> None:
    W_OI, x_NI = layer
    errors = [float((x_NI @ rest_of(W_OI, paired(W_OI, x_NI, kind)).T).norm()) for kind in ("none", "diagonal", "full")]
    assert errors[2] < 0.7 * errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("weighting", ["diagonal", "full"])
def test_the_factors_are_the_best_for_their_quantized_weight(
    layer: tuple[Tensor, Tensor], weighting: Weighting
) -> None:
    W_OI, x_NI = layer
    pair, root = paired(W_OI, x_NI, weighting), root_of(x_NI, weighting)
    discarded = torch.linalg.svdvals((W_OI - dequantize(pair.quantized)) @ root)[FACTORS.rank :]
    assert float((rest_of(W_OI, pair) @ root).norm()) == pytest.approx(float(discarded.norm()), rel=1e-3)
    assert pair.output_error == pytest.approx(float(discarded.norm() / (W_OI @ root).norm()), rel=1e-3)
    assert pair.output_error == min(pair.step_errors)
    assert pair.error == pytest.approx(float(rest_of(W_OI, pair).norm() / W_OI.norm()), rel=1e-3)


@pytest.mark.parametrize("weighting", ["diagonal", "full"])
def test_the_second_step_quantizes_what_the_first_ones_factors_leave(
    layer: tuple[Tensor, Tensor], weighting: Weighting
) -> None:
    W_OI, x_NI = layer
    first, root = paired(W_OI, x_NI, weighting, steps=1), root_of(x_NI, weighting)
    quantized = dequantize(quantize(W_OI - FACTORS.scale * first.B_OR @ first.A_RI, NF2))
    discarded = torch.linalg.svdvals((W_OI - quantized) @ root)[FACTORS.rank :]
    expected = float(discarded.norm() / (W_OI @ root).norm())
    assert paired(W_OI, x_NI, weighting, steps=2).step_errors[1] == pytest.approx(expected, rel=1e-3)


def test_inputs_that_never_occur_and_rows_fewer_than_inputs_are_damped(layer: tuple[Tensor, Tensor]) -> None:
    W_OI, x_NI = layer
    few = x_NI[:6].clone()
    few[:, ::2] = 0
    for weighting in ("diagonal", "full"):
        for inputs in (few, torch.zeros_like(few)):
            pair = paired(W_OI, inputs, weighting)
            assert bool(pair.A_RI.isfinite().all() & pair.B_OR.isfinite().all())
            assert pair.output_error is not None
            assert 0 <= pair.output_error <= (pair.output_error_plain or 0)


def test_inputs_that_are_not_finite_are_refused_with_the_layers_name() -> None:
    moments = InputMoments(3, "full")
    moments.add(torch.tensor([[1.0, torch.inf, 0.0]]))
    with pytest.raises(QuantizeError, match=r"inputs of model\.layers\.0\.mlp hold Inf or NaN"):
        moments.metric("model.layers.0.mlp")


def linears(model: nn.Module, modules: list[str]) -> Iterator[tuple[str, nn.Module]]:
    return ((module, model.get_submodule(module)) for module in modules)


def inputs_of(model: nn.Module, modules: list[str]) -> dict[str, list[Tensor]]:
    """What enters each layer on the calibration rows, row by row."""
    seen: dict[str, list[Tensor]] = {module: [] for module in modules}
    for module, layer in linears(model, modules):
        layer.register_forward_pre_hook(lambda _, args, module=module: seen[module].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row]))
    return seen


@pytest.mark.parametrize("family", [name for name in FAMILIES if ARCHITECTURES[name].experts != "each"])
def test_each_layer_is_fitted_to_the_inputs_that_the_finished_base_gives_it(tmp_path: Path, family: str) -> None:
    source = make_family(tmp_path / "source", family)
    report = initialize(source, tmp_path / "q", quantize=section("full"), seed=0, factors=rank_4, rows=ROWS)
    conv1d = family == "GPT2LMHeadModel"
    model, dense, factors = load_model(source), DequantizingReader(tmp_path / "q"), read_factors(tmp_path / "q")
    model.requires_grad_(False)
    original = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modules = [layer.module for layer in report.layers]
    assert len(factors) < len(modules)
    for module, layer in linears(model, modules):
        weight = dense.read(f"{module}.weight")
        if module in factors:
            low = FACTORS.scale * factors[module]["B"] @ factors[module]["A"]
            weight = weight + (low.T if conv1d else low)
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    seen = inputs_of(model, modules)
    for layer in report.layers:
        if layer.module not in factors:
            assert layer.output_error is None
            continue
        x_NI = torch.cat(seen[layer.module])
        metric = InputMoments(x_NI.shape[-1], "full")
        metric.add(x_NI)
        scale = metric.metric("").scale
        before, after = original[f"{layer.module}.weight"], model.get_parameter(f"{layer.module}.weight")
        rest, before = ((rest.T if conv1d else rest) for rest in (before - after, before))
        assert layer.output_error == pytest.approx(float(scale(rest).norm() / scale(before).norm()), rel=2e-3)
        assert layer.output_error < (layer.output_error_plain or 0)


class KilledError(Exception):
    """Stands for a process that ended."""


@pytest.mark.parametrize("weighting", ["diagonal", "full"])
def test_an_interrupted_start_is_resumed_with_the_same_bytes(tmp_path: Path, weighting: Weighting) -> None:
    source = make_family(tmp_path / "source", "LlamaForCausalLM")

    def run(out: str, last: int = 10**9) -> None:
        def kill(done: int, total: int) -> None:
            assert done <= total == 21
            if done == last:
                raise KilledError

        quantize = section(weighting)
        initialize(source, tmp_path / out, quantize=quantize, seed=0, factors=rank_4, rows=ROWS, on_progress=kill)

    run("whole")
    for last in (7, 13, 20):  # inside the first block, at the first layer of the second, at the end
        with pytest.raises(KilledError):
            run("again", last)
    run("again")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_long_form_without_weighting_is_the_short_one(tmp_path: Path) -> None:
    assert section("none") == quantize_section("nf3", init="loftq", loftq_iterations=3)
    assert section("none").model_dump()["init"] == "loftq"


def test_a_weighted_start_without_rows_is_refused_and_other_rows_make_another_base(tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "LlamaForCausalLM")
    with pytest.raises(QuantizeError, match="no calibration rows were given"):
        initialize(source, tmp_path / "q", quantize=section("full"), seed=0, factors=rank_4)
    for name, rows in (("a", ROWS), ("b", ROWS[:3])):
        initialize(source, tmp_path / name, quantize=section("diagonal"), seed=0, factors=rank_4, rows=rows)
    a, b = (read_identity(tmp_path / name) for name in ("a", "b"))
    assert a.pair != b.pair
    assert (a.quantizer or {})["weighting"] == "diagonal"


def test_the_bound_of_the_memory_has_the_rows_and_the_products_of_the_inputs(tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "LlamaForCausalLM")
    plain = peak_bytes_bound(source)
    diagonal = peak_bytes_bound(source, section("diagonal"), ROWS)
    assert plain < diagonal
    assert peak_bytes_bound(source, section("full"), ROWS) == diagonal + 3 * 4 * 48**2
    tokens = sum(map(len, ROWS))
    assert peak_bytes_bound(source, section("diagonal"), ROWS * 2) >= diagonal + 2 * 4 * 32 * tokens


def test_experts_that_read_other_rows_each_are_refused(tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "MixtralForCausalLM")
    with pytest.raises(QuantizeError, match=r"has experts, each of which reads other rows.*weighting: none"):
        initialize(source, tmp_path / "q", quantize=section("full"), seed=0, factors=rank_4, rows=ROWS)
