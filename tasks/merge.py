"""Stage merge: the adapter folded into its base, and proof that the result answers as the judged model did.

Writes ``model/`` and ``parity.json``: every candidate, what was chosen and why. Where no merged model answers the same
in any number type, ``parity.json`` says why and the release holds the adapter alone. Where the pipeline asks for no
merged model, ``parity.json`` says so and nothing is folded.
"""

import torch

from graftline.data.rows import read_rows
from graftline.data.template import Encoded, encode
from graftline.digest import of_files, of_folder, write_json
from graftline.evaluate.scored import adapter_digest
from graftline.merge.choice import Chosen, MergePlan, NotMerged, merge_by_evidence
from graftline.progress import Reporter
from graftline.train.devices import resolve_device, usable_cores
from graftline.weights.identity import verify_identity
from graftline.weights.quant.load import load_tokenizer
from graftline.workflow import stage
from graftline.workflow.base import original_base, trained_base
from graftline.workflow.stage import Context

_NUM_ROWS = 32
"""Rows that the models are compared on: their logits fit into 200 MB, and their NLL interval is narrow enough."""


def run(context: Context) -> None:
    """Merge, compare with the unmerged model, and keep what the evidence allows."""
    out = context.folder("merge")
    if not context.pipeline.package.merged:
        write_json(out / "parity.json", {"merged": False, "reason": None})
        return
    torch.set_num_threads(context.pipeline.train.threads or usable_cores())
    base, adapter = trained_base(context), context.folder("train") / "adapter"
    made_of = {"base": str(verify_identity(base).digest), "adapter": str(adapter_digest(of_folder(adapter)))}
    chosen = merge_by_evidence(
        base,
        adapter,
        out / "model",
        plan=_plan(context),
        rows=_rows(context),
        device=resolve_device(context.pipeline.train.device),
        on_progress=Reporter("merge", "tensors"),
    )
    # What was compared, by digest: gate and package hold it against what was scored and what they ship.
    record = {**made_of, **chosen.as_json()}
    if isinstance(chosen, NotMerged):
        stage.logger.warning("%s", chosen.reason)
    else:
        record["model"] = str(of_files(of_folder(out / "model")))
        record["merge"]["num_bytes"] = sum(file.stat().st_size for file in (out / "model").iterdir())
        _say(chosen)
    write_json(out / "parity.json", record)


def _plan(context: Context) -> MergePlan:
    package, quantize = context.pipeline.package, context.pipeline.quantize
    return MergePlan(
        dtype=getattr(torch, package.dtype),
        into=package.merge_into,
        original=None if package.merge_into == "dequantized" else original_base(context),
        requantize=quantize if package.requantize else None,
    )


def _say(chosen: Chosen) -> None:
    for attempt in chosen.attempts:
        stage.logger.warning("not merged to %s", attempt)
    parity = chosen.candidate.parity
    merge = chosen.candidate.merge
    stage.logger.info("folded into %s as %s (%s)", merge.base_choice, merge.dtype, chosen.reason)
    stage.logger.info("merged and unmerged agree: max |Δlogit| %.3g", parity.max_logit_difference)
    if again := chosen.requantized:
        stage.logger.info(
            "requantized: %.0f %% of the update vanished, mean KL %.3g; %s",
            100 * again.loss.vanished,
            again.parity.mean_kl,
            "shipped" if again.shipped else f"not shipped: {'; '.join(again.parity.failures)}",
        )


def _rows(context: Context) -> list[Encoded]:
    tokenizer, template = load_tokenizer(trained_base(context)), context.pipeline.base.template
    rows = read_rows(context.folder("fetch") / "evaluation.jsonl")[:_NUM_ROWS]
    return [encode(row, tokenizer, template=template) for row in rows]


def main() -> None:
    """Command line."""
    stage.main("merge", run)


if __name__ == "__main__":
    main()
