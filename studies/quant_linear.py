"""What a quantized layer costs in time and saves in memory.

    python -m studies.quant_linear MODEL [--tokens 432] [--repeat 15]

Time: forward, and forward with backward to the input, of `QuantLinear` over nn.Linear of the same shape and dtype, on
one thread, in CPU seconds, both in turn; the median ratio. The survey puts the overhead of dequantization at 15–30 %.
Memory: one LoRA training step of MODEL with its weights in bf16 and in NF4, each in a process of its own: what loading
and the step add to the process's memory. Writes ``studies/results/quant_linear.json``.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from graftline.adapters.attach import attach
from graftline.settings.model import Adapter
from graftline.weights.importing import import_base
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.load import load_model
from graftline.weights.quant.scheme import Scheme

RESULTS = Path(__file__).parent / "results" / "quant_linear.json"
SHAPES = [(1536, 576), (576, 1536), (576, 576)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=[432, 2048])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(step_memory(args.model)))
        return
    report = {
        "torch": torch.__version__,
        "overhead": [overhead(code, tokens, args.repeat) for tokens in args.tokens for code in ("nf4", "nf3", "nf2")],
        "training_step": training_steps(args.model),
    }
    RESULTS.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    print(json.dumps(report, indent=2))


def overhead(code: str, num_tokens: int, repeat: int) -> dict[str, Any]:
    """Time of quantized layers over time of dense ones, less 1: of forward, and of forward and backward."""
    torch.manual_seed(0)
    dense = [nn.Linear(columns, rows, bias=False).requires_grad_(False) for rows, columns in SHAPES]
    quantized = [QuantLinear(quantize(layer.weight, Scheme(code))) for layer in dense]
    inputs = [torch.randn(num_tokens, columns, requires_grad=True) for _, columns in SHAPES]

    def forward(layers: list[Any]) -> None:
        with torch.no_grad():
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)

    def both(layers: list[Any]) -> None:
        for layer, x in zip(layers, inputs, strict=True):
            torch.autograd.grad(layer(x).sum(), x)

    ratios = {
        name: statistics.median(seconds(work, quantized) / seconds(work, dense) for _ in range(repeat))
        for name, work in (("forward", forward), ("forward_and_backward", both))
    }
    return {"code": code, "tokens": num_tokens, **{name: round(ratio - 1, 3) for name, ratio in ratios.items()}}


def seconds(work: Callable[[list[Any]], None], layers: list[Any]) -> float:
    started = time.process_time()
    work(layers)
    return time.process_time() - started


def training_steps(model: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=model.parent) as work:
        bf16, nf4 = Path(work) / "bf16", Path(work) / "nf4"
        import_base(model, bf16, dtype=torch.bfloat16)
        quantize_folder(bf16, nf4)
        found = {folder.name: run(folder) for folder in (bf16, nf4)}
    ratios = {key: round(found["nf4"][key] / found["bf16"][key], 3) for key in found["bf16"]}
    return found | {"nf4_over_bf16": ratios}


def run(model: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "studies.quant_linear", str(model), "--child"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(text.strip().splitlines()[-1])
    return found


def step_memory(folder: Path) -> dict[str, float]:
    """MB of the weights of the linear layers in the blocks, of loading, and of loading and one training step."""
    before = psutil.Process().memory_info().rss
    model = load_model(folder, dtype=torch.bfloat16)
    loaded = psutil.Process().memory_info().rss
    attach(model, Adapter(method="lora", rank=8, alpha=16, targets="all-linear"), seed=0)
    ids = torch.arange(64).unsqueeze(0)
    model.train()
    model(ids, labels=ids).loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    layers = [*model.model.layers.parameters(), *model.model.layers.buffers()]
    held = sum(tensor.nbytes for tensor in layers if not tensor.requires_grad)
    return {
        "block_weights_mb": round(held / 1e6, 1),
        "loading_mb": round((loaded - before) / 1e6, 1),
        "loading_and_step_mb": round((peak - before) / 1e6, 1),
    }


if __name__ == "__main__":
    main()
