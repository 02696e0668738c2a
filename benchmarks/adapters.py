"""What each adapter method costs, ours and PEFT's, on the demo base; and whether training with each learns the same.

    python -m benchmarks.adapters --base MODEL_FOLDER --rows ROWS.jsonl --peer peer_train.py

layers: forward and backward of the decoder's first layers with each method's adapter on all linear layers, in one
process on shared base weights, in turns: every round times each variant once, ratios are medians over rounds.
training: `graftline.train.trainer` against ``peer_train.py`` (peft and transformers.Trainer), in turns, each in its own
process, with the same rows, batches of 16, learning rate, rank and dtype. The losses of the steps are kept.
bottlenecks: time of one forward pass with and without them, over batch size and length.

Seconds are CPU seconds on one thread, so that other work on the machine counts less; tokens are without padding, the
first step is left out. Only ratios within one run mean anything.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from graftline.adapters.attach import attach
from graftline.adapters.spec import AdapterSpec
from graftline.data.template import Encoded
from graftline.digest import write_json
from graftline.quant.load import load_model
from graftline.train.settings import StepMetrics, TrainSettings
from graftline.train.trainer import train

_BATCH, _TOKENS, _LEARNING_RATE = 16, 27, 5e-4
_SPECS = {
    "lora": AdapterSpec(method="lora"),
    "rslora": AdapterSpec(method="rslora"),
    "dora": AdapterSpec(method="dora"),
    "pissa": AdapterSpec(method="pissa"),
    "vera": AdapterSpec(method="vera", rank=64),  # as in peer_train.py
    "vera-8": AdapterSpec(method="vera", rank=8),
    "houlsby": AdapterSpec(method="houlsby", rank=36),  # width / 16
    "pfeiffer": AdapterSpec(method="pfeiffer", rank=36),
    "full": AdapterSpec(method="full"),
}
_PEERS = {
    "peft lora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "peft rslora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True),
    "peft dora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True),
    "peft vera": peft.VeraConfig(r=64, target_modules="all-linear"),
}
_TRAINED = ("lora", "rslora", "dora", "vera", "pissa", "qlora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--quantized", type=Path, help="the same base in NF4, for qlora")
    parser.add_argument("--rows", type=Path, help="prompt and completion as JSON lines")
    parser.add_argument("--peer", type=Path, help="peer_train.py")
    parser.add_argument("--parts", nargs="+", default=["layers", "training", "bottlenecks"])
    parser.add_argument("--methods", nargs="+", default=_TRAINED, help="for the part training")
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--num-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters.json"))
    parser.add_argument("--side", help="train with one method here and print its figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.side:
        print(json.dumps(_train_here(args, args.side)))
        return
    # Parts can be measured on different days: each replaces only its own figures.
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"seconds": "CPU, one thread", "torch": torch.__version__}
    for part in args.parts:
        results[part] = results.get(part, {}) | _PARTS[part](args)
        write_json(args.out, results)


def _measure_layers(args: argparse.Namespace) -> dict[str, Any]:
    base = _first_layers(args.base, args.num_layers)
    models: dict[str, nn.Module] = {"frozen base": _frozen(_sharing_weights(base))}
    for name, spec in _SPECS.items():
        models[name] = _sharing_weights(base)
        if spec.method == "full":
            models[name] = copy.deepcopy(base)
        attach(models[name], spec, seed=0)
    models |= {
        name: peft.get_peft_model(_sharing_weights(base), config).base_model.model for name, config in _PEERS.items()
    }
    tokens = torch.randint(0, base.config.vocab_size, (_BATCH, _TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = _in_turns({name: lambda m=model: _step(m, tokens) for name, model in models.items()}, args.rounds)
    return {
        "num_layers": args.num_layers,
        "num_tokens": tokens.numel(),
        "rounds": args.rounds,
        "milliseconds": {name: round(1000 * statistics.median(times), 1) for name, times in seconds.items()},
        "to_our_lora": {name: _ratio(times, seconds["lora"]) for name, times in seconds.items()},
        "peft_to_ours": {
            name.removeprefix("peft "): _ratio(seconds[name], seconds[name.removeprefix("peft ")]) for name in _PEERS
        },
    }


def _first_layers(folder: Path, num_layers: int) -> PreTrainedModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.model.layers = base.model.layers[:num_layers]
    return base


def _sharing_weights(base: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    """No adapter, but gradients flow to the embeddings' output, as they do where an adapter sits in the first layer."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def _step(model: nn.Module, tokens: Tensor) -> None:
    model.train()
    model.model(tokens).last_hidden_state.square().mean().backward()
    model.zero_grad(set_to_none=True)


def _in_turns(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round; one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            started = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def _ratio(times: list[float], others: list[float]) -> float:
    """Median over rounds of one variant's time to another's in the same round."""
    return round(statistics.median(a / b for a, b in zip(times, others, strict=True)), 3)


def _measure_training(args: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for method in args.methods:
        ours = _run([sys.executable, "-m", "benchmarks.adapters", *_options(args), "--side", method])
        peer = _run([sys.executable, "-c", _PEER_WITH_CPU_CLOCK, str(args.peer), *_peer_options(args, method)])
        results[method] = {
            "tokens_per_second": {"graftline": ours["tokens_per_s"], "peft": peer["tokens_per_s"]},
            "ratio": round(ours["tokens_per_s"] / peer["tokens_per_s"], 3),
            "loss": {side: [r["loss_first"], r["loss_last"]] for side, r in (("graftline", ours), ("peft", peer))},
            "peak_megabytes": {"graftline": ours["peak_rss_mb"], "peft": peer["peak_rss_mb"]},
            "trained_parameters": {"graftline": ours["trainable"], "peft": peer["trainable"]},
        }
        print(method, results[method], flush=True)
    lora = results.get("lora")
    if lora:
        for found in results.values():
            rate = found["tokens_per_second"]["graftline"]
            found["time_to_our_lora"] = round(lora["tokens_per_second"]["graftline"] / rate, 3)
    return {"num_rows": args.num_rows, "methods": results}


_PEER_WITH_CPU_CLOCK = (
    "import os, runpy, sys, time; time.perf_counter = time.process_time; os.sched_getaffinity = lambda pid: {0}; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def _options(args: argparse.Namespace) -> list[str]:
    options = ["--base", str(args.base), "--rows", str(args.rows), "--num-rows", str(args.num_rows)]
    return options + (["--quantized", str(args.quantized)] if args.quantized else [])


def _peer_options(args: argparse.Namespace, method: str) -> list[str]:
    options = [str(args.base), str(args.rows), "--method", method, "--rows", str(args.num_rows)]
    return [*options, "--lr", str(_LEARNING_RATE)]


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def _train_here(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """The figures that peer_train.py prints, for our trainer."""
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    lines = args.rows.read_text().splitlines()[: args.num_rows]
    rows = [_encode(tokenizer, json.loads(line)) for line in lines]
    model = load_model(args.quantized if method == "qlora" else args.base)
    coverage = attach(model, _SPECS["lora" if method == "qlora" else method], seed=0)
    settings = TrainSettings(
        epochs=1, batch_size=_BATCH, learning_rate=_LEARNING_RATE, checkpoint_every=0, threads=1, device="cpu"
    )
    ends: list[tuple[float, int]] = []

    def on_step(metrics: StepMetrics) -> None:
        ends.append((time.process_time(), metrics.tokens))

    with tempfile.TemporaryDirectory() as work:
        result = train(model, rows, settings=settings, work=Path(work), on_step=on_step)
    return {
        "tokens_per_s": round(sum(tokens for _, tokens in ends[1:]) / (ends[-1][0] - ends[0][0]), 1),
        "loss_first": round(result.losses[0], 4),
        "loss_last": round(result.losses[-1], 4),
        "peak_rss_mb": result.peak_bytes >> 20,
        "trainable": coverage.num_trained,
    }


def _encode(tokenizer: Any, row: dict[str, str]) -> Encoded:
    """As peer_train.py encodes it: no template, no end token."""
    prompt = list(tokenizer(row["prompt"]).input_ids)
    completion = list(tokenizer(row["completion"], add_special_tokens=False).input_ids)
    return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _measure_bottlenecks(args: argparse.Namespace) -> dict[str, Any]:
    base = _first_layers(args.base, args.num_layers)
    models: dict[str, PreTrainedModel] = {"frozen base": base}
    for name in ("houlsby", "pfeiffer"):
        models[name] = _sharing_weights(base)
        attach(models[name], _SPECS[name], seed=0)
    results = {}
    for batch, length in ((1, 1), (1, 32), (1, 128), (8, 32), (16, 128)):
        tokens = torch.zeros(batch, length, dtype=torch.long)
        variants = {name: lambda m=model, t=tokens: _infer(m, t) for name, model in models.items()}
        seconds = _in_turns(variants, args.rounds)
        results[f"batch {batch}, length {length}"] = {
            name: _ratio(seconds[name], seconds["frozen base"]) for name in ("houlsby", "pfeiffer")
        }
    return {"time_to_frozen_base": results}


@torch.no_grad()
def _infer(model: PreTrainedModel, tokens: Tensor) -> None:
    model.eval()
    model.model(tokens, use_cache=False)


_PARTS = {"layers": _measure_layers, "training": _measure_training, "bottlenecks": _measure_bottlenecks}


if __name__ == "__main__":
    main()
