"""One training of a small model: what is trained, how, and what is measured before, during and after."""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from graftline.adapters.attach import attach, plan_layers
from graftline.digest import of_json
from graftline.evaluate.miub import measure_miub
from graftline.evaluate.parts import evaluating
from graftline.evaluate.scoring import score_documents
from graftline.settings.model import Adapter, MethodName, Quantize, Train
from graftline.train.best import held_out_loss
from graftline.train.results import StepMetrics
from graftline.train.trainer import train
from graftline.weights.model_folder import load_skeleton
from graftline.weights.quant.folder import initialize
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.low_rank import FactorSettings, read_factors
from studies.survey.text import Text

NUM_MARK_ROWS, NUM_MARK_DOCUMENTS, NUM_MIUB_ROWS = 200, 40, 40


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Settings of one training; equal settings are the same cell."""

    arm: str
    """Name of what is compared, for people."""
    size: str
    method: MethodName
    learning_rate: float
    seed: int
    rank: int = 8
    alpha: float = 16.0
    bits: float = 16
    """Of the frozen weights: 16 dense, 4 NF4, 2 NF2, between them the first blocks in NF4 and the rest in NF2."""
    paired: bool = False
    """LoftQ's initialization instead of plain quantization."""
    rows: int = 11_000
    steps: int = 150
    batch: int = 16
    marks: tuple[int, ...] = ()
    """Steps after which task and general text are looked at."""
    measures_miub: bool = False

    @property
    def name(self) -> str:
        """Digest of the settings."""
        return of_json(asdict(self)).short


def run(cell: Cell, text: Text, family: Path) -> dict[str, Any]:
    """Train one cell. NLL are nats per supervised token (task) and per token (general)."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        model, weight_error = _model(cell, family / cell.size, Path(work))
        settings = Train(
            steps=cell.steps,
            batch_size=cell.batch,
            learning_rate=cell.learning_rate,
            scheduler="linear",
            seed=cell.seed,
            checkpoint_every=0,
            threads=1,
            device="cpu",
        )
        task = held_out_loss(text.tuning[:NUM_MARK_ROWS], settings)

        def look(step: int) -> dict[str, float]:
            with evaluating(model):
                general = _general(model, text, NUM_MARK_DOCUMENTS)
                return {"step": step, "task": round(task(model), 5), "general": round(general, 5)}

        marks = [look(0)] if cell.marks else []

        def on_step(metrics: StepMetrics) -> None:
            if metrics.step in cell.marks:
                marks.append(look(metrics.step))

        before = _measure(model, text, settings)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        result = train(model, text.training[: cell.rows], settings=settings, work=Path(work) / "train", on_step=on_step)
        after = _measure(model, text, settings)
    found: dict[str, Any] = {
        **asdict(cell),
        "trained_parameters": trained,
        "before": before,
        "after": after,
        "losses": [round(sum(part) / len(part), 4) for part in _parts(result.losses, 10)],
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    if weight_error is not None:
        found["weight_error"] = round(weight_error, 5)
    if marks:
        found["curve"] = marks
    if cell.measures_miub:
        found |= _miub(model, text)
    return found


def _parts(values: tuple[float, ...], length: int) -> list[tuple[float, ...]]:
    return [values[start : start + length] for start in range(0, len(values), length)]


def _model(cell: Cell, base: Path, work: Path) -> tuple[PreTrainedModel, float | None]:
    """The base with its adapter, and the mean relative error of the quantized weights with the factors."""
    method: MethodName = "loftq" if cell.paired else cell.method
    spec = Adapter(method=method, rank=cell.rank, alpha=cell.alpha)
    if cell.bits == 16:
        model = load_model(base)
        attach(model, spec, seed=cell.seed)
        return model, None
    factors = {
        name: FactorSettings(layer.rank, layer.scale) for name, layer in plan_layers(load_skeleton(base), spec).items()
    }
    blocks = int(load_skeleton(base).config.num_hidden_layers)
    quantize = quantization(cell.bits, blocks).replace(init="loftq" if cell.paired else "plain")
    report = initialize(base, work / "base", quantize=quantize, seed=cell.seed, factors=factors.get)
    model = load_model(work / "base")
    attach(model, spec, seed=cell.seed, initial=read_factors(work / "base") if cell.paired else None)
    return model, sum(layer.error for layer in report.layers) / len(report.layers)


def quantization(bits: float, blocks: int) -> Quantize:
    """NF4 in so many first blocks that the codes have ``bits`` bits on average, NF2 in the rest (LoftQ §4)."""
    count = round((bits - 2) / 2 * blocks)
    return Quantize(method="mixed", bits={f"0-{count - 1}": 4, ".*": 2}) if count else Quantize(method="nf2")


def _measure(model: PreTrainedModel, text: Text, settings: Train) -> dict[str, float]:
    with evaluating(model):
        return {
            "test": round(held_out_loss(text.test, settings)(model), 5),
            "tuning": round(held_out_loss(text.tuning, settings)(model), 5),
            "general": round(_general(model, text, len(text.general)), 5),
        }


def _general(model: PreTrainedModel, text: Text, count: int) -> float:
    documents = score_documents(model, text.tokenizer, text.general[:count], batch_tokens=4096)
    return sum(document.nll for document in documents) / sum(document.num_tokens for document in documents)


def _miub(model: PreTrainedModel, text: Text) -> dict[str, float]:
    found = measure_miub(model, [row.input_ids for row in text.test[:NUM_MIUB_ROWS]], num_resamples=100)
    return {name: round(value, 6) for name, value in found.numbers().items() if name.count("_") < 3}
