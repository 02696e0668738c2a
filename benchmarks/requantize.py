"""A trained adapter folded into its base and quantized to NF4 again: what is left of it, and what ships?

    python -m benchmarks.requantize NAME BASE ADAPTER ROWS --original ORIGINAL

BASE is the folder that ADAPTER was trained on (``runs/PIPELINE/init/base``, or the dense one), ROWS the evaluation
rows of that run, ORIGINAL the dense base of a quantized one. The merge stage's own choice (`graftline.merge.choice`) is
made with everything asked for: both bases, and NF4 again. Adds NAME to ``benchmarks/results/requantize.json``; two core
minutes.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graftline.data.rows import read_rows
from graftline.data.template import encode
from graftline.digest import write_json
from graftline.merge.choice import Chosen, MergePlan, merge_by_evidence
from graftline.merge.parity import ParityReport
from graftline.quant.load import load_tokenizer
from graftline.quant.scheme import Scheme

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
        out = Path(work) / "model"
        chosen = merge_by_evidence(options.base, options.adapter, out, plan=plan, rows=encoded)
    found = summarize(chosen)
    print(json.dumps(found, indent=2))
    document = json.loads(options.out.read_text()) if options.out.exists() else {}
    write_json(options.out, document | {options.name: found})


def summarize(chosen: Chosen) -> dict[str, Any]:
    """Every candidate's figures; what became of the update as mean and quartiles over the layers."""
    assert chosen.requantized is not None
    loss = chosen.requantized.loss
    layers = [asdict(layer) for layer in loss.layers]
    return {
        "candidates": {name: parity(candidate.parity) for name, candidate in chosen.candidates.items()},
        "chosen": chosen.name,
        "reason": chosen.reason,
        "requantized": parity(chosen.requantized.parity)
        | {
            "shipped": chosen.requantized.shipped,
            "layers": len(layers),
            "vanished": loss.vanished,
            "vanished_quartiles": statistics.quantiles((1 - layer["kept"] for layer in layers), n=4),
            "noise_in_units_of_the_update": loss.noise,
            "update_over_weight": statistics.mean(layer["update"] for layer in layers),
        },
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
