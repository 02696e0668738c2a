"""Does the server say what transformers with our library says? Every method on one graph of a real base.

    python -m studies.serving_parity /tmp/base-fp32 --work /tmp/parity

For each method an adapter with random values (rank 16 on every linear layer), for LoftQ and QPiSSA on the quantized
base that is made with it, and the LoRA and DoRA adapters merged. Per model: greedy tokens of several prompts, which
must be equal, and the largest difference of a logit over every position of prompts and answers, at most 1e-3.
Each model is written to ``studies/results/serving_parity.json`` when it is done and is not measured again while it
stands there; ends with an error when one differs.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftline.adapters.peft_format import load_adapter
from graftline.digest import write_json
from graftline.errors import ServingError
from graftline.export.onnx_session import Step
from graftline.merge.fold import merge_folder
from graftline.serve import smoke
from graftline.serve.base import Base, Runtime
from graftline.serve.catalog import Catalog
from graftline.weights.identity import read_identity
from graftline.weights.quant.factors import Factors
from graftline.weights.quant.init import InitPlan, initialize
from graftline.weights.quant.load import load_model
from studies.serving_models import RANK, make_adapter

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
    parser.add_argument("--work", type=Path, required=True, help="graphs, adapters, merged and quantized bases")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    report |= {"model": args.model.name, "rank": RANK, "prompts": len(TEXTS), "tokens": NUM_TOKENS}
    models = report.setdefault("models", {})
    for name, part in PARTS.items():
        if name not in models:
            models[name] = part(args.model, args.work)
            write_json(args.out, report)
            print(name, models[name], flush=True)
    if not all(m["tokens_equal"] and m["largest_logit_difference"] <= MAX_DIFFERENCE for m in models.values()):
        sys.exit(1)


def on_one_graph(name: str, model: Path, work: Path) -> dict[str, Any]:
    """The base or one of its adapters, while all of them are loaded."""
    catalog = Catalog()
    catalog.add_base("base", Base(model, runtime_in(work)))
    folders = {method: adapter_of(model, work, method) for method in METHODS}
    for method, folder in folders.items():
        catalog.load_adapter(method, folder)
    return compare(catalog, name, model, folders.get(name))


def merged(method: str, model: Path, work: Path) -> dict[str, Any]:
    """The adapter folded into the base, served as a base of its own."""
    catalog, folder, adapter = Catalog(), work / f"merged-{method}", adapter_of(model, work, method)
    if not folder.exists():
        merge_folder(model, adapter, folder, dtype=torch.float32)
    catalog.add_base("merged", Base(folder, runtime_in(work)))
    return compare(catalog, "merged", model, adapter)


def with_own_base(init: str, model: Path, work: Path) -> dict[str, Any]:
    """An adapter that was made with its quantized base: served on it, refused on the dense one."""
    own, catalog, runtime = work / f"{init}-base", Catalog(), runtime_in(work)
    if not own.exists():
        plan = InitPlan(method=init, steps=2)  # type: ignore[arg-type]
        initialize(model, own, plan=plan, factors=lambda module: Factors(RANK, 1.0))
    folder = adapter_of(own, work, PAIRED[init], name=init)
    catalog.add_base("dense", Base(model, runtime))
    try:
        catalog.load_adapter(init, folder)
        is_refused = False
    except ServingError:
        is_refused = True
    catalog.add_base("own", Base(own, runtime))
    catalog.load_adapter(init, folder)
    return compare(catalog, init, own, folder) | {"refused_on_the_dense_base": is_refused}


def runtime_in(work: Path) -> Runtime:
    return Runtime(graphs=work / "graphs", num_threads=1)


def adapter_of(base: Path, work: Path, method: str, *, name: str | None = None) -> Path:
    """The adapter's folder, made if it is not there."""
    folder = work / (name or method)
    return folder if folder.exists() else make_adapter(base, folder, method)


@torch.no_grad()
def compare(catalog: Catalog, name: str, base: Path, adapter: Path | None) -> dict[str, Any]:
    """The served model against transformers with our layers."""
    served, model = catalog.resolve(name), load_model(base)
    if adapter is not None:
        load_adapter(model, adapter, base=read_identity(base))
    model.generation_config.eos_token_id = None  # all tokens are compared, and the end is a token as any other
    runner, num_equal, difference, effect = served.base.new_runner(served.adapter), 0, 0.0, 0.0
    plain = served.base.session.runner()
    for text in TEXTS:
        prompt = served.base.encode_text(text)
        ids = torch.tensor([prompt])
        tokens = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0].tolist()
        num_equal += smoke.greedy(served, prompt, NUM_TOKENS) == tuple(tokens[len(prompt) :])
        step = Step([tokens], [len(tokens)], every_position=True)
        cache = served.base.session.new_cache(1, len(tokens))
        found = runner.step(cache, step)[0]
        difference = max(difference, float(np.abs(found - model(torch.tensor([tokens])).logits[0].numpy()).max()))
        effect = max(effect, float(np.abs(found - plain.step(cache, step)[0]).max()))
    report = {
        "tokens_equal": num_equal == len(TEXTS),
        "largest_logit_difference": float(f"{difference:.2g}"),
    }
    if served.adapter is None:
        return report
    return report | {"largest_logit_effect_of_the_adapter": float(f"{effect:.2g}")}


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    **{name: partial(on_one_graph, name) for name in ("base", *METHODS)},
    **{f"{method}, merged": partial(merged, method) for method in ("lora", "dora")},
    **{init: partial(with_own_base, init) for init in PAIRED},
}


if __name__ == "__main__":
    main()
