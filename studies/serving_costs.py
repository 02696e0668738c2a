"""What adapters and quantization cost when they are served: time by batch and length, and memory by method.

    python -m studies.serving_costs /tmp/base-fp32 --parts bottleneck quantized memory

bottleneck  a step with a serial bottleneck (Houlsby, width 16) and with LoRA (rank 16) over the base alone, for
            batch 1, 4, 16 and 1 (decoding), 16 and 64 tokens a sequence: the survey says that serial adapters cost most
            at small batches, and that LoRA's branch costs little
quantized   one token of an NF4 base over one of its dense original: on the graph in fp32 (it is dequantized once, at
            export), on the graph in int4, and in transformers with our NF4 layers, which dequantize at every step as
            QLoRA does; the survey says 15 to 30 %
memory      of one adapter of every method in the server's cache, and on disk

All sides of a comparison run turn about in random order. Writes ``studies/results/serving_costs.json``; parts that
are not run keep their figures.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graftline.adapters.peft_format import load_adapter
from graftline.export.onnx_adapter import read_parameters
from graftline.serve.base import Base, Runtime
from graftline.weights.identity import read_identity
from graftline.weights.quant.init import InitPlan, initialize
from graftline.weights.quant.load import load_model
from studies.serving_models import (
    RANK,
    decode_seconds,
    generate_seconds,
    make_adapter,
    prefill_seconds,
)
from studies.turns import rate, ratio, turns

RESULTS = Path(__file__).parent / "results" / "serving_costs.json"
BATCHES, LENGTHS = (1, 4, 16), (1, 16, 64)
METHODS = ("lora", "rslora", "pissa", "vera", "dora", "houlsby", "pfeiffer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep graphs, adapters and the quantized base here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report |= {"model": args.model.name, "rank": RANK, "threads": args.threads}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        runtime = Runtime(graphs=work / "graphs", num_threads=args.threads)
        for part in args.parts:
            report[part] = PARTS[part](args.model, work, runtime, args.rounds)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def adapter_of(model: Path, work: Path, method: str) -> Path:
    folder = work / f"{method}-{RANK}"
    return folder if folder.exists() else make_adapter(model, folder, method)


def bottleneck(model: Path, work: Path, runtime: Runtime, num_rounds: int) -> dict[str, Any]:
    """Latency of one step by batch and tokens a sequence."""
    base = Base(model, runtime)
    runners = {"base": base.new_runner(None)} | {
        method: base.new_runner(base.prepare_adapter(adapter_of(model, work, method))[0])
        for method in ("lora", "houlsby")
    }
    found: dict[str, Any] = {}
    for num_rows in BATCHES:
        for length in LENGTHS:
            sides = {side: step_of(base, runner, num_rows, length) for side, runner in runners.items()}
            seconds = turns(sides, num_rounds)
            found[f"batch_{num_rows}_tokens_{length}"] = {
                "base_ms": round(1e3 * sorted(seconds["base"])[num_rounds // 2], 1),
                "houlsby_over_base": ratio(seconds["houlsby"], seconds["base"]),
                "lora_over_base": ratio(seconds["lora"], seconds["base"]),
            }
    return found


def step_of(base: Base, runner: Any, num_rows: int, length: int) -> Callable[[], float]:
    """One step: one token behind a prompt of 32, or a whole new prompt."""
    if length == 1:
        return lambda: decode_seconds(base, runner, num_rows, 4) / 4
    return lambda: prefill_seconds(base, runner, num_rows, length)


def quantized(model: Path, work: Path, runtime: Runtime, num_rounds: int) -> dict[str, Any]:
    """Tokens a second of an NF4 base against its dense original, each with an adapter of its own."""
    nf4 = work / "nf4"
    if not nf4.exists():
        initialize(model, nf4, plan=InitPlan())
    folders = {"dense": (model, adapter_of(model, work, "lora"))}
    folders["nf4"] = (nf4, work / "nf4-lora")
    if not folders["nf4"][1].exists():
        make_adapter(*folders["nf4"], "lora")
    sides: dict[str, Callable[[], float]] = {}
    for name, precision, (folder, adapter) in (
        ("graph_dense", "fp32", folders["dense"]),
        ("graph_nf4_in_fp32", "fp32", folders["nf4"]),
        ("graph_int4", "int4", folders["dense"]),
    ):
        base = Base(folder, Runtime(graphs=runtime.graphs, num_threads=runtime.num_threads, precision=precision))
        runner = base.new_runner(base.prepare_adapter(adapter)[0])
        sides[name] = lambda base=base, runner=runner: decode_seconds(base, runner, 1, 4)
    for name, (folder, adapter) in folders.items():
        peer = load_model(folder)
        load_adapter(peer, adapter, base=read_identity(folder))
        sides[f"transformers_{name}"] = lambda peer=peer: generate_seconds(peer, 1, 4)
    seconds = turns(sides, num_rounds)
    return {
        "tokens_per_s": {name: rate(4, samples) for name, samples in seconds.items()},
        "graph_nf4_in_fp32_over_dense": ratio(seconds["graph_nf4_in_fp32"], seconds["graph_dense"]),
        "graph_int4_over_dense": ratio(seconds["graph_int4"], seconds["graph_dense"]),
        "transformers_nf4_over_dense": ratio(seconds["transformers_nf4"], seconds["transformers_dense"]),
    }


def memory(model: Path, work: Path, runtime: Runtime, num_rounds: int) -> dict[str, Any]:
    """Bytes of one adapter of every method; ``num_rounds`` does not matter here."""
    del num_rounds
    base, found = Base(model, runtime), {}
    for method in METHODS:
        folder = adapter_of(model, work, method)
        file, _ = base.prepare_adapter(folder)
        num_bytes = sum(value.numpy().nbytes for value in read_parameters(file.file).values())
        found[method] = {
            "folder_mb": megabytes(sum(path.stat().st_size for path in folder.iterdir())),
            "onnx_adapter_mb": megabytes(file.file.stat().st_size),
            "tensors_mb": megabytes(num_bytes),
        }
    return found


def megabytes(num_bytes: float) -> float:
    return round(num_bytes / 2**20, 2)


PARTS = {"bottleneck": bottleneck, "quantized": quantized, "memory": memory}

if __name__ == "__main__":
    main()
