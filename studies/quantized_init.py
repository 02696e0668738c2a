"""Quantized initialization against peers, paired in one run: LoftQ, PiSSA, and how near both are to the exact SVD.

    python -m studies.quantized_init MODEL --peer ../shared/bench/peer_init.py --part loftq-4 [--threads 1]

Parts: loftq-4, loftq-2 (the published procedure in memory against ours from disk to disk), pissa (peft's ``pissa`` and
``pissa_niter_4`` against ours), exact-4, exact-2 (our errors against the same alternation with an exact SVD, on every
layer). Each measurement is a process of its own; ours and the peer's alternate on the same number of threads. Times are
CPU seconds of the process, so that a busy machine does not decide the ratio: the peer's script runs unchanged, with
``time.perf_counter`` replaced by ``time.process_time``. Each part replaces its own entry in
``studies/results/quantized_init.json``.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from graftline.adapters.attach import attach
from graftline.digest import write_json
from graftline.settings.model import Adapter
from graftline.weights import linalg
from graftline.weights.arch import read_architecture
from graftline.weights.quant import factors as quant_factors
from graftline.weights.quant.factors import Factors, make_pair
from graftline.weights.quant.init import InitPlan, initialize
from graftline.weights.quant.load import load_model
from graftline.weights.quant.plan import QuantizationPlan
from graftline.weights.quant.scheme import Scheme
from graftline.weights.reader import CheckpointReader, read_json_object
from graftline.weights.sidecars import copy_sidecars
from graftline.weights.writer import CheckpointWriter

RESULTS = Path(__file__).parent / "results" / "quantized_init.json"
CODES = {"4": "nf4", "2": "nf2"}
RANK, STEPS = 16, 5
PEER = """
import runpy, sys, time
time.perf_counter = time.process_time
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", type=Path, help="peer_init.py")
    parser.add_argument("--part", required=True, choices=["loftq-4", "loftq-2", "pissa", "exact-4", "exact-2"])
    parser.add_argument("--blocks", type=int, help="compare on the model's first blocks only (all have equal shapes)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    method, _, bits = args.part.partition("-")
    if args.child:
        print(json.dumps(loftq(args.model, CODES[bits]) if method == "loftq" else pissa(args.model)))
        return
    if method == "exact":
        result = exactness(args.model, CODES[bits])
    else:
        with tempfile.TemporaryDirectory(dir=args.model.parent) as work:
            args.model = cut(args.model, Path(work) / "cut", args.blocks) if args.blocks else args.model
            result = compare(args, method, bits) | {"blocks": args.blocks or "all"}
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report["machine"] = {"processor": platform.machine(), "threads": args.threads, "torch": torch.__version__}
    report[args.part] = result
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, indent=2))


def cut(model: Path, out: Path, num_blocks: int) -> Path:
    """The model without its later blocks."""
    reader, arch = CheckpointReader(model), read_architecture(model)
    with CheckpointWriter(out) as writer:
        for name in reader.names():
            if (arch.block_of(name) or 0) < num_blocks:
                writer.add(name, reader.read(name))
        copy_sidecars(model, writer.stage)
        config = read_json_object(model / "config.json") | {"num_hidden_layers": num_blocks}
        write_json(writer.stage / "config.json", config)
        writer.finish()
    return out


def compare(args: argparse.Namespace, method: str, bits: str) -> dict[str, Any]:
    """Alternate our process with the peer's; ratios of the medians."""
    peer_methods = ["loftq"] if method == "loftq" else ["pissa", "pissa_niter_4"]
    ours: list[dict[str, Any]] = []
    peers: dict[str, list[dict[str, Any]]] = {name: [] for name in peer_methods}
    for _ in range(args.repeat):
        again = [
            "-m",
            "studies.quantized_init",
            args.model,
            "--part",
            args.part,
            "--threads",
            args.threads,
            "--child",
        ]
        ours.append(run(again, args.threads))
        for name in peer_methods:
            options = ["--method", name, "--bits", bits or 4, "--rank", RANK, "--steps", STEPS]
            peers[name].append(run(["-c", PEER, args.peer, args.model, *options], args.threads))
    ratios = {
        name: {
            "speed": round(median(found, "init_s") / median(ours, "init_s"), 2),
            "memory": round(median(ours, "peak_rss_mb") / median(found, "peak_rss_mb"), 3),
        }
        for name, found in peers.items()
    }
    return {"ratios": ratios, "graftline": ours, "peers": peers}


def run(command: list[Any], threads: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def median(found: list[dict[str, Any]], key: str) -> float:
    return statistics.median(entry[key] for entry in found)


def loftq(model: Path, code: str) -> dict[str, Any]:
    """LoftQ from a dense folder to a quantized one, reading and writing included."""
    plan = InitPlan(QuantizationPlan(Scheme(code, 64, double_quant=False)), "loftq", STEPS)
    with tempfile.TemporaryDirectory(dir=model.parent) as work:
        started = time.process_time()
        report = initialize(model, Path(work) / "out", plan=plan, factors=lambda _: Factors(RANK, 1.0))
        seconds = time.process_time() - started
    mean_error = statistics.mean(layer.error for layer in report.layers)
    return {"init_s": round(seconds, 2), "mean_error": round(mean_error, 5), "peak_rss_mb": peak_rss_mb()}


def pissa(model: Path) -> dict[str, Any]:
    """PiSSA on a loaded model, as peft does it."""
    loaded = load_model(model)
    spec = Adapter(method="pissa", rank=RANK, alpha=RANK, targets="all-linear")
    started = time.process_time()
    attach(loaded, spec, seed=0)
    return {"init_s": round(time.process_time() - started, 2), "peak_rss_mb": peak_rss_mb()}


def peak_rss_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def exactness(model: Path, code: str) -> dict[str, Any]:
    """Error of LoftQ and of PiSSA's low-rank part with the fast SVD, over the error with the exact one, a layer."""
    reader, arch = CheckpointReader(model), read_architecture(model)
    loftq_ratios, pissa_ratios = [], []
    for name in filter(arch.is_linear_weight, reader.names()):
        weight = reader.read(name)
        fast, exact = (loftq_error(weight, code, method) for method in ("fast", "exact"))
        loftq_ratios.append(fast / exact)
        fast, exact = (pissa_error(weight, method) for method in ("fast", "exact"))
        pissa_ratios.append(fast / exact)
    return {"layers": len(loftq_ratios), "loftq": spread(loftq_ratios), "pissa": spread(pissa_ratios)}


def loftq_error(weight: torch.Tensor, code: str, method: str) -> float:
    """The alternation as it is shipped, or with an exact SVD in the same place."""

    def exact(W_OI: torch.Tensor, rank: int, **options: Any) -> Any:
        return linalg.truncated_svd(W_OI, rank, method="exact", generator=options["generator"])

    shipped = quant_factors.truncated_svd
    quant_factors.truncated_svd = exact if method == "exact" else shipped  # type: ignore[assignment]
    try:
        scheme, generator = Scheme(code, 64, double_quant=False), torch.Generator().manual_seed(0)
        return make_pair(weight, scheme, Factors(RANK, 1.0), method="loftq", steps=STEPS, generator=generator).error
    finally:
        quant_factors.truncated_svd = shipped


def pissa_error(weight: torch.Tensor, method: str) -> float:
    generator = torch.Generator().manual_seed(0)
    U, S, V = linalg.truncated_svd(weight, RANK, method=method, generator=generator)  # type: ignore[arg-type]
    return float((weight - (U * S) @ V).norm())


def spread(ratios: list[float]) -> dict[str, float]:
    return {"largest": round(max(ratios), 5), "mean": round(statistics.mean(ratios), 5)}


if __name__ == "__main__":
    main()
