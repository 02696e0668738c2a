"""Does LoftQ help where it claims to: at 2 bits, in a mixture, at 4 bits, before and after training?

    python -m studies.loftq_end_to_end MODEL ROWS --case nf2-loftq --seed 0 [--steps 0] [--items 64]

A case is a width (dense; nf4; mixed: the first half of the blocks in 4 bits, the rest in 2; nf2) and an initialization
(plain: an adapter that starts from zero, QLoRA; loftq; qpissa). Measured on held-out rows: NLL a token and accuracy of
the initialized model and, with ``--steps``, of the trained one. One call measures one case and seed and adds it to
``studies/results/loftq_end_to_end.json``; ``--table`` prints the means over what is there.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.attach import attach, plan_layers
from graftline.data.rows import Row, read_rows
from graftline.data.split import split_rows
from graftline.data.template import encode_rows, stop_ids
from graftline.evaluate.items import option_items
from graftline.evaluate.metrics import accuracy, nll_per_token
from graftline.evaluate.scoring import score_options
from graftline.settings.model import Adapter, Train
from graftline.train.trainer import train
from graftline.weights.factors import read_factors
from graftline.weights.quant.factors import Factors
from graftline.weights.quant.init import InitPlan, initialize
from graftline.weights.quant.load import load_model, load_skeleton, load_tokenizer
from graftline.weights.quant.plan import QuantizationPlan, first_blocks
from graftline.weights.quant.scheme import Scheme

RESULTS = Path(__file__).parent / "results" / "loftq_end_to_end.json"
TEMPLATE, MAX_TOKENS, RANK, BATCH, NUM_ROWS = "none", 128, 16, 8, 3000
NF4, NF2 = Scheme("nf4", 64), Scheme("nf2", 64)
METHODS = {"plain": "none", "loftq": "loftq", "qpissa": "qpissa"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("rows", type=Path, nargs="?")
    parser.add_argument("--case", help="for example nf2-loftq")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.table:
        print(table(report))
        return
    report[f"{args.case}-{args.seed}"] = measure(args)
    RESULTS.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    print(json.dumps(report[f"{args.case}-{args.seed}"]))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    width, _, init = args.case.partition("-")
    rows = read_rows(args.rows)[:NUM_ROWS]
    split = split_rows(rows, args.items, seed=0)
    spec = Adapter(method="lora" if init == "plain" else "loftq", rank=RANK, alpha=RANK, targets="all-linear")
    with tempfile.TemporaryDirectory(dir=args.model.parent) as work:
        base = Path(work) / "base"
        layers = plan_layers(load_skeleton(args.model), spec)
        factors = {name: Factors(layer.rank, layer.scale) for name, layer in layers.items()}
        plan = InitPlan(quantization(width, args.model), METHODS[init], seed=args.seed)  # type: ignore[arg-type]
        report = initialize(args.model, base, plan=plan, factors=factors.get)
        model, tokenizer = load_model(base), load_tokenizer(base)
        attach(model, spec, seed=args.seed, initial=None if init == "plain" else read_factors(base))
        found = {"steps": args.steps, "items": args.items, "bits_per_weight": round(report.bits_per_weight, 3)}
        found["weight_error"] = round(statistics.mean([layer.error for layer in report.layers] or [0.0]), 4)
        found |= {f"{key}_before": value for key, value in score(model, tokenizer, split.evaluation, rows).items()}
        if args.steps:
            encoded = encode_rows(
                split.training, tokenizer, template=TEMPLATE, max_tokens=MAX_TOKENS, overlength="drop"
            ).encoded
            settings = Train(
                steps=args.steps,
                batch_size=BATCH,
                learning_rate=5e-4,
                scheduler="constant",
                seed=args.seed,
                checkpoint_every=0,
                threads=1,
            )
            train(model, encoded, settings=settings, work=Path(work) / "train")
            found |= {f"{key}_after": value for key, value in score(model, tokenizer, split.evaluation, rows).items()}
    return found


def quantization(width: str, model: Path) -> QuantizationPlan:
    if width == "mixed":
        return first_blocks(load_skeleton(model).config.num_hidden_layers // 2, NF4, NF2)
    return QuantizationPlan({"dense": None, "nf4": NF4, "nf2": NF2}[width])


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], all_rows: list[Row]
) -> dict[str, float]:
    labels = tuple(sorted({row.messages[-1].content.strip() for row in all_rows}))
    model.eval()
    items = option_items(rows, tokenizer, template=TEMPLATE, labels=labels)
    scores = score_options(model, items, stop_ids=stop_ids(tokenizer, template=TEMPLATE))
    return {"nll": round(nll_per_token(scores), 4), "accuracy": round(accuracy(scores), 4)}


def table(report: dict[str, Any]) -> str:
    """One line a width and initialization: means over the seeds that were measured."""
    lines = [
        "| width | init | bits | weight error | NLL before | NLL after | accuracy after | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = sorted({name.rpartition("-")[0] for name in report})
    for case in cases:
        found = [value for name, value in report.items() if name.rpartition("-")[0] == case]
        cells = [
            mean(found, key) for key in ("bits_per_weight", "weight_error", "nll_before", "nll_after", "accuracy_after")
        ]
        lines.append(f"| {case.replace('-', ' | ')} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines)


def mean(found: list[dict[str, Any]], key: str) -> str:
    """Mean over seeds, with the smallest and the largest where they differ."""
    values = [entry[key] for entry in found if key in entry]
    if not values:
        return "–"
    spread = f" [{min(values):.3g}, {max(values):.3g}]" if min(values) < max(values) else ""
    return f"{statistics.mean(values):.3g}{spread}"


if __name__ == "__main__":
    main()
