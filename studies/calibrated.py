"""LoftQ's start weighted by what a layer sees, against LoftQ and plain quantization: 2, 2.5, 3 and 4 bits.

family   a model of the survey's family, pretrained here; a learning rate tuned for every start and width, three seeds
smollm2  the demo's base and rows (`make demo`), likewise, with fewer steps and a rate for every start
cost     CPU seconds and peak memory of each start of the demo's base, each in a process of its own, against the bound

Starts: plain (QLoRA), and LoftQ weighted by nothing (none), E[x²] (diagonal) or E[xᵀx] (full). 2.5 bits are NF4 in the
first quarter of the blocks and NF2 in the rest. Calibration takes 128 rows that are trained on too. output_error is
that of a layer's output, ‖x (W − Q − s·BA)ᵀ‖ / ‖x Wᵀ‖ on inputs of the dense model, mean over layers; hidden_error that
of the last hidden states; both on rows that neither calibrated nor trained, as is the NLL, nats a supervised token.

A learning rate is the one with the least NLL on tuning rows, with a seed that is not reported, from a grid of half
decades that grows where the best lies at its edge. Results are written one by one; with --minutes the rest of the grid
is left out, and the result says that it is partial. With --work the next run goes on where one was broken off.
"""

import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftline.adapters.attach import attach, plan_layers
from graftline.adapters.lora import LoraLayer
from graftline.data.encoding import encode_rows
from graftline.data.rows import read_rows
from graftline.data.split import CALIBRATION_ROWS
from graftline.data.template import Encoded
from graftline.digest import write_json
from graftline.errors import TrainError
from graftline.evaluate.parts import evaluating
from graftline.logs import Reporter
from graftline.settings.model import Adapter, Quantize, Train
from graftline.train.best import held_out_loss
from graftline.train.trainer import train
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_skeleton, load_tokenizer
from graftline.weights.quant.folder import initialize
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.low_rank import FactorSettings, read_factors
from studies.harness import DEMO, Json, Setting, cpu_seconds, needed, peak_megabytes
from studies.survey import text
from studies.survey.cells import quantization
from studies.survey.family import make as make_member
from studies.survey.grid import FEW_SEEDS, RATES, TUNING_SEED

STARTS = ("plain", "none", "diagonal", "full")
BITS = (2.0, 2.5, 3.0, 4.0)
PRETRAINING = 400
"""Steps in which the family's model learns to write."""
MEASURED_ROWS = 16
"""Rows for the errors of outputs."""
Rows = Sequence[Encoded]


@dataclass(frozen=True, kw_only=True)
class World:
    """A base, its rows, and how it is trained."""

    base: Path
    training: Rows
    tuning: Rows
    test: Rows
    rank: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    """Those that are tried first."""
    tuned_at: tuple[float, ...]
    """Widths whose rates are tuned; the others take those of the nearest, the lower of two."""


@dataclass(frozen=True)
class Arm:
    """A start at a width."""

    bits: float
    start: str

    @property
    def name(self) -> str:
        """The width, as results name it."""
        return f"{self.bits:g}"

    @property
    def adapter_method(self) -> Any:
        """Whose initial values belong to the base."""
        return "lora" if self.start == "plain" else "loftq"


def family(setting: Setting) -> Json:
    """The small model."""
    return _grid(setting, _tiny(setting) if setting.quick else _member(setting))


def smollm2(setting: Setting) -> Json:
    """The demo's base."""
    return _grid(setting, _tiny(setting) if setting.quick else _demo(setting))


def _demo(setting: Setting) -> World:
    base = setting.base()
    training, test = (
        _encoded(base, path) for path in (setting.row_file(), needed(DEMO / "fetch" / "evaluation.jsonl"))
    )
    return World(
        base=base,
        training=training[200:],
        tuning=training[:100],
        test=test[:200],
        rank=16,
        steps=16,
        batch=8,
        rates=(3e-4, 1e-3),
        tuned_at=(2.5,),
    )


def _member(setting: Setting, size: str = "s") -> World:
    folder, member = setting.work / "text", setting.work / "family" / size
    if not folder.exists():
        text.make(folder)
    if not member.exists():
        make_member(size, folder, member, steps=PRETRAINING)
    found = text.load(folder)
    return World(
        base=member,
        training=found.training,
        tuning=found.tuning[:200],
        test=found.test[:300],
        rank=8,
        steps=40,
        batch=16,
        rates=(3e-3, 1e-2),
        tuned_at=(2.0, 4.0),
    )


def _tiny(setting: Setting) -> World:
    rows = _encoded(setting.base(), setting.row_file())
    return World(
        base=setting.base(),
        training=rows[40:],
        tuning=rows[:20],
        test=rows[20:40],
        rank=4,
        steps=1,
        batch=4,
        rates=(1e-3,),
        tuned_at=(),
    )


def _encoded(base: Path, rows: Path) -> Rows:
    found = encode_rows(read_rows(rows), load_tokenizer(base), template="none", max_tokens=128, overlength="drop")
    return found.encoded


# --- the grid ----------------------------------------------------------------------------------------------------


def _grid(setting: Setting, world: World) -> Json:
    """Rates first, then seed by seed, so that what is done when the time is over holds every start."""
    file = setting.work / "grid.json"
    found = _begun(file, world)
    seeds = FEW_SEEDS[: setting.rounds or setting.size(3, 1)]
    arms = [Arm(bits, start) for bits in setting.size(BITS, BITS[:1]) for start in setting.size(STARTS, STARTS[-1:])]
    tuned = [arm for arm in arms if arm.bits in world.tuned_at and arm.start not in found["rates"].get(arm.name, {})]
    measured = {(run["bits"], run["start"], run["seed"]) for run in found["runs"]}
    todo = [partial(_tune, setting, world, arm, found) for arm in tuned]
    todo += [
        partial(_measure, setting, world, arm, seed, found)
        for seed in seeds
        for arm in arms
        if (arm.bits, arm.start, seed) not in measured
    ]
    report = Reporter("starts", "models")
    for done, each in enumerate(todo):
        if time.monotonic() > setting.ends:
            return found | {
                "partial": f"{len(todo) - done} steps of the grid are left, for which the minutes were over"
            }
        report(done + 1, len(todo), note=each())
        write_json(file, found)
        setting.keep(found)
    return found


def _begun(file: Path, world: World) -> Json:
    """What an earlier run of the same study left in ``file``; nothing if there is none, or it was of another."""
    about = {
        "base": str(read_identity(world.base).digest),
        "rank": world.rank,
        "steps": world.steps,
        "batch": world.batch,
        "rows": {"tuning": len(world.tuning), "test": len(world.test)},
    }
    found: Json = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    same = about.items() <= found.items()
    return found if same else about | {"rates": {}, "tuning": [], "runs": []}


def _tune(setting: Setting, world: World, arm: Arm, found: Json) -> str:
    with tempfile.TemporaryDirectory(dir=setting.work) as work:
        start = Start(world, arm, TUNING_SEED, Path(work))

        def loss(rate: float) -> float:
            after = start.trained(rate, world.tuning)
            found["tuning"].append({**vars(arm), "rate": rate, "nll_after": after})
            return float("inf") if after is None else after

        rate = _best_rate(loss, world.rates)
    found["rates"].setdefault(arm.name, {})[arm.start] = rate
    return f"{arm.name} bits, {arm.start}: rate {rate:g}"


def _best_rate(loss: Callable[[float], float], rates: Sequence[float]) -> float:
    """A grid whose best lies at its edge grows."""
    tried = {rate: loss(rate) for rate in rates}
    while True:
        best = min(tried, key=lambda rate: tried[rate])
        at = RATES.index(best)
        beyond = [RATES[near] for near in (at - 1, at + 1) if 0 <= near < len(RATES) and RATES[near] not in tried]
        if not beyond:
            return best
        tried[beyond[0]] = loss(beyond[0])


def _measure(setting: Setting, world: World, arm: Arm, seed: int, found: Json) -> str:
    tuned = min(world.tuned_at, key=lambda bits: abs(bits - arm.bits), default=None)
    rate = world.rates[0] if tuned is None else found["rates"][f"{tuned:g}"][arm.start]
    with tempfile.TemporaryDirectory(dir=setting.work) as work:
        start = Start(world, arm, seed, Path(work))
        figures = {
            **start.figures,
            **start.errors(),
            "nll_before": start.loss(),
            "nll_after": start.trained(rate, world.test),
        }
    run = {**vars(arm), "seed": seed, "rate": rate, **figures}
    found["runs"].append(run)
    return str(run)


class Start:
    """A quantized start in a folder, measured and trained from as often as asked."""

    def __init__(self, world: World, arm: Arm, seed: int, work: Path) -> None:
        self._world, self._arm, self._seed, self._work = world, arm, seed, work
        made: list[Any] = []
        seconds = cpu_seconds(lambda: made.append(_start(world, arm, seed, work / "q")))
        weight_error = statistics.mean(layer.error for layer in made[0].layers)
        self.figures = {
            "bits_per_weight": round(made[0].bits_per_weight, 3),
            "weight_error": round(weight_error, 4),
            "cpu_seconds": round(seconds, 2),
        }

    def errors(self) -> dict[str, float]:
        """Of the layers' outputs and of the last hidden states."""
        dense = load_model(self._world.base)
        return _errors(dense, self._model(), self._world.test[:MEASURED_ROWS])

    def loss(self) -> float:
        """NLL before training, on the test rows."""
        return self._loss(self._model(), self._world.test)

    def trained(self, rate: float, rows: Rows) -> float | None:
        """NLL after training, on ``rows``; None if it broke off because the loss was not finite."""
        model = self._model()
        try:
            with tempfile.TemporaryDirectory(dir=self._work) as work:
                train(model, self._world.training, settings=self._settings(rate), work=Path(work))
        except TrainError:
            return None
        return self._loss(model, rows)

    def _model(self) -> Any:
        model = load_model(self._work / "q")
        initial = None if self._arm.start == "plain" else read_factors(self._work / "q")
        attach(model, _adapter(self._world, self._arm), seed=self._seed, initial=initial)
        return model

    def _loss(self, model: Any, rows: Rows) -> float:
        with evaluating(model):
            return round(held_out_loss(rows, self._settings(1.0))(model), 4)

    def _settings(self, rate: float) -> Train:
        world = self._world
        return Train(
            steps=world.steps,
            batch_size=world.batch,
            learning_rate=rate,
            seed=self._seed,
            checkpoint_every=0,
            threads=1,
            device="cpu",
        )


def _adapter(world: World, arm: Arm) -> Adapter:
    return Adapter(method=arm.adapter_method, rank=world.rank, alpha=world.rank)


def _start(world: World, arm: Arm, seed: int, out: Path) -> Any:
    quantize = _quantize(world.base, arm)
    planned = plan_layers(load_skeleton(world.base), _adapter(world, arm))
    factors = {name: FactorSettings(layer.rank, layer.scale) for name, layer in planned.items()}
    rows = _calibration(world, seed) if quantize.weighting != "none" else []
    return initialize(world.base, out, quantize=quantize, seed=seed, factors=factors.get, rows=rows)


def _quantize(base: Path, arm: Arm) -> Quantize:
    whole = {3.0: Quantize(method="nf3"), 4.0: Quantize(method="nf4")}
    quantize = whole.get(arm.bits) or quantization(arm.bits, load_skeleton(base).config.num_hidden_layers)
    if arm.start == "plain":
        return quantize
    return Quantize.model_validate(
        {**quantize.model_dump(), "init": {"kind": "loftq", "weighting": arm.start}, "loftq_iterations": 5}
    )


def _calibration(world: World, seed: int) -> list[list[int]]:
    return [row.input_ids for row in random.Random(seed).sample(list(world.training), CALIBRATION_ROWS)]


@torch.no_grad()
def _errors(dense: nn.Module, model: nn.Module, rows: Rows) -> dict[str, float]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def compare(name: str, right: Tensor, found: Tensor) -> None:
        sums[name][0] += float((right - found).square().sum())
        sums[name][1] += float(right.square().sum())

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, args, output: compare(name, output, model.get_submodule(name)(args[0]))

    hooks = [
        dense.get_submodule(name).register_forward_hook(hook(name))
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    ]
    for row in rows:
        ids = torch.tensor([row.input_ids])
        right, found = (each(input_ids=ids, output_hidden_states=True).hidden_states[-1] for each in (dense, model))
        compare("", right, found)
    for each in hooks:
        each.remove()
    hidden, *layers = [(sums[name][0] / sums[name][1]) ** 0.5 for name in sorted(sums)]
    return {"output_error": round(statistics.mean(layers), 4), "hidden_error": round(hidden, 4)}


# --- cost --------------------------------------------------------------------------------------------------------


def cost(setting: Setting) -> Json:
    """At 2 bits; other widths take as long."""
    world = _tiny(setting) if setting.quick else _demo(setting)
    found: Json = {"calibration_tokens": sum(map(len, _calibration(world, setting.seed))), "starts": []}
    for start in setting.size(STARTS, STARTS[-1:]):
        arm = Arm(2.0, start)
        figures = setting.apart(_timed, world, arm, setting.seed, setting.folder(start))
        found["starts"].append({"start": start, **figures})
        setting.keep(found)
    return found


def _timed(world: World, arm: Arm, seed: int, work: Path) -> Json:
    torch.set_num_threads(1)
    made: list[Any] = []
    seconds = cpu_seconds(lambda: made.append(_start(world, arm, seed, work / "q")))
    bound = made[0].peak_bytes_bound // 10**6
    return {"cpu_seconds": round(seconds, 2), "peak_megabytes": peak_megabytes(), "bound_mb": bound}


PARTS = {"family": family, "smollm2": smollm2, "cost": cost}
