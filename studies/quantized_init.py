"""Quantized starts: LoftQ and PiSSA against their peers, memory of a start that is streamed, and what NF4 costs.

loftq-4, loftq-2  ours from disk to disk against the published procedure (whole model in memory, an exact SVD a step)
pissa             ours against peft's ``pissa`` and ``pissa_niter_4``
streamed          peak memory of a LoftQ start of a random model of 3.2 billion parameters, against the bound that is
                  printed before a start
layers            time of quantized layers over dense ones, forward and with backward to the input

CPU seconds on one thread; each measurement of the first three is a process of its own.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from graftline.adapters.attach import attach
from graftline.settings.model import Adapter, Quantize
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.folder import initialize, peak_bytes_bound
from graftline.weights.quant.linear import QuantLinear, load_model
from graftline.weights.quant.low_rank import FactorSettings
from graftline.weights.quant.scheme import Scheme
from graftline.weights.reader import CheckpointReader
from studies.harness import Json, Setting, cpu_seconds, peak_megabytes, ratio, turns
from studies.models import LARGE, SMALL, first_blocks, make_random

RANK, STEPS = 16, 5
SHAPES = ((1536, 576), (576, 1536), (576, 576))


def loftq(setting: Setting, code: str) -> Json:
    """Alternate our start with the published procedure."""
    return _compare(setting, ours=(_loftq, code), peers={"loftq": (_published_loftq, code)})


def pissa(setting: Setting) -> Json:
    """Alternate ours with peft's two."""
    return _compare(setting, ours=(_pissa, ""), peers={name: (_peft, name) for name in ("pissa", "pissa_niter_4")})


def _compare(setting: Setting, *, ours: Any, peers: dict[str, Any]) -> Json:
    model, rounds = setting.base(), setting.rounds or setting.size(3, 1)
    if setting.quick:
        model = first_blocks(model, setting.work / "cut", 1)
    found: dict[str, list[Json]] = {name: [] for name in ("graftline", *peers)}
    for _ in range(rounds):
        for name, (function, given) in {"graftline": ours, **peers}.items():
            found[name].append(setting.apart(function, model, given))
    columns = {
        name: {key: [run[key] for run in runs] for key in ("seconds", "peak_megabytes")} for name, runs in found.items()
    }
    own = columns["graftline"]
    ratios = {
        name: {
            "speed": ratio(columns[name]["seconds"], own["seconds"]),
            "memory": ratio(own["peak_megabytes"], columns[name]["peak_megabytes"]),
        }
        for name in peers
    }
    return {"ratios": ratios, "runs": found}


def _loftq(model: Path, code: str) -> Json:
    """From a dense folder to a quantized one, reading and writing included."""
    torch.set_num_threads(1)
    section = {"method": code, "double_quant": False, "init": "loftq", "loftq_iterations": STEPS}
    run = partial(
        initialize, quantize=Quantize.model_validate(section), seed=0, factors=lambda _: FactorSettings(RANK, 1.0)
    )
    reports: list[Any] = []
    with tempfile.TemporaryDirectory(dir=model.parent) as work:
        out = Path(work) / "out"
        seconds = cpu_seconds(lambda: reports.append(run(model, out)))
    return _figures(seconds, [layer.error for layer in reports[0].layers])


def _published_loftq(folder: Path, code: str) -> Json:
    """LoftQ, algorithm 1, on the whole model in memory."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scheme, errors = Scheme(code, 64, double_quant=False), []

    @torch.no_grad()
    def run() -> None:
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and "lm_head" not in name:
                errors.append(_alternate(layer.weight, scheme))

    return _figures(cpu_seconds(run), errors)


def _alternate(W_OI: Tensor, scheme: Scheme) -> float:
    """Relative error of the last step, ‖W − Q − BA‖ / ‖W‖."""
    low = torch.zeros_like(W_OI)
    for _ in range(STEPS):
        Q_OI = dequantize(quantize(W_OI - low, scheme))
        U, S, V = torch.linalg.svd(W_OI - Q_OI, full_matrices=False)
        low = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    return float((W_OI - Q_OI - low).norm() / W_OI.norm())


def _pissa(folder: Path, _: str) -> Json:
    torch.set_num_threads(1)
    model = load_model(folder)
    return _figures(cpu_seconds(lambda: attach(model, Adapter(method="pissa", rank=RANK, alpha=RANK), seed=0)), [])


def _peft(folder: Path, name: Any) -> Json:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=name)
    return _figures(cpu_seconds(lambda: get_peft_model(model, config)), [])


def _figures(seconds: float, errors: list[float]) -> Json:
    error = {"mean_error": round(statistics.mean(errors), 5)} if errors else {}
    return {"seconds": round(seconds, 2), "peak_megabytes": peak_megabytes(), **error}


def streamed(setting: Setting) -> Json:
    """LoftQ on the first block, NF4 on all: the sizes of the weights are the same in all."""
    source = setting.work / "source"
    if not source.exists():
        make_random(source, **setting.size(LARGE, SMALL))
    reader, bound = CheckpointReader(source), peak_bytes_bound(source)
    found = setting.apart(_start, source)
    return found | {
        "parameters": reader.total_bytes // 2,
        "source_mb": reader.total_bytes // 10**6,
        "largest_tensor_mb": reader.largest_bytes // 10**6,
        "bound_mb": bound // 10**6,
        "within_bound": found["peak_megabytes"] * 1.048576 <= bound / 10**6,
    }


def _start(source: Path) -> Json:
    torch.set_num_threads(1)

    def factors(module: str) -> FactorSettings | None:
        return FactorSettings(RANK, 1.0) if module.split(".")[2] == "0" else None

    with tempfile.TemporaryDirectory(dir=source.parent) as work:
        quantize = Quantize(method="nf4", init="loftq")
        run = partial(initialize, source, Path(work) / "out", quantize=quantize, seed=0, factors=factors)
        return _figures(cpu_seconds(run), [])


def layers(setting: Setting) -> Json:
    """Time of quantized layers over time of dense ones."""
    torch.manual_seed(setting.seed)
    found = []
    for num_tokens in setting.size((432, 2048), (8,)):
        inputs = [torch.randn(num_tokens, columns, requires_grad=True) for _, columns in SHAPES]
        dense = [nn.Linear(columns, rows, bias=False).requires_grad_(False) for rows, columns in SHAPES]
        for code in setting.size(("nf4", "nf3", "nf2"), ("nf4",)):
            quantized = [QuantLinear(quantize(layer.weight, Scheme(code, 64, True))) for layer in dense]
            ratios = {}
            for name, work in (("forward", _forward), ("forward_and_backward", _backward)):
                sides = {
                    side: partial(cpu_seconds, partial(work, modules, inputs))
                    for side, modules in (("quantized", quantized), ("dense", dense))
                }
                seconds = turns(sides, setting.turns(15), seed=setting.seed)
                ratios[name] = ratio(seconds["quantized"], seconds["dense"])
            found.append({"code": code, "tokens": num_tokens, **ratios})
    return {"overhead": found}


@torch.no_grad()
def _forward(modules: list[Any], inputs: list[Tensor]) -> None:
    for layer, x in zip(modules, inputs, strict=True):
        layer(x)


def _backward(modules: list[Any], inputs: list[Tensor]) -> None:
    for layer, x in zip(modules, inputs, strict=True):
        torch.autograd.grad(layer(x).sum(), x)


PARTS = {
    "loftq-4": partial(loftq, code="nf4"),
    "loftq-2": partial(loftq, code="nf2"),
    "pissa": pissa,
    "streamed": streamed,
    "layers": layers,
}
