"""What the serving benchmarks serve: adapters with random values for a base, and steps of a graph with them."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.identity import AdapterIdentity
from graftline.adapters.peft_format import save_adapter
from graftline.export.onnx_session import Runner, Step
from graftline.serve.base import Base
from graftline.settings.model import Adapter
from graftline.weights.factors import factors_digest, read_factors
from graftline.weights.identity import read_identity
from graftline.weights.quant.load import load_model

RANK = 16
Clock = Callable[[], float]


def make_adapter(base: Path, folder: Path, method: str, *, rank: int = RANK, seed: int = 0) -> Path:
    """An adapter of rank (or width) ``rank`` on every linear layer, values as after a little training."""
    model, identity = load_model(base), read_identity(base)
    initial = read_factors(base) if identity.pair else None
    attach(model, Adapter(method=method, rank=rank, alpha=float(rank)), seed=seed, initial=initial)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    made_for = AdapterIdentity(
        base_digest=identity.digest,
        quantizer=identity.quantizer,
        initial_digest=factors_digest(base) if identity.pair else None,
    )
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(model, folder, identity=made_for)
    return folder


def prompts(num_rows: int, length: int) -> list[list[int]]:
    """Prompts that differ from row to row."""
    return [[100 + 7 * row + token for token in range(length)] for row in range(num_rows)]


def decode_seconds(
    base: Base, runner: Runner, num_rows: int, num_tokens: int, *, length: int = 32, clock: Clock = time.perf_counter
) -> float:
    """Seconds for ``num_tokens`` greedy tokens of every row, the prompts read before."""
    cache = base.session.new_cache(num_rows, length + num_tokens + 1)
    logits = runner.step(cache, Step(prompts(num_rows, length), [length] * num_rows))
    started = clock()
    for count in range(1, num_tokens + 1):
        tokens = [[int(token)] for token in logits.argmax(-1)]
        logits = runner.step(cache, Step(tokens, [length + count] * num_rows))
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


def generate_seconds(model: Any, num_rows: int, num_tokens: int, *, length: int = 32) -> float:
    """Seconds of transformers' ``generate`` for ``num_tokens`` tokens of every row after the first ones.

    A run that ends at the first token is taken out: what is left is decoding, as in `decode_seconds`.
    """
    ids = torch.tensor(prompts(num_rows, length))
    seconds = []
    for count in (1, num_tokens + 1):
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        seconds.append(time.perf_counter() - started)
    return seconds[1] - seconds[0]


def forward_seconds(model: Any, num_rows: int, length: int) -> float:
    """Seconds of transformers to read prompts, with logits of the last token only."""
    ids = torch.tensor(prompts(num_rows, length))
    started = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started
