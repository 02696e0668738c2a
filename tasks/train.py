"""Stage train: the adapter, trained on the supervised tokens of the training rows.

Writes ``adapter/`` (PEFT's files and ``graftline.json``), ``history.json`` (loss by step, and on the rows held out
where it was looked at), ``metrics.json``, ``memory.json`` (planned and measured by part) and ``stage.json``.
Checkpoints lie outside the stage's outputs, under ``runs/<pipeline>/.work/train-<digest of inputs>``: DVC empties a
stage's outputs before it runs it, and a killed training must go on where it was. Trackers write under
``runs/<pipeline>/trackers``.
"""

import shutil
import sys
from pathlib import Path

import torch

from graftline.adapters.attach import Coverage, attach
from graftline.adapters.peft_format import AdapterIdentity, save_adapter
from graftline.data.template import template_digest
from graftline.digest import of_file, of_json, write_json
from graftline.plan.preflight import check_fits
from graftline.progress import Reporter
from graftline.train.devices import (
    DTYPES,
    resolve_device,
    resolve_precision,
    return_freed_tensors,
    usable_cores,
    used_bytes,
    weight_dtype,
)
from graftline.train.distributed import is_main, save_verified
from graftline.train.held_out import held_out_loss
from graftline.train.launch import launch, must_launch
from graftline.train.measured import measured_parts
from graftline.train.results import OnStep, TrainResult
from graftline.train.trainer import train
from graftline.weights.config import read_config
from graftline.weights.factors import factors_digest, read_factors
from graftline.weights.identity import BaseIdentity, check_pair, read_identity
from graftline.weights.quant.load import load_model, load_tokenizer
from graftline.weights.quant.plan import plan_of
from graftline.workflow import stage
from graftline.workflow.base import original_base, trained_base
from graftline.workflow.rows import encode, training_rows
from graftline.workflow.stage import Context


def run(context: Context) -> None:
    """Train the adapter, or go on where a killed training was; with several processes, start them."""
    processes = context.pipeline.train.processes
    if must_launch(processes):
        launch(["tasks.train", context.name], processes=processes, on_line=lambda line: print(line, file=sys.stderr))
        return
    pipeline, base = context.pipeline, trained_base(context)
    settings = pipeline.train
    # Before the model is loaded: its initialization would otherwise take every core, whatever the pipeline says.
    torch.set_num_threads(settings.threads or usable_cores())
    tokenizer = load_tokenizer(base)
    encoded, held_out = (encode(context, rows, tokenizer).encoded for rows in training_rows(context))
    identity, spec = read_identity(base), pipeline.adapter
    # LoftQ and QPiSSA made the base and the adapter's first values for each other.
    initial = factors_digest(base) if identity.pair else None
    check_pair(identity, initial)
    # Before anything is loaded: a training that cannot fit says what would.
    memory = check_fits(
        read_config(original_base(context)),
        encoded,
        settings=settings,
        adapter=spec,
        quantization=plan_of(pipeline.quantize).default if identity.quantizer else None,
    )
    return_freed_tensors(settings)
    device = resolve_device(settings.device)
    arithmetic, before = DTYPES[resolve_precision(settings.precision, device)], used_bytes(device)
    model = load_model(base, device=device, dtype=weight_dtype(arithmetic, spec))
    coverage = attach(model, spec, seed=settings.seed, initial=read_factors(base) if initial else None)
    stage.logger.info("what is trained:\n%s", coverage.table())
    work = _work_folder(context, identity)
    result = train(
        model,
        encoded,
        settings=settings,
        work=work,
        on_step=_progress(),
        evaluate=held_out_loss(held_out, settings) if held_out else None,
        trackers=context.runs / "trackers",
    )
    adapter = AdapterIdentity(
        base_digest=identity.digest,
        quantizer=identity.quantizer,
        template_digest=template_digest(tokenizer, pipeline.base.template),
        training_run=f"{context.name}/{work.name}",
        initial_digest=initial,
    )
    out = context.folder("train")
    save_verified(lambda folder: save_adapter(model, folder, identity=adapter), out / "adapter")
    if is_main():
        _write_figures(out, result, coverage)
        peak = max(0, result.peak_bytes - before)
        parts = measured_parts(model, optimizer_bytes=result.optimizer_bytes, peak_bytes=peak)
        measured = {"measured_peak_bytes": peak, "measured_parts_bytes": parts, "device": device}
        write_json(out / "memory.json", {"planned": memory.document(), **measured})


def _write_figures(out: Path, result: TrainResult, coverage: Coverage) -> None:
    scores = dict(result.scores)
    steps = ({"step": at, "loss": loss, "held_out_loss": scores.get(at)} for at, loss in enumerate(result.losses, 1))
    write_json(
        out / "history.json", [{key: value for key, value in step.items() if value is not None} for step in steps]
    )
    best = {"best_step": result.best_step, "held_out_loss": min(scores.values())} if scores else {}
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
            **best,
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
            shutil.rmtree(other, ignore_errors=True)  # another process of this training may be at it too
    return work


def main() -> None:
    """Command line."""
    stage.main("train", run)


if __name__ == "__main__":
    main()
