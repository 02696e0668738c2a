"""Does the server say what transformers with our library says? Every method on one graph of a real base.

    python -m benchmarks.serving_parity /tmp/base-fp32

For each method an adapter with random values (rank 16 on every linear layer), for LoftQ and QPiSSA on the quantized
base that is made with it, and the LoRA and DoRA adapters merged. Per model: greedy tokens of several prompts, which
must be equal, and the largest difference of a logit over every position of prompts and answers, at most 1e-3.
Writes ``benchmarks/results/serving_parity.json`` and ends with an error when one differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.serving_models import RANK, make_adapter
from graftline.adapters.peft_format import load_adapter
from graftline.checkpoint.identity import read_identity
from graftline.errors import ServingError
from graftline.export.onnx_session import Step
from graftline.merge.fold import merge_folder
from graftline.quant.factors import Factors
from graftline.quant.init import InitPlan, initialize
from graftline.quant.load import load_model
from graftline.serving import smoke
from graftline.serving.base import Base, Runtime
from graftline.serving.catalog import Catalog

RESULTS = Path(__file__).parent / "results" / "serving_parity.json"
METHODS = ("lora", "rslora", "pissa", "vera", "dora", "houlsby", "pfeiffer")
PAIRED = {"loftq": "loftq", "qpissa": "pissa"}
"""Method of the quantized initialization, and of the adapter that starts from it."""
NUM_TOKENS, MAX_DIFFERENCE = 24, 1e-3
TEXTS = (
    "Definition: a tall perennial woody plant having a main trunk\nCategory:",
    "The capital of France is",
    "Water boils at one hundred degrees at sea level, because",
    "def fibonacci(n):\n",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        models = on_one_graph(args.model, Path(work)) | with_own_base(args.model, Path(work))
    report = {"model": args.model.name, "rank": RANK, "prompts": len(TEXTS), "tokens": NUM_TOKENS, "models": models}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if not all(m["tokens_equal"] and m["largest_logit_difference"] <= MAX_DIFFERENCE for m in models.values()):
        sys.exit(1)


def on_one_graph(model: Path, work: Path) -> dict[str, Any]:
    """The base and all adapters that it takes, loaded at the same time; then two of them merged."""
    catalog, runtime = Catalog(), Runtime(graphs=work / "graphs", num_threads=1)
    catalog.add_base("base", Base(model, runtime))
    folders = {method: make_adapter(model, work / method, method) for method in METHODS}
    for method, folder in folders.items():
        catalog.load_adapter(method, folder)
    found = {name: compare(catalog, name, model, folders.get(name)) for name in ("base", *METHODS)}
    for method in ("lora", "dora"):
        merged = work / f"merged-{method}"
        merge_folder(model, folders[method], merged, dtype=torch.float32)
        catalog.add_base(merged.name, Base(merged, runtime))
        found[f"{method}, merged"] = compare(catalog, merged.name, model, folders[method])
    return found


def with_own_base(model: Path, work: Path) -> dict[str, Any]:
    """Adapters that were made with their quantized base: served on it, refused on the dense one."""
    found = {}
    for init, method in PAIRED.items():
        own, folder = work / f"{init}-base", work / init
        plan = InitPlan(method=init, steps=2)  # type: ignore[arg-type]
        initialize(model, own, plan=plan, factors=lambda module: Factors(RANK, 1.0))
        make_adapter(own, folder, method)
        catalog, runtime = Catalog(), Runtime(graphs=work / "graphs", num_threads=1)
        catalog.add_base("dense", Base(model, runtime))
        try:
            catalog.load_adapter(init, folder)
            is_refused = False
        except ServingError:
            is_refused = True
        catalog.add_base("own", Base(own, runtime))
        catalog.load_adapter(init, folder)
        found[init] = compare(catalog, init, own, folder) | {"refused_on_the_dense_base": is_refused}
    return found


@torch.no_grad()
def compare(catalog: Catalog, name: str, base: Path, adapter: Path | None) -> dict[str, Any]:
    """The served model against transformers with our layers."""
    served, model = catalog.resolve(name), load_model(base)
    if adapter is not None:
        load_adapter(model, adapter, base=read_identity(base))
    runner, num_equal, difference, effect = served.base.new_runner(served.adapter), 0, 0.0, 0.0
    plain = served.base.session.runner()
    for text in TEXTS:
        prompt = served.base.encode_text(text)
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False
        )[0].tolist()
        num_equal += smoke.greedy(served, prompt, NUM_TOKENS) == tuple(tokens[len(prompt) :])
        step = Step([tokens], [len(tokens)], every_position=True)
        cache = served.base.session.new_cache(1, len(tokens))
        found = runner.step(cache, step)[0]
        difference = max(difference, float(np.abs(found - model(torch.tensor([tokens])).logits[0].numpy()).max()))
        effect = max(effect, float(np.abs(found - plain.step(cache, step)[0]).max()))
    return {
        "tokens_equal": num_equal == len(TEXTS),
        "largest_logit_difference": float(f"{difference:.2g}"),
        "largest_logit_effect_of_the_adapter": float(f"{effect:.2g}"),
    }


if __name__ == "__main__":
    main()
