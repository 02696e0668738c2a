"""One training in its own process, ours or the peer's, with the figures that both can be compared by.

    python -m studies.training_sides graftline --base MODEL_FOLDER --rows ROWS.jsonl --method lora --num-rows 128
    python -m studies.training_sides peer --peer peer_train.py --base … --rows … --method lora --num-rows 128

Both take the first ``--num-rows`` rows in batches of 16 for one epoch at one constant learning rate, on one thread; the
rows behind them are held out. Seconds are CPU seconds of the process, so that other work on the machine does not count;
tokens are input tokens without padding; the first step is left out of the rate. With ``--same-batches`` the peer takes
our trainer's batches in our order, so that the losses of the steps can be compared one by one.
"""

import argparse
import json
import resource
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
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.attach import attach
from graftline.data.template import Encoded
from graftline.settings.model import Adapter, Train
from graftline.train.batches import pad_rows, plan_steps
from graftline.train.results import StepMetrics
from graftline.train.trainer import train
from graftline.weights.quant.load import load_model

BATCH, HELD_OUT, LEARNING_RATE = 16, 128, 5e-4
SPECS = {
    "lora": Adapter(method="lora", rank=8, alpha=16),
    "rslora": Adapter(method="rslora", rank=8, alpha=16),
    "dora": Adapter(method="dora", rank=8, alpha=16),
    "pissa": Adapter(method="pissa", rank=8, alpha=16),
    "vera": Adapter(method="vera", rank=64),  # as peer_train.py says
    "qlora": Adapter(method="lora", rank=8, alpha=16),  # the base is what is quantized
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["graftline", "peer"])
    parser.add_argument("--base", required=True, type=Path, help="for qlora: ours in NF4, the peer's dense")
    parser.add_argument("--rows", required=True, type=Path, help="prompt and completion as JSON lines")
    parser.add_argument("--peer", type=Path, help="peer_train.py")
    parser.add_argument("--method", default="lora", choices=sorted(SPECS))
    parser.add_argument("--num-rows", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--same-batches", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(_train_here(args) if args.side == "graftline" else _train_peer(args)))


def run_side(side: str, **options: object) -> dict[str, Any]:
    """The figures of one training, in a process of its own; ``options`` are the command line's."""
    command = [sys.executable, "-m", "studies.training_sides", side]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """As peer_train.py encodes them: no template, no end token."""
    return [encode(tokenizer, json.loads(line)) for line in path.read_text().splitlines()]


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Encoded:
    prompt = list(tokenizer(row["prompt"]).input_ids)
    completion = list(tokenizer(row["completion"], add_special_tokens=False).input_ids)
    return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _train_here(args: argparse.Namespace) -> dict[str, Any]:
    rows = read_rows(args.rows, AutoTokenizer.from_pretrained(args.base))
    model = load_model(args.base, dtype=torch.float32)
    coverage = attach(model, SPECS[args.method], seed=0)
    settings = Train(
        epochs=1,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        scheduler="constant",
        checkpoint_every=0,
        threads=1,
        device="cpu",
    )
    ends: list[tuple[float, int]] = []

    def on_step(metrics: StepMetrics) -> None:
        ends.append((time.process_time(), metrics.tokens))

    with tempfile.TemporaryDirectory() as work:
        result = train(model, rows[: args.num_rows], settings=settings, work=Path(work), on_step=on_step)
    peak = _peak_megabytes()
    rate = sum(tokens for _, tokens in ends[1:]) / (ends[-1][0] - ends[0][0])
    return {
        "tokens_per_second": round(rate, 1),
        "losses": [round(loss, 4) for loss in result.losses],
        "held_out_loss": _held_out_loss(model, rows[args.num_rows : args.num_rows + args.held_out]),
        "peak_megabytes": peak,
        "trained_parameters": coverage.num_trained,
    }


def _train_peer(args: argparse.Namespace) -> dict[str, Any]:
    peer = _load_peer(args.peer)
    rows = read_rows(args.rows, AutoTokenizer.from_pretrained(args.base))
    trained = rows[: args.num_rows]
    trainers: list[Any] = []

    class Kept(peer.Trainer):  # type: ignore[misc,name-defined]
        """Keeps itself, which peer_train.py throws away; takes the rows in the order of the file."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            trainers.append(self)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            if args.same_batches:
                return SequentialSampler(self.train_dataset)
            return super()._get_train_sampler(dataset)

    peer.Trainer = Kept
    # Its clock counts CPU seconds, its threads are one.
    peer.time = SimpleNamespace(perf_counter=time.process_time)
    peer.os = SimpleNamespace(sched_getaffinity=lambda _: {0})
    lengths = [len(row.input_ids) for row in trained]
    steps = plan_steps(lengths, num_steps=len(trained) // BATCH, rows_per_step=BATCH, seed=0)
    with tempfile.TemporaryDirectory() as work:
        lines = args.rows.read_text().splitlines()[: args.num_rows]
        if args.same_batches:
            lines = [lines[at] for step in steps for at in step]
        (Path(work) / "rows.jsonl").write_text("\n".join(lines) + "\n")
        sys.argv = ["peer_train.py", str(args.base), f"{work}/rows.jsonl", "--method", args.method]
        sys.argv += ["--rows", str(args.num_rows), "--lr", str(LEARNING_RATE)]
        figures = _printed_figures(peer.main)
    losses = [entry["loss"] for entry in trainers[0].state.log_history if "loss" in entry]
    rate = figures["tokens_per_s"]
    if args.same_batches:
        # peer_train.py takes every step for an average one, but the first, which its clock leaves out, is the longest.
        tokens = [sum(len(trained[at].input_ids) for at in step) for step in steps]
        rate *= sum(tokens[1:]) / (sum(tokens) * (len(tokens) - 1) / len(tokens))
    return {
        "tokens_per_second": round(rate, 1),
        "losses": [round(float(loss), 4) for loss in losses],
        "held_out_loss": _held_out_loss(trainers[0].model, rows[args.num_rows : args.num_rows + args.held_out]),
        "peak_megabytes": figures["peak_rss_mb"],
        "trained_parameters": figures["trainable"],
    }


def _load_peer(path: Path) -> Any:
    spec = util.spec_from_file_location("peer_train", path)
    assert spec is not None
    assert spec.loader is not None
    peer = util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    return peer


def _printed_figures(run: Any) -> dict[str, Any]:
    """What ``run`` prints as JSON on its last line."""
    with tempfile.TemporaryFile("w+") as said:
        stdout, sys.stdout = sys.stdout, said
        try:
            run()
        finally:
            sys.stdout = stdout
        said.seek(0)
        found: dict[str, Any] = json.loads(said.read().splitlines()[-1])
    return found


def _peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood per completion token, by transformers' own forward."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = pad_rows(rows[start : start + BATCH])
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["predict_at"]]
        total += float(F.cross_entropy(logits, batch["targets"], reduction="sum"))
        count += len(batch["targets"])
    return round(total / count, 4)


if __name__ == "__main__":
    main()
