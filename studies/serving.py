"""Serving speed and rightness: the universal graph against transformers, what adapters, merging and NF4 cost, parity.

decode       tokens a second at batch 1, 4 and 16 over transformers' generate with peft, reading the prompt taken out
prefill      tokens a second of a prompt of 128 and of 512 tokens over transformers' forward pass
swap         from "this adapter now" to its tensors bound, from its file and from the cache
bottleneck   a step with a serial bottleneck (Houlsby) and with LoRA over the base alone, by batch and tokens
quantized    one token of an NF4 base over one of its dense original: on the graph in fp32 and in int4, in transformers
whole        base, merged and unmerged in CPU seconds. Two sessions of one graph differ for as long as they live, so a
             pair of fresh sessions is the unit; "a merged model takes the base's time" is tested by two one-sided tests
             of the log ratio against ± 2 % (alpha 0.05)
four_blocks  the same for the first four blocks and the head, whose sessions are made quickly: many pairs
parity       greedy tokens and logits of every method on one graph, of merged models and of quantized bases, against
             transformers with our layers: tokens must be equal, logits within 1e-3

Rank 16 on every linear layer, fp32, random order of sides; what counts are the ratios of a round.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from scipy.stats import t
from transformers import AutoModelForCausalLM

from graftline.adapters.peft_format import load_adapter
from graftline.errors import EvaluationError
from graftline.evaluate.statistics.error_rates import equivalence_p_value
from graftline.export.onnx_session import Runner, Step
from graftline.merge.fold import merge_folder
from graftline.serve import smoke
from graftline.serve.catalog import Catalog
from graftline.serve.generation import SampledToken, Sampler, SamplingParams, choose_tokens
from graftline.serve.served_base import AdapterCache, Base, Runtime
from graftline.settings.model import MethodName, Quantize
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import initialize
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.low_rank import FactorSettings
from studies.harness import Json, Setting, rate, ratio, turns
from studies.models import first_blocks, make_adapter

RANK = 16
MARGIN, TURNS = 0.02, 5
METHODS: tuple[MethodName, ...] = ("lora", "rslora", "pissa", "vera", "dora", "houlsby", "pfeiffer")
PAIRED: dict[str, MethodName] = {"loftq": "loftq", "qpissa": "pissa"}
"""Method of the quantized start, and of the adapter that begins there."""
NUM_TOKENS, MAX_DIFFERENCE = 24, 1e-3
TEXTS = (
    "Definition: a tall perennial woody plant having a main trunk\nCategory:",
    "The capital of France is",
    "Water boils at one hundred degrees at sea level, because",
    "def fibonacci(n):\n",
)
Clock = Callable[[], float]


# --- steps -------------------------------------------------------------------------------------------------------


def prompts(num_rows: int, length: int) -> list[list[int]]:
    """Prompts that differ from row to row."""
    return [[100 + (7 * row + token) % 400 for token in range(length)] for row in range(num_rows)]


def decode_seconds(
    base: Base, runner: Runner, num_rows: int, num_tokens: int, *, length: int = 32, clock: Clock = time.perf_counter
) -> float:
    """Seconds for ``num_tokens`` greedy tokens of every row, the prompts read before."""
    cache = base.session.new_cache(num_rows, length + num_tokens + 1)
    samplers = [Sampler(SamplingParams(temperature=0)) for _ in range(num_rows)]

    def next_tokens(step: Step) -> list[list[int]]:
        with torch.cuda.stream(cache.stream):
            chosen = choose_tokens(samplers, runner.step_on_device(cache, step))
        return [[choice.token] for choice in chosen if isinstance(choice, SampledToken)]

    tokens = next_tokens(Step(prompts(num_rows, length), [length] * num_rows))
    started = clock()
    for count in range(1, num_tokens + 1):
        tokens = next_tokens(Step(tokens, [length + count] * num_rows))
    return clock() - started


def prefill_seconds(
    base: Base, runner: Runner, num_rows: int, length: int, *, clock: Clock = time.perf_counter
) -> float:
    """Seconds to read prompts."""
    cache = base.session.new_cache(num_rows, length)
    step = Step(prompts(num_rows, length), [length] * num_rows)
    started = clock()
    runner.step(cache, step)
    return clock() - started


@torch.no_grad()
def generate_seconds(model: Any, num_rows: int, num_tokens: int) -> float:
    """Seconds of transformers' ``generate`` for ``num_tokens`` tokens of every row after the first ones.

    A run that ends at the first token is taken out: what is left is decoding, as in `decode_seconds`.
    """
    ids = torch.tensor(prompts(num_rows, 32), device=model.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    seconds = []
    for count in (1, num_tokens + 1):
        started = time.perf_counter()
        model.generate(input_ids=ids, max_new_tokens=count, min_new_tokens=count, **options)
        seconds.append(time.perf_counter() - started)
    return max(1e-6, seconds[1] - seconds[0])


@torch.no_grad()
def forward_seconds(model: Any, length: int) -> float:
    """Seconds of transformers to read a prompt, with logits of the last token only."""
    ids = torch.tensor(prompts(1, length), device=model.device)
    started = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.cpu()  # waits for the device
    return time.perf_counter() - started


# --- against transformers ----------------------------------------------------------------------------------------


class Sides:
    """A base, and runners of its graph with adapters, which are made where they are not there yet."""

    def __init__(self, setting: Setting, model: Path | None = None, precision: Any = "fp32") -> None:
        self.model, self.work = model or setting.base(), setting.work
        graphs = setting.folder("graphs")
        self.base = Base(self.model, Runtime(graphs=graphs, num_threads=setting.threads, precision=precision))

    def folder(self, method: MethodName, name: str = "") -> Path:
        """The adapter's folder."""
        folder = self.work / (name or method)
        return folder if folder.exists() else make_adapter(self.model, folder, method, rank=RANK)

    def runner(self, method: MethodName | None, name: str = "") -> Runner:
        """Steps with an adapter, or of the base alone."""
        return self.base.new_runner(self.base.prepare_adapter(self.folder(method, name))[0] if method else None)

    def peer(self) -> Any:
        """Transformers with peft, after it was seen to compute the same."""
        plain = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        peer = PeftModel.from_pretrained(plain, self.folder("lora")).eval()
        ids = prompts(1, 32)
        found = self.runner("lora").step(self.base.session.new_cache(1, 32), Step(ids, [32], every_position=True))[0]
        with torch.no_grad():
            difference = float(np.abs(found - peer(input_ids=torch.tensor(ids)).logits[0].numpy()).max())
        assert difference < 5e-3, f"the two sides differ by {difference} in a logit: their times say nothing"
        return peer


def decode(setting: Setting) -> Json:
    """Against generate."""
    sides = Sides(setting)
    ours, peer, found = sides.runner("lora"), sides.peer(), {}
    for rows, count in setting.size({1: 16, 4: 12, 16: 8}, {1: 2}).items():
        timed = {
            "ours": partial(decode_seconds, sides.base, ours, rows, count),
            "peer": partial(generate_seconds, peer, rows, count),
        }
        found[f"batch_{rows}"] = _compared(turns(timed, setting.turns(5), seed=setting.seed), rows * count)
    return found


def prefill(setting: Setting) -> Json:
    """Against transformers' forward pass."""
    sides = Sides(setting)
    ours, peer, found = sides.runner("lora"), sides.peer(), {}
    for length in setting.size((128, 512), (16,)):
        timed = {
            "ours": partial(prefill_seconds, sides.base, ours, 1, length),
            "peer": partial(forward_seconds, peer, length),
        }
        found[f"prompt_{length}"] = _compared(turns(timed, setting.turns(5), seed=setting.seed), length)
    return found


def _compared(seconds: dict[str, list[float]], num_tokens: int) -> Json:
    return {
        "graftline_tokens_per_s": rate(num_tokens, seconds["ours"]),
        "peer_tokens_per_s": rate(num_tokens, seconds["peer"]),
        "ratio": ratio(seconds["peer"], seconds["ours"]),
    }


def swap(setting: Setting) -> Json:
    """Milliseconds of both ways."""
    sides = Sides(setting)
    adapter, _ = sides.base.prepare_adapter(sides.folder("lora"))
    times: dict[str, list[float]] = {"from_file": [], "in_cache": []}
    for _ in range(4 * setting.turns(5)):
        cache = AdapterCache(sides.base.session, key=sides.base.key, max_adapters=1)
        for samples in times.values():
            started = time.perf_counter()
            with cache.use(adapter):
                samples.append(1e3 * (time.perf_counter() - started))
    quantiles = {name: np.quantile(samples, [0.5, 0.95]).round(3).tolist() for name, samples in times.items()}
    return {
        "adapter_mb": round(adapter.file.stat().st_size / 2**20, 2),
        **{f"{name}_ms": {"p50": p50, "p95": p95} for name, (p50, p95) in quantiles.items()},
    }


# --- what things cost --------------------------------------------------------------------------------------------


def bottleneck(setting: Setting) -> Json:
    """Latency of one step: one token behind a prompt of 32, or a whole new prompt."""
    sides, found = Sides(setting), {}
    kinds: dict[str, MethodName | None] = {"base": None, "lora": "lora", "houlsby": "houlsby"}
    runners = {name: sides.runner(method) for name, method in kinds.items()}
    for rows in setting.size((1, 4, 16), (1,)):
        for length in setting.size((1, 16, 64), (1, 16)):
            step = partial(prefill_seconds, sides.base) if length > 1 else partial(decode_seconds, sides.base)
            tokens = length if length > 1 else 4
            timed = {name: partial(step, runner, rows, tokens) for name, runner in runners.items()}
            seconds = turns(timed, setting.turns(5), seed=setting.seed)
            found[f"batch_{rows}_tokens_{length}"] = {
                "base_ms": round(1e3 * statistics.median(seconds["base"]) / (1 if length > 1 else 4), 1),
                "houlsby_over_base": ratio(seconds["houlsby"], seconds["base"]),
                "lora_over_base": ratio(seconds["lora"], seconds["base"]),
            }
    return found


def quantized(setting: Setting) -> Json:
    """Tokens a second, each side with an adapter."""
    dense, nf4 = setting.base(), setting.work / "nf4"
    if not nf4.exists():
        initialize(dense, nf4, quantize=Quantize(method="nf4"), seed=0)
    timed: dict[str, Callable[[], float]] = {}
    for name, precision, model in (
        ("graph_dense", "fp32", dense),
        ("graph_nf4_in_fp32", "fp32", nf4),
        ("graph_int4", "int4", dense),
    ):
        sides = Sides(setting, model, precision)
        timed[name] = partial(decode_seconds, sides.base, sides.runner("lora", f"lora-{model.name}"), 1, 4)
    for name, model in (("dense", dense), ("nf4", nf4)):
        peer = load_model(model)
        load_adapter(peer, setting.work / f"lora-{model.name}", base=read_identity(model))
        timed[f"transformers_{name}"] = partial(generate_seconds, peer, 1, 4)
    seconds = turns(timed, setting.turns(5), seed=setting.seed)
    return {
        "tokens_per_s": {name: rate(4, samples) for name, samples in seconds.items()},
        "graph_nf4_in_fp32_over_dense": ratio(seconds["graph_nf4_in_fp32"], seconds["graph_dense"]),
        "graph_int4_over_dense": ratio(seconds["graph_int4"], seconds["graph_dense"]),
        "transformers_nf4_over_dense": ratio(seconds["transformers_nf4"], seconds["transformers_dense"]),
    }


def pairs(setting: Setting, *, num_blocks: int | None, num_pairs: int) -> Json:
    """Base, merged and unmerged in fresh sessions, pair by pair."""
    model, merged = setting.base(), setting.work / "merged"
    if num_blocks:
        model = first_blocks(model, setting.work / "base", setting.size(num_blocks, 1))
    found = []
    for seed in range(setting.turns(num_pairs)):
        sides = {"base": Sides(setting, model)}
        if not merged.exists():
            merge_folder(model, sides["base"].folder("lora"), merged, dtype=torch.float32)
        sides["merged"] = Sides(setting, merged)
        order = list(sides)[:: 1 if seed % 2 else -1]
        runners = {name: (sides[name].base, sides[name].runner(None)) for name in order}
        runners["unmerged"] = (sides["base"].base, sides["base"].runner("lora"))
        found.append({kind: _smallest(runners, work, seed) for kind, work in KINDS.items()})
    return {"pairs": found, **{kind: _costs(found, kind) for kind in KINDS}}


KINDS: dict[str, Callable[[Base, Runner], float]] = {
    "decode_batch_1": lambda base, runner: decode_seconds(base, runner, 1, 8, length=8, clock=time.process_time),
    "decode_batch_8": lambda base, runner: decode_seconds(base, runner, 8, 4, length=8, clock=time.process_time),
    "prefill_128": lambda base, runner: prefill_seconds(base, runner, 1, 128, clock=time.process_time),
}


def _smallest(runners: dict[str, tuple[Base, Runner]], work: Callable[..., float], seed: int) -> dict[str, float]:
    """CPU seconds of each side, the smallest of its turns: what else the machine does only adds."""
    seconds = turns({side: partial(work, *it) for side, it in runners.items()}, TURNS, seed=seed)
    return {side: round(min(samples), 6) for side, samples in seconds.items()}


def _costs(found: list[dict[str, dict[str, float]]], kind: str) -> Json:
    """Ratios with their intervals, and the test of equal time."""
    base, merged, unmerged = ([pair[kind][side] for pair in found] for side in ("base", "merged", "unmerged"))
    p_value = paired_tost(np.log(merged) - np.log(base), math.log(1 - MARGIN), math.log(1 + MARGIN))
    return {
        "unmerged_over_merged": ratio(unmerged, merged),
        "unmerged_over_base": ratio(unmerged, base),
        "merged_over_base": ratio(merged, base),
        "merged_equals_base": {"margin": MARGIN, "p_value": p_value, "shown": p_value < 0.05},
    }


def paired_tost(differences: npt.ArrayLike, low: float, high: float) -> float:
    """p-value of H0 "the mean difference lies outside of (low, high)", by two one-sided paired t-tests.

    Raises:
        EvaluationError: fewer than two differences, or bounds in the wrong order.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) < 2 or not low < high:
        raise EvaluationError(f"{d.size} differences with bounds {low} and {high}; at least two and low < high needed")
    mean, error = float(d.mean()), float(d.std(ddof=1)) / len(d) ** 0.5
    if error == 0:
        return 0.0 if low < mean < high else 1.0
    above_low = float(t.sf((mean - low) / error, len(d) - 1))
    below_high = float(t.cdf((mean - high) / error, len(d) - 1))
    return equivalence_p_value(above_low, below_high)


# --- rightness ---------------------------------------------------------------------------------------------------


def parity(setting: Setting) -> Json:
    """Every model; ends with an error where one differs."""
    sides, catalog = Sides(setting), Catalog()
    models: Json = {}
    catalog.add_base("base", sides.base)
    methods = setting.size(METHODS, ("lora", "dora"))
    for method in methods:
        catalog.load_adapter(method, sides.folder(method))
    models["base"] = _differences(catalog, "base", sides.model, None)
    for method in methods:
        models[method] = _differences(catalog, method, sides.model, sides.folder(method))
    for method in setting.size(("lora", "dora"), ("lora",)):
        folder = setting.work / f"merged-{method}"
        merge_folder(sides.model, sides.folder(method), folder, dtype=torch.float32)
        catalog.add_base(folder.name, Sides(setting, folder).base)
        models[f"{method}, merged"] = _differences(catalog, folder.name, sides.model, sides.folder(method))
    for start, method in list(PAIRED.items())[: setting.size(2, 1)]:
        own = setting.work / f"{start}-base"
        quantize = Quantize.model_validate({"method": "nf4", "init": start, "loftq_iterations": 2})
        initialize(sides.model, own, quantize=quantize, seed=0, factors=lambda module: FactorSettings(RANK, 1.0))
        paired = Sides(setting, own)
        catalog.add_base(own.name, paired.base)
        catalog.load_adapter(start, paired.folder(method, start))
        models[start] = _differences(catalog, start, own, paired.folder(method, start))
    wrong = [
        name
        for name, found in models.items()
        if not found["tokens_equal"] or found["largest_logit_difference"] > MAX_DIFFERENCE
    ]
    assert not wrong, f"the server and transformers differ: {wrong}, {models}"
    return {"prompts": len(TEXTS), "tokens": NUM_TOKENS, "models": models}


@torch.no_grad()
def _differences(catalog: Catalog, name: str, base: Path, adapter: Path | None) -> Json:
    """The served model against transformers with our layers, over every position of prompts and answers."""
    served, model = catalog.resolve(name), load_model(base)
    generate: Any = model.generate
    if adapter is not None:
        load_adapter(model, adapter, base=read_identity(base))
    # All tokens are compared, and the end is a token as any other.
    model.generation_config.eos_token_id = None
    runner, plain = served.base.new_runner(served.adapter), served.base.session.runner()
    num_equal, difference, effect = 0, 0.0, 0.0
    for text in TEXTS:
        prompt = served.base.encode_text(text)
        tokens = generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)[0].tolist()
        num_equal += smoke.greedy(served, prompt, NUM_TOKENS) == tuple(tokens[len(prompt) :])
        cache = served.base.session.new_cache(1, len(tokens))
        step = Step([tokens], [len(tokens)], every_position=True)
        found = runner.step(cache, step)[0]
        difference = max(difference, float(np.abs(found - model(torch.tensor([tokens])).logits[0].numpy()).max()))
        effect = max(effect, float(np.abs(found - plain.step(cache, step)[0]).max()))
    report: Json = {"tokens_equal": num_equal == len(TEXTS), "largest_logit_difference": float(f"{difference:.2g}")}
    if served.adapter:
        report["largest_logit_effect_of_the_adapter"] = float(f"{effect:.2g}")
    return report


PARTS = {
    **{part.__name__: part for part in (decode, prefill, swap, bottleneck, quantized)},
    "whole": partial(pairs, num_blocks=None, num_pairs=8),
    "four_blocks": partial(pairs, num_blocks=4, num_pairs=40),
    "parity": parity,
}
