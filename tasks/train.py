"""Stage train: the adapter, trained on the supervised tokens of the training rows.

Writes ``adapter/`` (PEFT's files and ``graftline.json``), ``history.json`` (loss by step), ``metrics.json`` and
``stage.json``. Checkpoints lie outside the stage's outputs, under ``runs/<pipeline>/.work/train-<digest of inputs>``:
DVC empties a stage's outputs before it runs it, and a killed training must go on where it was.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from graftline.adapters.attach import Coverage, attach
from graftline.adapters.peft_format import AdapterIdentity, save_adapter
from graftline.adapters.spec import AdapterSpec
from graftline.checkpoint.factors import factors_digest, read_factors
from graftline.checkpoint.identity import BaseIdentity, check_pair, read_identity
from graftline.data.rows import read_rows
from graftline.data.template import Encoded, encode_rows, template_digest
from graftline.digest import of_file, of_json, write_json
from graftline.progress import Reporter
from graftline.quant.load import load_model, load_tokenizer
from graftline.train.devices import resolve_device
from graftline.train.preflight import check_fits
from graftline.train.settings import OnStep, TrainResult, TrainSettings
from graftline.train.trainer import train
from tasks import stage
from tasks.base import original_base, trained_base
from tasks.init import quantization_plan
from tasks.stage import Context


def run(context: Context) -> None:
    """Train the adapter, or go on where a killed training was."""
    pipeline, base = context.pipeline, trained_base(context)
    settings = TrainSettings(**pipeline.train.model_dump() | {"threads": stage.num_threads(context)})
    # Before the model is loaded: its initialization would otherwise take every core, whatever the pipeline says.
    torch.set_num_threads(settings.threads)
    encoded = _encoded_rows(context)
    identity, spec = read_identity(base), AdapterSpec(**pipeline.adapter.model_dump())
    # LoftQ and QPiSSA made the base and the adapter's first values for each other.
    initial = factors_digest(base) if identity.pair else None
    check_pair(identity, initial)
    # Before anything is loaded: a training that cannot fit says what would.
    check_fits(
        AutoConfig.from_pretrained(original_base(context)),
        encoded,
        settings=settings,
        adapter=spec,
        quantization=quantization_plan(pipeline.quantize).default if identity.quantizer else None,
    )
    model = load_model(base, device=resolve_device(settings.device), dtype=torch.float32)
    coverage = attach(model, spec, seed=settings.seed, initial=read_factors(base) if initial else None)
    stage.logger.info("what is trained:\n%s", coverage.table())
    work = _work_folder(context, identity)
    result = train(model, encoded, settings=settings, work=work, on_step=_progress())
    adapter = AdapterIdentity(
        base_digest=identity.digest,
        quantizer=identity.quantizer,
        template_digest=template_digest(load_tokenizer(base), pipeline.base.template),
        training_run=f"{context.name}/{work.name}",
        initial_digest=initial,
    )
    save_adapter(model, context.folder("train") / "adapter", identity=adapter)
    _write_figures(context.folder("train"), result, coverage)


def _encoded_rows(context: Context) -> Sequence[Encoded]:
    data, tokenizer = context.pipeline.data, load_tokenizer(trained_base(context))
    return encode_rows(
        read_rows(context.folder("fetch") / "train.jsonl"),
        tokenizer,
        template=context.pipeline.base.template,
        max_tokens=data.max_tokens,
        overlength=data.overlength,
    ).encoded


def _write_figures(out: Path, result: TrainResult, coverage: Coverage) -> None:
    write_json(out / "history.json", [{"step": i, "loss": loss} for i, loss in enumerate(result.losses, start=1)])
    write_json(
        out / "metrics.json",
        {
            "loss_first": result.losses[0],
            "loss_last": result.losses[-1],
            "steps": result.steps,
            "tokens": result.tokens,
            "tokens_per_second": round(result.tokens_per_second, 1),
            "trained_parameters": coverage.num_trained,
            "base_parameters": coverage.num_base,
            "peak_bytes": result.peak_bytes,
        },
    )


def _progress() -> OnStep:
    report = Reporter("train", "steps")
    return lambda metrics: report(metrics.step, metrics.total_steps, note=f"loss {metrics.loss:.3f}")


def _work_folder(context: Context, base: BaseIdentity) -> Path:
    """The folder of this training's checkpoints, named by its inputs; those of other inputs are removed."""
    pipeline, rows = context.pipeline, of_file(context.folder("fetch") / "train.jsonl")
    data = [pipeline.base.template, pipeline.data.max_tokens, pipeline.data.overlength]
    inputs = [str(base.digest), str(rows), pipeline.adapter.model_dump(), pipeline.train.model_dump(), *data]
    work = context.runs / ".work" / f"train-{of_json(inputs).short}"
    for other in work.parent.glob("train-*"):
        if other != work:
            shutil.rmtree(other)
    return work


def main() -> None:
    """Command line."""
    stage.main("train", run)


if __name__ == "__main__":
    main()
