"""Stage merge: the adapter folded into the base that it was trained on, and proof that both answer alike.

Writes ``model/`` and ``parity.json``. A merged model that answers differently stops the line. Where the pipeline asks
for no merged model, ``parity.json`` says so and nothing is folded.
"""

from dataclasses import asdict
from typing import Any

import torch

from graftline.adapters.peft_format import load_adapter
from graftline.checkpoint.identity import read_identity
from graftline.data.rows import read_rows
from graftline.data.template import encode
from graftline.digest import write_json
from graftline.errors import MergeError
from graftline.merge.fold import merge_folder
from graftline.merge.parity import ParityLimits, compare_with_recorded, record_logits
from graftline.progress import Reporter
from graftline.quant.load import load_model, load_tokenizer
from graftline.train.devices import resolve_device
from tasks import stage
from tasks.base import trained_base
from tasks.stage import Context

_NUM_ROWS = 32
"""Rows that both models are compared on: their logits fit into 200 MB, and their NLL interval is narrow enough."""


def run(context: Context) -> None:
    """Merge, and compare the merged model with the unmerged one."""
    out = context.folder("merge")
    if not context.pipeline.package.merged:
        write_json(out / "parity.json", {"merged": False})
        return
    torch.set_num_threads(stage.num_threads(context))
    base, adapter = trained_base(context), context.folder("train") / "adapter"
    dtype = getattr(torch, context.pipeline.package.dtype)
    report = merge_folder(base, adapter, out / "model", dtype=dtype, on_progress=Reporter("merge", "tensors"))
    sequences = _sequences(context)
    device = resolve_device(context.pipeline.train.device)
    unmerged = load_model(base, device=device, dtype=torch.float32)
    load_adapter(unmerged, adapter, base=read_identity(base))
    recorded = record_logits(unmerged, sequences)
    del unmerged  # one model in memory at a time
    merged = load_model(out / "model", device=device, dtype=torch.float32)
    parity = compare_with_recorded(recorded, merged, sequences, limits=ParityLimits.for_dtype(dtype))
    num_bytes = sum(file.stat().st_size for file in (out / "model").iterdir())
    facts: dict[str, Any] = asdict(report) | {"digest": str(report.digest), "base_digest": str(report.base_digest)}
    facts["num_bytes"] = num_bytes
    write_json(out / "parity.json", {"merged": True, "merge": facts, "parity": parity.as_json()})
    if not parity.passed:
        raise MergeError(
            f"the merged model answers differently: {'; '.join(parity.failures)}; set package.dtype to float16 or "
            "float32, or package.merged to false and serve the adapter unmerged"
        )
    stage.logger.info("merged and unmerged agree: max |Δlogit| %.3g", parity.max_logit_difference)


def _sequences(context: Context) -> list[list[int]]:
    tokenizer, template = load_tokenizer(trained_base(context)), context.pipeline.base.template
    rows = read_rows(context.folder("fetch") / "evaluation.jsonl")[:_NUM_ROWS]
    return [encode(row, tokenizer, template=template).input_ids for row in rows]


def main() -> None:
    """Command line."""
    stage.main("merge", run)


if __name__ == "__main__":
    main()
