"""The evaluate stage: candidate, base, production and further references scored on every held-out item.

Writes ``scores/{candidate,base,production,...}.jsonl`` (one line per item; ``production`` if there is one, and one file
for each of ``evaluate.references``) and a summary of each in ``metrics.json``, with confusion and calibration.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from graftline import settings
from graftline.adapters.peft_format import AdapterWeights, load_adapter, put_on_model
from graftline.address import store_address
from graftline.data.preparation import EVALUATION, GENERAL
from graftline.data.rows import read_rows
from graftline.data.template import template_digest
from graftline.digest import Digest, write_json
from graftline.errors import ReleaseError
from graftline.evaluate.candidate import Candidate, candidate_numbers
from graftline.evaluate.evaluation import EvaluationPlan, evaluate_model
from graftline.evaluate.metrics import summarize
from graftline.evaluate.scores import CANDIDATE, PRODUCTION, write_scores
from graftline.evaluate.verdict import ScoredRelease
from graftline.limits import usable_cores
from graftline.logs import Reporter
from graftline.registry import releases
from graftline.registry.store import open_store
from graftline.settings.gate_metrics import UNQUANTIZED
from graftline.train.devices import resolve_device
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.linear import load_model
from graftline.workflow import resolve
from graftline.workflow.pinned_base import original_base, trained_base
from graftline.workflow.scored import read_digests
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")


@dataclass(frozen=True)
class Model:
    """A model to score: the folder of a base or a merged model, and an adapter if there is one."""

    base: Path
    adapter: Path | None = None
    owns_base: bool = True
    """Whether the adapter must have been trained on exactly this base."""
    release: ScoredRelease | None = None
    """The release that is scored, if it is one."""


def score_models(pipeline: settings.Pipeline, at: Workspace, *, rows: Path, out: Path) -> None:
    """Score candidate, base, production and further references on the same items.

    Args:
        pipeline: the settings.
        at: the pipeline's places.
        rows: the fetch stage's folder, with evaluation rows and general text.
        out: folder for scores/ and metrics.json.

    Raises:
        ReleaseError: a reference was never released, or production's manifest was changed.
    """
    torch.set_num_threads(pipeline.train.threads or usable_cores())
    section, template, device = pipeline.evaluate, pipeline.base.template, resolve_device(pipeline.train.device)
    plan = _plan(pipeline, rows, harness=resolve.harness_folder(section.harness, at.root))
    summary: dict[str, Any] = {}
    for name, each in _models(pipeline, at).items():
        scored = read_digests(each.base, each.adapter, fetched=rows, release=each.release)
        model, tokenizer = _load(each, template, device), load_tokenizer(each.base)
        scores = replace(evaluate_model(model, tokenizer, plan, progress=_reporters(name)), scored=scored)
        if name == CANDIDATE:
            candidate = Candidate(
                model=model,
                tokenizer=tokenizer,
                answers=scores.answers,
                trained=at.folder("train"),
                base=each.base,
                original=original_base(pipeline.base, at),
            )
            scores = replace(scores, numbers=candidate_numbers(candidate, section, template=template, rows=rows))
        write_scores(out / "scores" / f"{name}.jsonl", scores)
        summary[name] = summarize(scores)
        logger.info("%s: %s", name, _line(summary[name]))
    write_json(out / "metrics.json", summary)


def _reporters(name: str) -> Callable[[str, str], Reporter]:
    return lambda what, unit: Reporter(f"{what} {name}", unit)


def _plan(pipeline: settings.Pipeline, rows: Path, *, harness: Path | None) -> EvaluationPlan:
    general = (rows / GENERAL).read_text(encoding="utf-8").splitlines()
    return EvaluationPlan(
        rows=read_rows(rows / EVALUATION),
        template=pipeline.base.template,
        labels=pipeline.data.labels or (),
        texts=[json.loads(line)["text"] for line in general],
        evaluate=pipeline.evaluate,
        task_folder=harness,
    )


def _models(pipeline: settings.Pipeline, at: Workspace) -> dict[str, Model]:
    original, trained = original_base(pipeline.base, at), trained_base(pipeline.base, at)
    adapter, store = at.folder("train") / "adapter", store_address(pipeline.release.store, at.root)

    def released(version: str, digest: Digest | None = None) -> Model:
        folder = at.cache / "releases" / at.name / version
        return _release(store, at.name, version, folder, digest=digest, bases=(trained, original))

    models = {"base": Model(original), CANDIDATE: Model(trained, adapter)}
    champion = resolve.load(at)["champion"]
    if champion["version"]:
        models[PRODUCTION] = released(champion["version"], Digest.parse(champion["release"]))
    for name in pipeline.evaluate.references:
        models[name] = Model(original, adapter, owns_base=False) if name == UNQUANTIZED else released(name)
    return models


def _release(
    store: str, pipeline: str, version: str, folder: Path, *, digest: Digest | None, bases: tuple[Path, ...]
) -> Model:
    """A released version: its adapter if its base is among ``bases``, else its merged model.

    Raises:
        ReleaseError: there is no such release, or its manifest's digest differs from the channel's entry.
    """
    progress = Reporter(f"fetch {version}", "bytes")
    manifest = releases.fetch(open_store(store), pipeline, version, folder, on_progress=progress)
    if digest not in (None, manifest.digest):
        raise ReleaseError(
            f"production holds {version} with the digest {digest}, the store's manifest of it has {manifest.digest}: "
            "it was changed after it was promoted; promote another release, or restore that one"
        )
    release = ScoredRelease(version, manifest.digest)
    for base in bases:
        if read_identity(base).is_called(manifest.lineage.base_digest):
            return Model(base, folder / "adapter", release=release)
    return Model(folder / "merged", release=release)


def _load(model: Model, template: str, device: str) -> PreTrainedModel:
    loaded = load_model(model.base, device=device, dtype=torch.float32)
    if model.adapter and model.owns_base:
        digest = template_digest(load_tokenizer(model.base), template)
        load_adapter(loaded, model.adapter, base=read_identity(model.base), template_digest=digest)
    elif model.adapter:
        put_on_model(loaded, AdapterWeights.open(model.adapter))
    return loaded.eval()


def _line(summary: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, float))
