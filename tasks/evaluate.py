"""Stage evaluate: every held-out item scored for the candidate, for the base and for what production holds.

Writes ``scores/{candidate,base,production,...}.jsonl`` (one line an item; no production at first; one file for each of
``evaluate.references``) and ``metrics.json``: a summary of each, confusion and calibration included.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from graftline.adapters.peft_format import AdapterWeights, load_adapter, put_on_model
from graftline.data.rows import read_rows
from graftline.data.template import template_digest
from graftline.digest import Digest, write_json
from graftline.errors import ReleaseError
from graftline.evaluate.evaluation import AnswerPlan, HarnessPlan, Plan, evaluate_model
from graftline.evaluate.scored import ScoredRelease
from graftline.evaluate.scores import write_scores
from graftline.evaluate.summary import summarize
from graftline.progress import Reporter
from graftline.registry import releases
from graftline.registry.store import open_store
from graftline.settings.measured import UNQUANTIZED
from graftline.train.devices import resolve_device, usable_cores
from graftline.weights.identity import read_identity
from graftline.weights.quant.load import load_model, load_tokenizer
from graftline.workflow import resolve, stage
from graftline.workflow.base import original_base, trained_base
from graftline.workflow.candidate_numbers import candidate_numbers
from graftline.workflow.scored import CANDIDATE, PRODUCTION, read_digests, scores_folder
from graftline.workflow.stage import Context


@dataclass(frozen=True)
class Judged:
    """A model to score: a folder with a base or a merged model, and an adapter on it or none."""

    base: Path
    adapter: Path | None = None
    owns_base: bool = True
    """Whether the adapter was trained on this very base; a foreign one is refused then."""
    release: ScoredRelease | None = None
    """The release that it is."""


def run(context: Context) -> None:
    """Score candidate, base, production and further references on the same items."""
    torch.set_num_threads(context.pipeline.train.threads or usable_cores())
    out, plan = context.folder("evaluate"), _plan(context)
    summary: dict[str, Any] = {}
    for name, judged in _models(context).items():
        scored = read_digests(context, judged.base, judged.adapter, release=judged.release)
        model, tokenizer = _load(context, judged), load_tokenizer(judged.base)
        scores = replace(evaluate_model(model, tokenizer, plan, progress=_reporters(name)), scored=scored)
        if name == CANDIDATE:
            scores = replace(scores, numbers=candidate_numbers(context, model, tokenizer, scores.answers))
        write_scores(scores_folder(context) / f"{name}.jsonl", scores)
        summary[name] = summarize(scores)
        stage.logger.info("%s: %s", name, _line(summary[name]))
    write_json(out / "metrics.json", summary)


def _reporters(name: str) -> Callable[[str, str], Reporter]:
    return lambda what, unit: Reporter(f"{what} {name}", unit)


def _plan(context: Context) -> Plan:
    section, fetched = context.pipeline.evaluate, context.folder("fetch")
    general = (fetched / "general.jsonl").read_text(encoding="utf-8").splitlines()
    answers, harness = section.answers, section.harness
    return Plan(
        rows=read_rows(fetched / "evaluation.jsonl"),
        template=context.pipeline.base.template,
        labels=context.pipeline.data.labels or (),
        texts=[json.loads(line)["text"] for line in general],
        answers=AnswerPlan(answers.max_new_tokens, answers.max_rows) if answers else None,
        harness=HarnessPlan(harness.tasks, resolve.harness_folder(context), harness.max_items) if harness else None,
        batch_tokens=section.batch_tokens,
    )


def _models(context: Context) -> dict[str, Judged]:
    trained, adapter = trained_base(context), context.folder("train") / "adapter"
    models = {"base": Judged(original_base(context)), CANDIDATE: Judged(trained, adapter)}
    champion = resolve.load(context)["champion"]
    if champion["version"]:
        models[PRODUCTION] = _release(context, champion["version"], trained, digest=Digest.parse(champion["release"]))
    for name in context.pipeline.evaluate.references:
        if name == UNQUANTIZED:
            models[name] = Judged(original_base(context), adapter, owns_base=False)
        else:
            models[name] = _release(context, name, trained)
    return models


def _release(context: Context, version: str, trained: Path, *, digest: Digest | None = None) -> Judged:
    """A released version: its adapter on the base at hand if that is its base, else its merged model.

    Raises:
        ReleaseError: no such release, or its manifest has another digest than the channel's entry names.
    """
    folder = context.cache / "releases" / context.name / version
    progress = Reporter(f"fetch {version}", "bytes")
    manifest = releases.fetch(
        open_store(resolve.store_url(context)), context.name, version, folder, on_progress=progress
    )
    if digest not in (None, manifest.digest):
        raise ReleaseError(
            f"production holds {version} with the digest {digest}, the store's manifest of it has {manifest.digest}: "
            "it was changed after it was promoted; promote another release, or restore that one"
        )
    release = ScoredRelease(version, manifest.digest)
    for base in (trained, original_base(context)):
        if read_identity(base).is_called(manifest.lineage.base_digest):
            return Judged(base, folder / "adapter", release=release)
    return Judged(folder / "merged", release=release)


def _load(context: Context, judged: Judged) -> PreTrainedModel:
    device = resolve_device(context.pipeline.train.device)
    model = load_model(judged.base, device=device, dtype=torch.float32)
    if judged.adapter and judged.owns_base:
        template = template_digest(load_tokenizer(judged.base), context.pipeline.base.template)
        load_adapter(model, judged.adapter, base=read_identity(judged.base), template_digest=template)
    elif judged.adapter:
        put_on_model(model, AdapterWeights.open(judged.adapter))
    return model.eval()


def _line(summary: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, float))


def main() -> None:
    """Command line."""
    stage.main("evaluate", run)


if __name__ == "__main__":
    main()
