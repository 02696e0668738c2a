"""Serving on a GPU: decoding, prefill, the cost and the swap of an adapter, and a stress test of the caches.

The graph is exported from random weights of the true shape (fp16 on a GPU, fp32 on a CPU); transformers computes the
same model in the same number type, and vLLM too where it can be imported. A merged model's graph is the base's with
other weights (a test compares them), so the base alone stands for it.
"""

import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.export.onnx_session import KvCache, Runner, Step
from graftline.serve.served_base import AdapterCache, AdapterFile, Base, Runtime, best_device, default_precision
from studies.harness import Json, Setting
from studies.models import make_adapter, make_random, make_tokenizer
from studies.serving import decode_seconds, forward_seconds, generate_seconds, prefill_seconds, prompts

SHAPE = {"hidden": 3072, "intermediate": 8192, "vocabulary": 128_256, "blocks": 8}
"""1.6 billion parameters: 8 blocks like Llama 3.2 3B's."""
QUICK_SHAPE = {"hidden": 384, "intermediate": 384, "vocabulary": 512, "blocks": 2}
BATCHES, PREFILLS = (1, 8, 32), (512, 2048)


class Served:
    """The base on its graph, with an adapter, and the peers; each is made when a case first asks for it."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, best_device()

    @cached_property
    def folder(self) -> Path:
        """A model folder with random weights and a tokenizer."""
        folder = self.setting.work / "served-base"
        if not folder.is_dir():
            make_random(folder, **self.setting.size(SHAPE, QUICK_SHAPE))
            make_tokenizer(folder)
        return folder

    @cached_property
    def base(self) -> Base:
        """Exported and loaded; ExportError if a node that matters is not on the device."""
        precision, graphs = default_precision(self.device), self.setting.folder("graphs")
        return Base(self.folder, Runtime(graphs=graphs, precision=precision, device=self.device))

    @cached_property
    def adapter(self) -> AdapterFile:
        """LoRA of rank 16 on every linear layer."""
        folder = make_adapter(self.folder, self.setting.work / "served-adapter", rank=self.setting.size(16, 2))
        return self.base.prepare_adapter(folder)[0]

    def sides(self) -> list[tuple[str, Runner]]:
        """With the adapter beside the base's weights, and of the base alone."""
        return [("unmerged", self.base.new_runner(self.adapter)), ("merged", self.base.new_runner(None))]

    @cached_property
    def transformers(self) -> PreTrainedModel:
        """The base in transformers, on the same device and in the same number type."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.base.session.layout.dtype)
        placed: PreTrainedModel = model.to(self.device).eval()
        return placed

    @cached_property
    def vllm(self) -> Any:
        """ModuleNotFoundError where it is not installed."""
        from vllm import LLM

        return LLM(str(self.folder), dtype="float16", gpu_memory_utilization=0.4, max_model_len=4096)


def _median(work: Callable[[], float], turns: int) -> float:
    """After one run that warms up."""
    work()
    return float(np.median([work() for _ in range(turns)]))


def decode(served: Served, num_rows: int) -> Json:
    """Tokens a second."""
    count, turns = served.setting.size(64, 2), served.setting.turns(5)
    sides = {name: partial(decode_seconds, served.base, runner, num_rows, count) for name, runner in served.sides()}
    sides["transformers"] = partial(generate_seconds, served.transformers, num_rows, count)
    return _rates({name: num_rows * count / _median(run, turns) for name, run in sides.items()})


def prefill(served: Served, length: int) -> Json:
    """Tokens of one prompt a second."""
    turns = served.setting.turns(5)
    sides = {name: partial(prefill_seconds, served.base, runner, 1, length) for name, runner in served.sides()}
    sides["transformers"] = partial(forward_seconds, served.transformers, length)
    return _rates({name: length / _median(run, turns) for name, run in sides.items()})


def _rates(rate: dict[str, float]) -> Json:
    return {
        **{f"{name}_tokens_per_second": round(value, 1) for name, value in rate.items()},
        "over_transformers": round(rate["merged"] / rate["transformers"], 3),
        "unmerged_over_merged_time": round(rate["merged"] / rate["unmerged"], 3),
    }


def vllm_decode(served: Served, num_rows: int) -> Json:
    """Tokens a second of vLLM, greedy, prompts of 32 tokens, the reading of the prompts taken out."""
    from vllm import SamplingParams

    ids = [{"prompt_token_ids": row} for row in prompts(num_rows, 32)]
    count, seconds = served.setting.size(64, 2), []
    for length in (1, count + 1):
        params = SamplingParams(temperature=0, max_tokens=length, min_tokens=length)

        def run(params: Any = params) -> float:
            started = time.perf_counter()
            served.vllm.generate(ids, params, use_tqdm=False)
            return time.perf_counter() - started

        seconds.append(_median(run, served.setting.turns(5)))
    return {"tokens_per_second": round(num_rows * count / max(1e-6, seconds[1] - seconds[0]), 1)}


def swap(served: Served) -> Json:
    """Milliseconds from "this adapter now" to its first step, its file read and its tensors bound."""
    base, adapter, tokens = served.base, served.adapter, prompts(1, 1)

    def run() -> float:
        cache, keys = AdapterCache(base.session, key=base.key, max_adapters=1), base.session.new_cache(1, 8)
        started = time.perf_counter()
        with cache.use(adapter) as model:
            model.runner.step(keys, Step(tokens, [1]))
        return 1e3 * (time.perf_counter() - started)

    return {"milliseconds": round(_median(run, served.setting.turns(9)), 3)}


def stress(served: Served) -> Json:
    """Rows are adopted by a batch, moved together and freed; every answer is compared with the row's alone."""
    session, rounds = served.base.session, served.setting.size(200, 3)
    runner, random = served.base.new_runner(served.adapter), np.random.default_rng(served.setting.seed)
    rows, count = prompts(8, 40), 4
    alone = [_answer(runner, session.new_cache(1, 64), [row], count)[0] for row in rows]
    gap = {"differing": 0, "largest_logit_gap": 0.0, "answers": 0}
    for _ in range(rounds):
        chosen = random.permutation(len(rows))[: int(random.integers(2, 6))].tolist()
        batch = session.new_cache(len(chosen) + 1, 64)
        for place, row in enumerate(chosen):
            own = session.new_cache(len(chosen) + 1, 64)  # `take_row` takes a row of the same number
            runner.step(own.rows(place, place + 1), Step([rows[row][:-1]], [39]))
            batch.take_row(place, own, 39)
            del own  # freed while the copy may still run
        batch.copy_row(len(chosen) - 1, 0, 39)  # the first row leaves, the last takes its place
        kept = [chosen[-1], *chosen[1:-1]]
        found = _answer(runner, batch.rows(0, len(kept)), [rows[row][-1:] for row in kept], count, done=39)
        for row, logits_CV in zip(kept, found, strict=True):
            gap["answers"] += 1
            gap["differing"] += int((logits_CV.argmax(-1) != alone[row].argmax(-1)).any())
            gap["largest_logit_gap"] = max(gap["largest_logit_gap"], float(np.abs(logits_CV - alone[row]).max()))
    return gap


def _answer(runner: Runner, cache: KvCache, tokens: list[list[int]], count: int, *, done: int = 0) -> list[np.ndarray]:
    """Logits (count, V) of each row while it is fed the same tokens after its prompt."""
    length, found = done + len(tokens[0]), []
    step = Step(tokens, [length] * len(tokens))
    for at in range(count):
        found.append(runner.step(cache, step))
        step = Step([[7 + at]] * len(tokens), [length + at + 1] * len(tokens))
    return list(np.stack(found, axis=1))


def cases(setting: Setting) -> dict[str, Callable[[], Json]]:
    """The cases of the part ``serve``, the most important first."""
    served = Served(setting)
    found: dict[str, Callable[[], Json]] = {
        f"decode, batch {size}": partial(decode, served, size) for size in setting.size(BATCHES, BATCHES[:2])
    }
    found |= {f"prefill, {size} tokens": partial(prefill, served, size) for size in setting.size(PREFILLS, (64,))}
    found |= {"swap": partial(swap, served), "stress": partial(stress, served)}
    found |= {f"vLLM, batch {size}": partial(vllm_decode, served, size) for size in setting.size(BATCHES, (1,))}
    return found
