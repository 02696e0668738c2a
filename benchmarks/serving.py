"""Serving: the universal graph against transformers' generate with peft, paired in one run.

    python benchmarks/serving.py /tmp/base-fp32 --threads 1

Both sides run the same adapter (rank 16 on every linear layer, random factors) in fp32 in this process, turn about;
what counts are the ratios. Also: what an unmerged adapter costs over a merged one, how long a swap takes, int4 weights.
Writes ``benchmarks/results/serving.json``.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "serving.json"
PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 32, 24, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--graphs", type=Path, help="keep exported graphs here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        report = measure(args, Path(work))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    from graftline.serving.base import Base, Runtime

    torch.set_num_threads(args.threads)
    peer = peft_model(args.model, work / "adapter")
    graphs = args.graphs or work / "graphs"
    base = Base(args.model, Runtime(graphs=graphs, num_threads=args.threads))
    adapter, _ = base.prepare_adapter(work / "adapter")
    runner = base.new_runner(adapter)
    check_same_tokens(base, runner, peer)
    report: dict[str, Any] = {"model": args.model.name, "threads": args.threads, "rank": 16, "precision": "fp32"}
    for batch in (1, args.batch):
        report[f"decode_batch_{batch}"] = paired(
            args.repeat,
            lambda batch=batch: decode(base, runner, batch),
            lambda batch=batch: peer_decode(peer, batch),
        )
    report["prefill"] = paired(args.repeat, lambda: prefill(base, runner), lambda: peer_prefill(peer))
    merged = base.new_runner(None)  # the same graph and shapes: a merged model is a base without an adapter
    sides = paired(max(args.repeat, 5), lambda: decode(base, runner, 1), lambda: decode(base, merged, 1))
    report["unmerged_over_merged"] = {
        "unmerged_tokens_per_s": sides["graftline_tokens_per_s"],
        "merged_tokens_per_s": sides["peer_tokens_per_s"],
        "overhead": round(1 / sides["ratio"] - 1, 3),
    }
    report["swap_ms"] = swap(base, adapter)
    report["adapter_mb"] = round(adapter.file.stat().st_size / 2**20, 2)
    small = Base(args.model, Runtime(graphs=graphs, num_threads=args.threads, precision="int4"))
    small_runner = small.new_runner(small.prepare_adapter(work / "adapter")[0])
    report["int4_decode_tokens_per_s"] = round(statistics.median(decode(small, small_runner, 1) for _ in range(3)), 1)
    return report


def paired(repeat: int, ours: Callable[[], float], peers: Callable[[], float]) -> dict[str, float]:
    """Tokens a second of both sides, measured turn about after one warm-up each; the ratio of the medians."""
    ours(), peers()
    runs = [(ours(), peers()) for _ in range(repeat)]
    mine, theirs = (statistics.median(side) for side in zip(*runs, strict=True))
    return {
        "graftline_tokens_per_s": round(mine, 1),
        "peer_tokens_per_s": round(theirs, 1),
        "ratio": round(mine / theirs, 2),
    }


def prompts(batch: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    return [[100 + 7 * row + token for token in range(length)] for row in range(batch)]


def decode(base: Any, runner: Any, batch: int) -> float:
    from graftline.export.onnx_session import Step

    cache = base.session.new_cache(batch, 64)
    logits = runner.step(cache, Step(prompts(batch), [PROMPT_TOKENS] * batch))
    started = time.perf_counter()
    for count in range(1, NEW_TOKENS):
        tokens = logits.argmax(-1)
        logits = runner.step(cache, Step([[int(token)] for token in tokens], [PROMPT_TOKENS + count] * batch))
    return batch * (NEW_TOKENS - 1) / (time.perf_counter() - started)


def prefill(base: Any, runner: Any) -> float:
    from graftline.export.onnx_session import Step

    cache = base.session.new_cache(1, PREFILL_TOKENS)
    started = time.perf_counter()
    runner.step(cache, Step(prompts(1, PREFILL_TOKENS), [PREFILL_TOKENS]))
    return PREFILL_TOKENS / (time.perf_counter() - started)


def peer_decode(model: Any, batch: int) -> float:
    """Tokens a second of generate, the prompt's forward pass taken out."""
    import torch

    ids = torch.tensor(prompts(batch))
    with torch.no_grad():
        started = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        reading = time.perf_counter() - started
        started = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return batch * (NEW_TOKENS - 1) / (time.perf_counter() - started - reading)


def peer_prefill(model: Any) -> float:
    import torch

    ids = torch.tensor(prompts(1, PREFILL_TOKENS))
    with torch.no_grad():
        started = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return PREFILL_TOKENS / (time.perf_counter() - started)


def swap(base: Any, adapter: Any) -> dict[str, float]:
    """From "this adapter now" to its tensors bound: read from its file, and found in the cache."""
    from graftline.serving.adapter_cache import AdapterCache

    cold, warm = [], []
    for _ in range(10):
        cache = AdapterCache(base.session, max_adapters=1)
        for times in (cold, warm):
            started = time.perf_counter()
            with cache.use(adapter):
                times.append(1e3 * (time.perf_counter() - started))
    return {"from_file": round(statistics.median(cold), 2), "in_cache": round(statistics.median(warm), 3)}


def peft_model(model: Path, folder: Path) -> Any:
    """A model of peft's with a random rank-16 adapter, saved to ``folder`` as well."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peer = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter))
    peer.save_pretrained(folder)
    return peer


def check_same_tokens(base: Any, runner: Any, peer: Any) -> None:
    """A benchmark of two programs that compute different things would be worth nothing."""
    import torch

    from graftline.export.onnx_session import Step

    ids = prompts(1)
    found = runner.step(base.session.new_cache(1, 64), Step(ids, [PROMPT_TOKENS], every_position=True))[0]
    with torch.no_grad():
        expected = peer(input_ids=torch.tensor(ids)).logits[0].numpy()
    difference = float(abs(found - expected).max())
    assert difference < 5e-3, f"the two sides differ by {difference} in a logit"


if __name__ == "__main__":
    main()
