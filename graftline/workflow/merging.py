"""The merge stage: the adapter folded into its base, and evidence that the result answers like the judged model.

Writes ``model/`` and ``parity.json`` with every candidate, the choice and its reason. If the merged model differs in
every number type, ``parity.json`` says why and the release contains only the adapter; if the pipeline does not ask for
a merged model, ``parity.json`` says so.
"""

import logging
from itertools import islice
from pathlib import Path

import torch

from graftline import settings
from graftline.data.rows import each_row
from graftline.data.template import Encoded, encode
from graftline.digest import of_files, of_folder, write_json
from graftline.evaluate.verdict import adapter_digest
from graftline.limits import usable_cores
from graftline.logs import Reporter
from graftline.merge.choice import MergeOutcome, MergePlan, NotMerged, merge_by_evidence
from graftline.plan.stage_memory import check_stage
from graftline.train.devices import resolve_device
from graftline.weights.identity import verify_identity
from graftline.weights.model_folder import load_tokenizer, read_config
from graftline.workflow.calibrating import calibration_ids
from graftline.workflow.pinned_base import original_base, trained_base
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")

_NUM_ROWS = 32
"""Rows for the comparison: enough for a narrow interval of their NLL."""


def merge_adapter(pipeline: settings.Pipeline, at: Workspace, *, rows: Path, adapter: Path, out: Path) -> None:
    """Merge, compare with the unmerged model, and keep what the evidence allows.

    Args:
        pipeline: the settings.
        at: the pipeline's places.
        rows: file of the evaluation rows.
        adapter: folder of the adapter.
        out: folder for model/ and parity.json.
    """
    if not pipeline.package.merged:
        write_json(out / "parity.json", {"merged": False, "reason": None})
        return
    check_stage("merge", pipeline, read_config(original_base(pipeline.base, at)))
    torch.set_num_threads(pipeline.train.threads or usable_cores())
    base = trained_base(pipeline.base, at)
    made_of = {"base": str(verify_identity(base).digest), "adapter": str(adapter_digest(of_folder(adapter)))}
    original = None if pipeline.package.merge_into == "dequantized" else original_base(pipeline.base, at)
    chosen = merge_by_evidence(
        base,
        adapter,
        out / "model",
        plan=_plan(pipeline, at, original),
        rows=comparison_rows(rows, base, pipeline.base.template),
        device=resolve_device(pipeline.train.device),
        on_progress=Reporter("merge", "tensors"),
    )
    # What was compared, by digest: gate and package compare it with what was scored and what they ship.
    record = {**made_of, **chosen.as_json()}
    if isinstance(chosen, NotMerged):
        logger.warning("%s", chosen.reason)
    else:
        record["model"] = str(of_files(of_folder(out / "model")))
        record["merge"]["num_bytes"] = sum(file.stat().st_size for file in (out / "model").iterdir())
        _say(chosen)
    write_json(out / "parity.json", record)


def _plan(pipeline: settings.Pipeline, at: Workspace, original: Path | None) -> MergePlan:
    package = pipeline.package
    return MergePlan(
        dtype=getattr(torch, package.dtype),
        into=package.merge_into,
        original=original,
        requantize=pipeline.quantize if package.requantize else None,
        calibration=calibration_ids(pipeline, at, trained_base(pipeline.base, at)) if package.calibrates else None,
    )


def _say(chosen: MergeOutcome) -> None:
    for attempt in chosen.attempts:
        logger.warning("not merged to %s", attempt)
    parity = chosen.candidate.parity
    merge = chosen.candidate.merge
    logger.info("folded into %s as %s (%s)", merge.base_choice, merge.dtype, chosen.reason)
    logger.info("merged and unmerged agree: max |Δlogit| %.3g", parity.max_logit_difference)
    if again := chosen.requantized:
        logger.info(
            "requantized (rounding %s): %.0f %% of the weights' update vanished, mean KL %.3g; %s",
            again.rounding,
            100 * again.loss.vanished,
            again.parity.mean_kl,
            "shipped" if again.shipped else f"not shipped: {'; '.join(again.parity.failures)}",
        )


def comparison_rows(rows: Path, base: Path, template: str) -> list[Encoded]:
    """The evaluation rows on which a model is compared with the judged one."""
    tokenizer = load_tokenizer(base)
    return [encode(row, tokenizer, template=template) for row in islice(each_row(rows), _NUM_ROWS)]
