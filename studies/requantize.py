"""A trained adapter folded into its base and quantized to NF4 again: what is left of it, and what ships?

    python -m studies.requantize NAME BASE ADAPTER ROWS --original ORIGINAL

BASE is the folder that ADAPTER was trained on (``runs/PIPELINE/init/base``, or the dense one), ROWS the evaluation
rows of that run, ORIGINAL the dense base of a quantized one. The merge stage's own choice (`graftline.merge.choice`) is
made with everything asked for: both bases, and NF4 again. With ORIGINAL the merge into it is quantized again too,
whatever was chosen, and stands beside. Adds NAME to ``studies/results/requantize.json``; two core minutes.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graftline.adapters.peft_format import load_adapter
from graftline.data.rows import read_rows
from graftline.data.template import Encoded, encode
from graftline.digest import write_json
from graftline.merge.choice import Chosen, MergePlan, Requantized, merge_by_evidence
from graftline.merge.fold import merge_folder
from graftline.merge.parity import ParityReport, compare_with_recorded, record_logits
from graftline.merge.requantize import REQUANTIZED_LIMITS, requantize_folder
from graftline.weights.identity import read_identity
from graftline.weights.quant.load import load_model, load_tokenizer
from graftline.weights.quant.scheme import Scheme

RESULTS = Path(__file__).parent / "results" / "requantize.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what the adapter is, for the file")
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--num-rows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.base)
    rows = read_rows(options.rows)[: options.num_rows]
    encoded = [encode(row, tokenizer, template="none") for row in rows]
    plan = MergePlan(
        torch.float16, "both" if options.original else "dequantized", options.original, requantize=Scheme()
    )
    with tempfile.TemporaryDirectory() as work:
        chosen = merge_by_evidence(options.base, options.adapter, Path(work) / "model", plan=plan, rows=encoded)
    assert isinstance(chosen, Chosen)
    assert chosen.requantized is not None
    found = {"rows": len(encoded), "training": trained(options.adapter)} | summarize(chosen)
    found["requantized"] = summarize_requantized(chosen.requantized)
    if options.original:
        again = requantize_original(options.base, options.adapter, options.original, encoded)
        found["requantized_from_original"] = summarize_requantized(again)
    print(json.dumps(found, indent=2))
    document = json.loads(options.out.read_text()) if options.out.exists() else {}
    write_json(options.out, document | {options.name: found})


def trained(adapter: Path) -> dict[str, Any]:
    """What the train stage wrote beside the adapter about the training."""
    metrics = json.loads((adapter.parent / "metrics.json").read_text())
    return {name: metrics[name] for name in ("steps", "loss_first", "loss_last")}


def requantize_original(base: Path, adapter: Path, original: Path, rows: Sequence[Encoded]) -> Requantized:
    """NF4 again, of the merge into the weights from before the quantization; compared with the unmerged model."""
    tokens = [row.input_ids for row in rows]
    model = load_model(base, dtype=torch.float32)
    load_adapter(model, adapter, base=read_identity(base))
    recorded = record_logits(model, tokens)
    with tempfile.TemporaryDirectory() as work:
        merged, again = Path(work) / "merged", Path(work) / "again"
        merge_folder(base, adapter, merged, dtype=torch.float16, original=original)
        loss = requantize_folder(merged, again, base=original, scheme=Scheme())
        report = compare_with_recorded(
            recorded,
            load_model(again, dtype=torch.float32),
            tokens,
            limits=REQUANTIZED_LIMITS,
            answers=[row.supervised for row in rows],
        )
    return Requantized(loss, report)


def summarize(chosen: Chosen) -> dict[str, Any]:
    """Every candidate's figures, and the choice."""
    return {
        "candidates": {name: parity(candidate.parity) for name, candidate in chosen.candidates.items()},
        "chosen": chosen.name,
        "reason": chosen.reason,
    }


def summarize_requantized(again: Requantized) -> dict[str, Any]:
    """How the model answers that was quantized again; what became of the update: mean and quartiles over layers."""
    layers = again.loss.layers
    return parity(again.parity) | {
        "shipped": again.shipped,
        "layers": len(layers),
        "vanished": again.loss.vanished,
        "vanished_quartiles": statistics.quantiles((1 - layer.kept for layer in layers), n=4),
        "noise_in_units_of_the_update": again.loss.noise,
        "update_over_weight": statistics.mean(layer.update for layer in layers),
    }


def parity(report: ParityReport) -> dict[str, Any]:
    """What is quoted of a comparison with the unmerged model."""
    names = (
        "num_tokens",
        "max_logit_difference",
        "argmax_agreement",
        "mean_kl",
        "nll_change",
        "nll_change_interval",
        "answer_nll_change",
        "answer_nll_change_interval",
    )
    return {name: getattr(report, name) for name in names} | {"failures": list(report.failures)}


if __name__ == "__main__":
    main()
