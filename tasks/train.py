"""Stage train: the adapter, trained on the supervised tokens of the training rows.

Writes ``adapter/`` (PEFT's files and ``graftline.json``), ``history.json`` (loss by step), ``metrics.json`` and
``stage.json``. Checkpoints lie outside the stage's outputs, under ``runs/<pipeline>/.work/train-<digest of inputs>``:
DVC empties a stage's outputs before it runs it, and a killed training must go on where it was.
"""

import shutil
from pathlib import Path

import torch

from graftline.adapters.attach import attach
from graftline.adapters.peft_format import AdapterIdentity, save_adapter
from graftline.adapters.spec import AdapterSpec
from graftline.checkpoint.factors import factors_digest, read_factors
from graftline.checkpoint.identity import read_identity
from graftline.data.rows import read_rows
from graftline.data.template import encode_rows, template_digest
from graftline.digest import of_file, of_json, write_json
from graftline.progress import Reporter
from graftline.quant.load import load_model, load_tokenizer
from graftline.train.devices import resolve_device
from graftline.train.settings import OnStep, TrainSettings
from graftline.train.trainer import train
from tasks import stage
from tasks.base import trained_base
from tasks.stage import Context


def run(context: Context) -> None:
    """Train the adapter, or go on where a killed training was."""
    pipeline, out = context.pipeline, context.folder("train")
    base, rows_file = trained_base(context), context.folder("fetch") / "train.jsonl"
    settings = TrainSettings(**pipeline.train.model_dump() | {"threads": stage.num_threads(context)})
    # Before the model is loaded: its initialization would otherwise take every core, whatever the pipeline says.
    torch.set_num_threads(settings.threads)
    tokenizer = load_tokenizer(base)
    template, data = pipeline.base.template, pipeline.data
    encoded = encode_rows(
        read_rows(rows_file), tokenizer, template=template, max_tokens=data.max_tokens, overlength=data.overlength
    ).encoded
    identity = read_identity(base)
    model = load_model(base, device=resolve_device(settings.device), dtype=torch.float32)
    # LoftQ and QPiSSA made the base and the adapter's first values for each other.
    initial_digest = factors_digest(base) if identity.pair else None
    initial = read_factors(base) if identity.pair else None
    coverage = attach(model, AdapterSpec(**pipeline.adapter.model_dump()), seed=settings.seed, initial=initial)
    stage.logger.info("what is trained:\n%s", coverage.table())
    inputs = [str(identity.digest), str(of_file(rows_file)), pipeline.adapter.model_dump(), pipeline.train.model_dump()]
    work = _work_folder(context, of_json([*inputs, template, data.max_tokens, data.overlength]).short)
    result = train(model, encoded, settings=settings, work=work, on_step=_progress())
    adapter_identity = AdapterIdentity(
        base_digest=identity.digest,
        quantizer=identity.quantizer,
        template_digest=template_digest(tokenizer, template),
        training_run=f"{context.name}/{work.name}",
        initial_digest=initial_digest,
    )
    save_adapter(model, out / "adapter", identity=adapter_identity)
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


def _work_folder(context: Context, digest: str) -> Path:
    """The folder of this training's checkpoints; those of trainings with other inputs are removed."""
    work = context.runs / ".work" / f"train-{digest}"
    for other in work.parent.glob("train-*"):
        if other != work:
            shutil.rmtree(other)
    return work


def main() -> None:
    """Command line."""
    stage.main("train", run)


if __name__ == "__main__":
    main()
