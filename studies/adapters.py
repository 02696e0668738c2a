"""What each adapter method costs, ours and PEFT's, on the demo base; and whether training with each learns the same.

    python -m studies.adapters --base MODEL_FOLDER --rows ROWS.jsonl --peer peer_train.py

layers: forward and backward of the decoder's first layers with each method's adapter on all linear layers, in one
process on shared base weights, in turns: every round times each variant once, ratios are medians over rounds.
training: `graftline.train.trainer` against ``peer_train.py`` (peft and transformers.Trainer), in turns, each in its own
process (studies/training_sides.py), with the same batches in the same order, learning rate, rank and dtype; and
against our LoRA. Each call adds a round to the file. The loss of every step is kept.
bottlenecks: time of one forward pass with and without them, over batch size and length.

Seconds are CPU seconds on one thread, so that other work on the machine counts less; tokens are without padding, the
first step is left out. Only ratios within one run mean anything.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach
from graftline.digest import write_json
from graftline.settings.model import Adapter
from graftline.weights.quant.folder import quantize_folder
from studies.training_sides import BATCH, SPECS, run_side

_TOKENS = 27
_SPECS = {name: spec for name, spec in SPECS.items() if name != "qlora"} | {
    "vera-8": Adapter(method="vera", rank=8),
    "houlsby": Adapter(method="houlsby", rank=36),  # width / 16
    "pfeiffer": Adapter(method="pfeiffer", rank=36),
    "full": Adapter(method="full"),
}
_PEERS = {
    "peft lora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "peft rslora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True),
    "peft dora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True),
    "peft vera": peft.VeraConfig(r=64, target_modules="all-linear"),
}
_FIGURES = ("losses", "held_out_loss", "peak_megabytes", "trained_parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--rows", type=Path, help="prompt and completion as JSON lines")
    parser.add_argument("--peer", type=Path, help="peer_train.py")
    parser.add_argument("--parts", nargs="+", default=["layers", "training", "bottlenecks"])
    parser.add_argument("--methods", nargs="+", default=list(SPECS), help="for the part training")
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--num-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("studies/results/adapters.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Parts can be measured on different days: each replaces only its own figures.
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"seconds": "CPU, one thread", "torch": torch.__version__}
    for part in args.parts:
        before = results.get(part, {})
        for found in _PARTS[part](args, before):
            results[part] = before | found
            write_json(args.out, results)


def _measure_layers(args: argparse.Namespace, _before: dict[str, Any]) -> Iterator[dict[str, Any]]:
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
    tokens = torch.randint(0, base.config.vocab_size, (BATCH, _TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = _in_turns({name: lambda m=model: _step(m, tokens) for name, model in models.items()}, args.rounds)
    yield {
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


def _measure_training(args: argparse.Namespace, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One more round of each method, added to the rounds that are there; all ratios are made anew."""
    results = copy.deepcopy(before)
    with tempfile.TemporaryDirectory(dir=args.base.parent) as folder:
        quantized = Path(folder) / "nf4"
        if "qlora" in args.methods:
            quantize_folder(args.base, quantized)
        for method in args.methods:
            both = _train_both(args, method, quantized)
            rounds = results.get(method, {}).get("rounds", [])
            rounds.append({side: found["tokens_per_second"] for side, found in both.items()})
            results[method] = _compare(both, rounds, results.get("lora", {}).get("rounds", rounds))
            yield results | {"num_rows": args.num_rows}


def _train_both(args: argparse.Namespace, method: str, quantized: Path) -> dict[str, dict[str, Any]]:
    options = {"rows": args.rows, "method": method, "num_rows": args.num_rows, "held_out": 64}
    ours = run_side("graftline", base=quantized if method == "qlora" else args.base, **options)
    peer = run_side("peer", base=args.base, peer=args.peer, same_batches=True, **options)
    print(method, {side: found["tokens_per_second"] for side, found in (("ours", ours), ("peer", peer))}, flush=True)
    return {"graftline": ours, "peft": peer}


def _compare(both: dict[str, dict[str, Any]], rounds: list[Any], lora_rounds: list[Any]) -> dict[str, Any]:
    """Medians over rounds, and of the ratios within a round; losses and memory of the last one."""
    ours, peer = ([speeds[side] for speeds in rounds] for side in ("graftline", "peft"))
    found = {key: {side: both[side][key] for side in both} for key in _FIGURES}
    gaps = [abs(a - b) for a, b in zip(*found["losses"].values(), strict=True)]
    lora = statistics.median(speeds["graftline"] for speeds in lora_rounds)
    return found | {
        "rounds": rounds,
        "tokens_per_second": {"graftline": statistics.median(ours), "peft": statistics.median(peer)},
        "ratio": _ratio(ours, peer),
        "step_time_to_our_lora": round(lora / statistics.median(ours), 3),
        "largest_loss_gap": round(max(gaps), 4),
    }


def _measure_bottlenecks(args: argparse.Namespace, _before: dict[str, Any]) -> Iterator[dict[str, Any]]:
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
    yield {"time_to_frozen_base": results}


@torch.no_grad()
def _infer(model: PreTrainedModel, tokens: Tensor) -> None:
    model.eval()
    model.model(tokens, use_cache=False)


_PARTS = {"layers": _measure_layers, "training": _measure_training, "bottlenecks": _measure_bottlenecks}


if __name__ == "__main__":
    main()
