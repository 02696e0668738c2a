"""What the parts of the GPU study share: models of true shapes, rows, one training, cases with a time limit."""

import gc
import itertools
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.data.template import Encoded
from graftline.settings.model import Adapter, Train
from graftline.train.devices import peak_memory_bytes, reset_peak_memory, resolve_device
from graftline.train.results import StepMetrics
from graftline.train.trainer import train
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.scheme import FP8, Scheme
from studies.harness import Json, Setting

SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
"""Width, inner width, layers, heads, key heads, vocabulary: Llama's."""
SECONDS = {
    "parity": 60,
    "resume": 30,
    "speed": 140,
    "memory": 60,
    "profile": 30,
    "init": 20,
    "serve": 130,
    "large": 150,
}
SECONDS |= {"targets": 560, "ratios": 560, "limits": 300, "compiled": 330}
"""Time of each part."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    size: str
    bits: str | None = None
    method: str = "lora"
    tokens: int = 2048
    batch: int = 4
    steps: int = 6
    instructions: bool = False
    """Rows of instructions' lengths, at most ``tokens``, instead of rows of ``tokens`` tokens."""
    options: tuple[tuple[str, Any], ...] = ()
    """Settings of the training beside the usual ones."""


def scheme_of(bits: str) -> Scheme:
    """A code with blocks of 64 and double quantization; FP8 with its scales."""
    return FP8 if bits == "fp8" else Scheme(bits, 64, True)


def config_of(size: str) -> LlamaConfig:
    """A Llama of this size."""
    width, inner, layers, heads, key_heads, words = SHAPES[size]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=words,
        max_position_embeddings=131072,
    )


def make_model(
    size: str,
    bits: str | None,
    device: str,
    dtype: torch.dtype,
    *,
    layer_of: Callable[[torch.Tensor, str], nn.Module] | None = None,
) -> PreTrainedModel:
    """Random weights, made on the device layer by layer, so that a quantized model never needs its dense memory.

    ``layer_of`` makes a quantized layer of a weight and a code; ours when left out.
    """
    layer_of = layer_of or _quantized
    with torch.device("meta"):
        model: PreTrainedModel = LlamaForCausalLM._from_config(config_of(size), dtype=dtype)
    chooser = torch.Generator("cpu" if size == "tiny" else device).manual_seed(0)

    def draw(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=dtype)
        drawn = torch.randn(shape, generator=chooser, device=chooser.device, dtype=torch.float32) * 0.02
        return drawn.to(device=device, dtype=dtype)

    for name, module in list(model.named_modules()):
        if bits and isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, layer_of(draw(module.weight.shape), bits))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = nn.Parameter(draw(parameter.shape), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return model.eval()


def _quantized(weight: torch.Tensor, bits: str) -> nn.Module:
    return QuantLinear(quantize(weight, scheme_of(bits)))


def make_rows(count: int, tokens: int, words: int) -> list[Encoded]:
    """Rows of one length, all supervised but the first token."""
    ids = torch.randint(4, words, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [Encoded(row, [at > 0 for at in range(tokens)]) for row in ids]


def make_instructions(count: int, most: int, words: int) -> list[Encoded]:
    """Rows whose lengths are log-normal (median 245), three fifths of each a prompt that is not supervised."""
    chooser, rows = torch.Generator().manual_seed(0), []
    for drawn in torch.randn(count, generator=chooser).tolist():
        length = int(min(most, max(8, math.exp(0.8 * drawn + 5.5))))
        ids = torch.randint(4, words, (length,), generator=chooser).tolist()
        rows.append(Encoded(ids, [at >= 3 * length // 5 for at in range(length)]))
    return rows


def rows_of(job: Job) -> list[Encoded]:
    """What a job trains on: every side the same."""
    make = make_instructions if job.instructions else make_rows
    return make(job.batch * job.steps, job.tokens, config_of(job.size).vocab_size)


def settings_of(job: Job, device: str) -> Train:
    """Settings of a job's training."""
    given: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": True, "compile": "never"}
    given |= dict(job.options)
    common: dict[str, Any] = {"learning_rate": 1e-4, "checkpoint_every": 0, "scheduler": "constant", "threads": 1}
    return Train(**(common | {"steps": job.steps, "batch_size": job.batch, "device": device} | given))


def adapter_of(job: Job) -> Adapter:
    """The adapter of a job."""
    rank = 16 if job.size != "tiny" else 4
    alpha: dict[str, Any] = {"alpha": 2.0 * rank} if job.method in ("lora", "rslora", "dora") else {}
    return Adapter(method=job.method, rank=rank, **alpha)  # type: ignore[arg-type]


def model_of(job: Job, device: str) -> PreTrainedModel:
    """The base of a job with its adapter."""
    dtype = torch.float32 if settings_of(job, device).precision == "fp32" else torch.bfloat16
    model = make_model(job.size, job.bits, device, dtype)
    attach(model, adapter_of(job), seed=0)
    return model


def run_job(job: Job, device: str, work: Path, *, stop_after: int = 0, model: PreTrainedModel | None = None) -> Json:
    """Train; returns losses, tokens a second behind the first two steps, the first step's seconds and the peak.

    ``model`` is one that a job like this has trained; without it a new one is made.
    """
    model = model or model_of(job, device)
    ends = [(time.perf_counter(), 0)]

    def on_step(metrics: StepMetrics) -> None:
        ends.append((time.perf_counter(), metrics.tokens))
        if metrics.step == stop_after:
            raise KeyboardInterrupt

    kind = resolve_device(device)  # type: ignore[arg-type]
    reset_peak_memory(kind)
    result = train(model, rows_of(job), settings=settings_of(job, device), work=work, on_step=on_step)
    weights = {name: value.detach().cpu() for name, value in trainable_parameters(model).items()}
    return {
        "losses": list(result.losses),
        "first_step_seconds": round(ends[1][0] - ends[0][0], 3),
        "step_seconds": [round(end - start, 3) for (start, _), (end, _) in itertools.pairwise(ends)],
        "tokens_per_second": tokens_per_second(ends),
        "peak_gb": round(peak_memory_bytes(kind) / 1e9, 3),
        "weights": weights,
    }


def tokens_per_second(ends: list[tuple[float, int]]) -> float | None:
    """From (time, tokens) at the start and at the end of each step; two steps are left out where there are four."""
    warm = 2 if len(ends) > 4 else 1
    timed = ends[warm + 1 :]
    return round(sum(tokens for _, tokens in timed) / (timed[-1][0] - ends[warm][0]), 1) if timed else None


class TimeIsUpError(Exception):
    """A part's time is over."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What graftline warns of meanwhile."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage()[:300])  # type: ignore[method-assign]
    logging.getLogger("graftline").addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger("graftline").removeHandler(handler)


def run_cases(part: str, setting: Setting, cases: dict[str, Callable[[], Json]]) -> Json:
    """Every case in the part's time: a line of JSON each, and a table. An error is a result."""
    ends, found = time.monotonic() + SECONDS[part] * (10 if setting.quick else 1), {}
    for name, case in cases.items():
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        left = ends - time.monotonic()
        try:
            if left <= 0:
                raise TimeIsUpError
            with _at_most(left), _warnings() as warned:
                found[name] = case()
            if warned:  # such as that the blocks ran uncompiled
                found[name] |= {"warned": sorted(set(warned))}
        except TimeIsUpError:
            found[name] = {"not_done": f"the part's {SECONDS[part]} seconds were over"}
        except Exception as error:  # noqa: BLE001 # whatever a card, a driver or a peer raises is what is to be known
            found[name] = {"not_done": why_not(error)}
        line = json.dumps({"part": part, "case": name, "device": device_name(), **found[name]})
        print(line, flush=True)
        with (setting.work / "lines.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
    return {"device": device_name(), "cases": found, "table": table(found)}


def why_not(error: Exception) -> str:
    """Why a case was not done: out of memory, or the error."""
    memory = isinstance(error.__cause__ or error, torch.OutOfMemoryError)
    return "out of memory" if memory else f"{type(error).__name__}: {str(error)[:300]}"


def table(found: Json) -> list[str]:
    """A line of text for each case."""
    return [f"{name:<44}" + "  ".join(f"{key} {value}" for key, value in one.items()) for name, one in found.items()]


def device_name() -> str:
    """The card's name, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def device_kind() -> str:
    """Where this runs: cuda where there is a GPU."""
    return resolve_device("auto")
