"""Stage evaluate: every held-out item scored for the candidate, for the base and for what production holds.

Writes ``scores/{candidate,base,production}.jsonl`` (one line an item; no production at first), ``metrics.json``.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from graftline.adapters.peft_format import load_adapter
from graftline.checkpoint.identity import read_identity
from graftline.data.leakage import find_leaks
from graftline.data.rows import read_rows
from graftline.data.template import stop_ids, template_digest
from graftline.digest import write_json
from graftline.evaluate.forgetting import score_documents
from graftline.evaluate.guards import folder_bytes, leakage_numbers
from graftline.evaluate.items import option_items
from graftline.evaluate.metrics import accuracy, nll_per_token, stop_rate
from graftline.evaluate.scores import Scores, write_scores
from graftline.evaluate.scoring import score_options
from graftline.progress import Reporter
from graftline.quant.load import load_model, load_tokenizer
from graftline.registry import releases
from graftline.registry.store import open_store
from graftline.train.devices import resolve_device
from tasks import resolve, stage
from tasks.base import original_base, trained_base
from tasks.stage import Context


def run(context: Context) -> None:
    """Score candidate, base and production on the same items."""
    torch.set_num_threads(stage.num_threads(context))
    out = context.folder("evaluate")
    trained = trained_base(context)
    models = {"base": (original_base(context), None), "candidate": (trained, context.folder("train") / "adapter")}
    champion = resolve.load(context)["champion"]["version"]
    if champion:
        models["production"] = _champion(context, champion, trained)
    summary: dict[str, Any] = {}
    for name, (base, adapter) in models.items():
        scores = _score(context, name, _load(context, base, adapter), base)
        if name == "candidate":
            scores = replace(scores, numbers=_numbers(context))
        write_scores(out / "scores" / f"{name}.jsonl", scores)
        summary[name] = _summary(scores)
        stage.logger.info("%s: %s", name, ", ".join(f"{key} {value:.4g}" for key, value in summary[name].items()))
    write_json(out / "metrics.json", summary)


def _champion(context: Context, version: str, trained: Path) -> tuple[Path, Path | None]:
    """What production holds: its adapter on the base at hand if that is its base, else its merged model."""
    folder = context.cache / "releases" / context.name / version
    progress = Reporter("fetch production", "bytes")
    manifest = releases.fetch(
        open_store(resolve.store_url(context)), context.name, version, folder, on_progress=progress
    )
    for base in (trained, original_base(context)):
        if read_identity(base).digest == manifest.lineage.base_digest:
            return base, folder / "adapter"
    return folder / "merged", None


def _load(context: Context, base: Path, adapter: Path | None) -> PreTrainedModel:
    model = load_model(base, device=resolve_device(context.pipeline.train.device), dtype=torch.float32)
    if adapter:
        template = template_digest(load_tokenizer(base), context.pipeline.base.template)
        load_adapter(model, adapter, base=read_identity(base), template_digest=template)
    return model.eval()


def _score(context: Context, name: str, model: PreTrainedModel, base: Path) -> Scores:
    pipeline, tokenizer, fetched = context.pipeline, load_tokenizer(base), context.folder("fetch")
    template, labels = pipeline.base.template, pipeline.data.labels or ()
    items = option_items(read_rows(fetched / "evaluation.jsonl"), tokenizer, template=template, labels=labels)
    scored = score_options(
        model,
        items,
        stop_ids=stop_ids(tokenizer, template=template),
        batch_tokens=pipeline.evaluate.batch_tokens,
        on_progress=Reporter(f"score {name}", "items"),
    )
    texts = [json.loads(line)["text"] for line in (fetched / "general.jsonl").read_text(encoding="utf-8").splitlines()]
    progress = Reporter(f"general text {name}", "windows")
    documents = score_documents(model, tokenizer, texts, on_progress=progress) if texts else []
    return Scores(
        template=template_digest(tokenizer, template), labels=labels, items=tuple(scored), documents=tuple(documents)
    )


def _numbers(context: Context) -> dict[str, float]:
    """What gates may ask about beside the items: leakage between the two files, and the adapter's size."""
    fetched = context.folder("fetch")
    leaks = find_leaks(read_rows(fetched / "train.jsonl"), read_rows(fetched / "evaluation.jsonl"))
    return leakage_numbers(leaks) | {"adapter_bytes": float(folder_bytes(context.folder("train") / "adapter"))}


def _summary(scores: Scores) -> dict[str, Any]:
    summary = {
        "accuracy": accuracy(scores.items),
        "nll": nll_per_token(scores.items),
        "stop_rate": stop_rate(scores.items),
    }
    if scores.documents:
        summary["forgetting_nll"] = nll_per_token(scores.documents)
    return summary


def main() -> None:
    """Command line."""
    stage.main("evaluate", run)


if __name__ == "__main__":
    main()
