"""Training speed against peft + transformers.Trainer, both in one run on one machine, in turns, at equal settings.

    python -m benchmarks.training --base MODEL_FOLDER --rows ROWS.jsonl --peer peer_train.py

Each side runs in its own process, on one thread, with the same rows, learning rate and number of steps. Seconds are CPU
seconds of that process, so that other work on the machine does not count; tokens are input tokens without padding; the
first step is left out. Both adapters are then scored by one function on the same held-out rows. ``limit`` is what the
machine gives to the linear layers' matrix products alone (forward, and backward to the input, of the decoder's body on
packed tokens): no training of this model can be faster.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.attach import attach
from graftline.adapters.spec import AdapterSpec
from graftline.data.template import Encoded
from graftline.digest import write_json
from graftline.train.batches import pad_rows
from graftline.train.settings import StepMetrics, TrainSettings
from graftline.train.trainer import train

_BATCH, _HELD_OUT, _LEARNING_RATE = 16, 128, 5e-4
_SPECS = {
    "lora": AdapterSpec(method="lora", rank=8, alpha=16),
    "rslora": AdapterSpec(method="rslora", rank=8, alpha=16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--peer", required=True, type=Path, help="peer_train.py")
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=sorted(_SPECS))
    parser.add_argument("--num-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--side", choices=["peer", "graftline", "limit"], help="run one side and print its figures")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(_SIDES[args.side](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = _write_row_files(args, Path(folder))
        results = [_compare(args, name, file, method) for name, file in files.items() for method in args.methods]
    write_json(args.out, {"seconds": "CPU, one thread", "torch": torch.__version__, "results": results})


def _write_row_files(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The demo's rows; and rows of one length, nearly all supervised: no padding and no head to save on."""
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    full = []
    for row in rows:
        head, _, tail = row["prompt"].partition(":")
        whole = {"prompt": head + ":", "completion": tail + row["completion"]}
        if len(_encode(tokenizer, whole).input_ids) == 28:
            full.append(whole)
    files = {"demo": rows, "full": full}
    for name, content in files.items():
        wanted = content[: args.num_rows + _HELD_OUT]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wanted))
    return {name: folder / f"{name}.jsonl" for name in files}


def _compare(args: argparse.Namespace, rows_name: str, rows: Path, method: str) -> dict[str, Any]:
    sides: dict[str, list[dict[str, Any]]] = {"peer": [], "graftline": [], "limit": []}
    for turn in range(args.rounds):
        for side, found in sides.items():
            found.append(_run_side(args, side, rows, method))
            print(rows_name, method, turn, side, found[-1], flush=True)
    ratios = [
        ours["tokens_per_second"] / peer["tokens_per_second"]
        for ours, peer in zip(sides["graftline"], sides["peer"], strict=True)
    ]
    rate = {side: statistics.median(run["tokens_per_second"] for run in found) for side, found in sides.items()}
    return {
        "rows": rows_name,
        "method": method,
        "num_rows": args.num_rows,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "tokens_per_second": {side: round(value, 1) for side, value in rate.items()},
        "share_of_limit": round(rate["graftline"] / rate["limit"], 3),
        "held_out_loss": {side: sides[side][-1]["held_out_loss"] for side in ("peer", "graftline")},
        "peak_megabytes": {side: sides[side][-1]["peak_megabytes"] for side in ("peer", "graftline")},
    }


def _run_side(args: argparse.Namespace, side: str, rows: Path, method: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.training", "--side", side, "--base", str(args.base)]
    command += ["--rows", str(rows), "--peer", str(args.peer), "--methods", method, "--num-rows", str(args.num_rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _graftline_side(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows = _read_rows(args.rows, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    attach(model, _SPECS[args.methods[0]], seed=0)
    settings = TrainSettings(
        epochs=1,
        batch_size=_BATCH,
        learning_rate=_LEARNING_RATE,
        checkpoint_every=0,
        threads=1,
        device="cpu",
    )
    ends: list[tuple[float, int]] = []

    def on_step(metrics: StepMetrics) -> None:
        ends.append((time.process_time(), metrics.tokens))

    with tempfile.TemporaryDirectory() as work:
        result = train(model, rows[: args.num_rows], settings=settings, work=Path(work), on_step=on_step)
    tokens = sum(tokens for _, tokens in ends[1:])
    return {
        "tokens_per_second": tokens / (ends[-1][0] - ends[0][0]),
        "held_out_loss": _held_out_loss(model, rows[args.num_rows :]),
        "peak_megabytes": result.peak_bytes >> 20,
    }


def _peer_side(args: argparse.Namespace) -> dict[str, Any]:
    spec = util.spec_from_file_location("peer_train", args.peer)
    assert spec is not None
    assert spec.loader is not None
    peer = util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    models: list[PreTrainedModel] = []

    class Capturing(peer.Trainer):  # type: ignore[misc,name-defined]
        """Keeps the trained model, which peer_train.py throws away."""

        def train(self, *given: Any, **named: Any) -> Any:
            models.append(self.model)
            return super().train(*given, **named)

    peer.Trainer = Capturing
    peer.time = SimpleNamespace(perf_counter=time.process_time)
    peer.os = SimpleNamespace(sched_getaffinity=lambda _: {0})
    sys.argv = ["peer_train.py", str(args.base), str(args.rows), "--method", args.methods[0]]
    sys.argv += ["--rows", str(args.num_rows), "--lr", str(_LEARNING_RATE)]
    with tempfile.TemporaryFile("w+") as said:
        stdout, sys.stdout = sys.stdout, said
        try:
            peer.main()
        finally:
            sys.stdout = stdout
        said.seek(0)
        figures = json.loads(said.read().splitlines()[-1])
    rows = _read_rows(args.rows, AutoTokenizer.from_pretrained(args.base))
    return {
        "tokens_per_second": figures["tokens_per_s"],
        "held_out_loss": _held_out_loss(models[0], rows[args.num_rows :]),
        "peak_megabytes": figures["peak_rss_mb"],
    }


def _limit_side(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = _read_rows(args.rows, AutoTokenizer.from_pretrained(args.base))[: args.num_rows]
    tokens = round(sum(len(row.input_ids) for row in rows) / len(rows) * _BATCH)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.base))
    body = model.base_model
    layers = [torch.empty(m.weight.shape).uniform_(-0.1, 0.1) for m in body.modules() if isinstance(m, nn.Linear)]
    inputs = {size: torch.rand(tokens, size) for weight in layers for size in weight.shape}
    seconds = []
    for _ in range(4):
        started = time.process_time()
        for weight in layers:
            inputs[weight.shape[1]] @ weight.T
            inputs[weight.shape[0]] @ weight
        seconds.append(time.process_time() - started)
    return {"tokens_per_second": tokens / statistics.median(seconds[1:])}


_SIDES = {"graftline": _graftline_side, "peer": _peer_side, "limit": _limit_side}


def _read_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return [_encode(tokenizer, json.loads(line)) for line in path.read_text().splitlines()]


def _encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Encoded:
    """As peer_train.py encodes it: no template, no end token."""
    prompt = list(tokenizer(row["prompt"]).input_ids)
    completion = list(tokenizer(row["completion"], add_special_tokens=False).input_ids)
    return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood per completion token, by transformers' own forward."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), _BATCH):
        batch = pad_rows(rows[start : start + _BATCH])
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["predict_at"]]
        total += float(F.cross_entropy(logits, batch["targets"], reduction="sum"))
        count += len(batch["targets"])
    return round(total / count, 4)


if __name__ == "__main__":
    main()
