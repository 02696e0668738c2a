"""Recorded answers: what transformers generated in the package stage, and whether the server generates the same.

``smoke.json`` in a release: ``{"format": 1, "samples": [{"prompt": [ids], "answer": [ids], "top": [...]}]}``, answers
greedy, ``top`` the likeliest [token, log-probability] pairs at each of an answer's positions. A graph, tokenizer or
adapter other than the judged one shows here before it takes traffic (vLLM #10798, #48019: an adapter loads, and the
answers are the base's). A graph in fp32 must give the same tokens. One in fewer bits must find each recorded token
likely after those before it; comparing free answers would fail at the first near tie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from graftline.adapters.class_head import ClassHead, class_head_of
from graftline.digest import write_json
from graftline.errors import PromotionError
from graftline.export.onnx_session import Precision, Step
from graftline.serve.catalog import Catalog, ServedModel
from graftline.serve.pooled import read_prompts
from graftline.serve.served_base import Base, Runtime
from graftline.weights.head import hidden_states
from graftline.weights.reader import read_json_object

SMOKE_FILE = "smoke.json"
_FORMAT = 1


@dataclass(frozen=True)
class Bounds:
    """How closely a graph in fewer bits must match recorded answers."""

    min_top1: float
    """Share of recorded tokens that are the most likely ones."""
    max_mean_gap: float
    """Mean of log p(most likely token) − log p(recorded token), nats."""


BOUNDS: dict[Precision, Bounds] = {"fp16": Bounds(0.9, 0.01), "bf16": Bounds(0.85, 0.05), "int4": Bounds(0.4, 1.0)}
"""Measured on SmolLM2-135M's greedy answers to eight questions (63 tokens): fp16 had 98 % (the rest exact ties) and 0
nats, int4 64 % and 0.35 nats; bf16, in transformers and on 64 tokens, 100 % and 0 nats."""
MAX_CLASS_DISTANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int4": 0.3}
"""Mean total variation of the classes' probabilities from those recorded. The bound of fp32 is that of rounding;
the others are wide guesses that no real model was measured for yet."""
_NUM_TOKENS = 8  # of each recorded answer
_NUM_TOP = 20  # as many as vLLM gives, for another engine's divergence from what was judged


@dataclass(frozen=True)
class SmokeSample:
    """A prompt and the tokens that must follow, most likely token first."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    top: tuple[Mapping[int, float], ...] = ()
    """For each token of the answer, log-probabilities of the most likely tokens; older releases have none."""
    classes: tuple[float, ...] = ()
    """Probabilities of the head's classes, of an adapter that has one; the answer is then empty."""


@torch.no_grad()
def record(model: PreTrainedModel, prompts: Sequence[Sequence[int]], file: Path) -> None:
    """Write a file with the greedy answers of a model (base with its adapter) to some prompts."""
    if head := class_head_of(model):
        chosen = [
            {"prompt": list(prompt), "answer": [], "classes": _classes(model, head, prompt)} for prompt in prompts
        ]
        write_json(file, {"format": _FORMAT, "samples": chosen})
        return
    samples = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        answer = model.generate(  # type: ignore[operator] # transformers' mixins confuse nn.Module's attribute types
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        new = answer[0, len(prompt) :].tolist()
        samples.append({"prompt": list(prompt), "answer": new, "top": _likely(model, answer, len(new))})
    write_json(file, {"format": _FORMAT, "samples": samples})


def _classes(model: PreTrainedModel, head: ClassHead, prompt: Sequence[int]) -> list[float]:
    """Probabilities of the classes, to 1e-6."""
    hidden_H = hidden_states(model, input_ids=torch.tensor([list(prompt)], device=model.device))[0, -1]
    return [round(value, 6) for value in head(hidden_H[None])[0].softmax(-1).tolist()]


def _likely(model: PreTrainedModel, ids: torch.Tensor, num_new: int) -> list[list[list[float]]]:
    """[token, log-probability] of the most likely tokens at each of the last ``num_new`` positions, to 1e-4 nats."""
    logits_NV = model(ids).logits[0, -num_new - 1 : -1].float()
    logprobs_NK, tokens_NK = logits_NV.log_softmax(-1).topk(min(_NUM_TOP, logits_NV.shape[-1]))
    return [
        [[token, round(logprob, 4)] for token, logprob in zip(*pair, strict=True)]
        for pair in zip(tokens_NK.tolist(), logprobs_NK.tolist(), strict=True)
    ]


def read(folder: Path) -> list[SmokeSample]:
    """The recorded answers of a release, if it has any; PromotionError if the file is damaged."""
    file = folder / SMOKE_FILE
    if not file.is_file():
        return []
    value = read_json_object(file)
    try:
        return [_sample(one) for one in value["samples"]]
    except (KeyError, TypeError, ValueError) as error:
        raise PromotionError(f"{file} is damaged ({error}); make the release again") from error


def _sample(value: Any) -> SmokeSample:
    prompt, answer = tuple(map(int, value["prompt"])), tuple(map(int, value["answer"]))
    top = tuple({int(token): float(logprob) for token, logprob in one} for one in value.get("top", ()))
    if top and len(top) != len(answer):
        raise ValueError(f"probabilities of {len(top)} tokens for {len(answer)}")
    return SmokeSample(prompt, answer, top, tuple(map(float, value.get("classes", ()))))


def check(model: ServedModel, folder: Path) -> None:
    """Compare the server's greedy tokens with those recorded in a release.

    Raises:
        PromotionError: there are no recorded answers, one differs (position and both tokens are named), or they are not
            likely enough for the graph's precision.
    """
    samples = read(folder)
    if not samples:
        raise PromotionError(f"{folder} has no recorded answers ({SMOKE_FILE}); make the package again")
    precision = model.base.session.layout.precision
    if model.labels:
        _check_classes(model, samples, MAX_CLASS_DISTANCE[precision])
        return
    if precision in BOUNDS:
        _check_likely(model, samples, BOUNDS[precision])
        return
    for number, sample in enumerate(samples):
        found = greedy(model, sample.prompt, len(sample.answer))
        if found != sample.answer:
            at = next(i for i, pair in enumerate(zip(found, sample.answer, strict=True)) if pair[0] != pair[1])
            raise PromotionError(
                f"{model.name}: recorded answer {number} differs at token {at}: served {found[at]}, recorded "
                f"{sample.answer[at]}; the server does not run the model that was judged"
            )


def _check_classes(model: ServedModel, samples: Sequence[SmokeSample], most: float) -> None:
    found = read_prompts(model, [sample.prompt for sample in samples])
    distances = []
    for number, (sample, one) in enumerate(zip(samples, found, strict=True)):
        if one.classes is None or len(one.classes) != len(sample.classes):
            raise PromotionError(
                f"{model.name}: recorded answer {number} has {len(sample.classes)} classes, the adapter "
                f"{len(model.labels)}; make the package again"
            )
        distances.append(float(np.abs(np.exp(one.classes) - sample.classes).sum()) / 2)
    if not np.mean(distances) <= most:
        raise PromotionError(
            f"{model.name}: the classes' probabilities are {np.mean(distances):.2g} from those recorded (total "
            f"variation, mean of {len(distances)} prompts), {most:g} are allowed in "
            f"{model.base.session.layout.precision}: the server does not run the model that was judged"
        )


def _check_likely(model: ServedModel, samples: Sequence[SmokeSample], bounds: Bounds) -> None:
    gaps = np.concatenate([_gaps(model, sample) for sample in samples])
    top1, gap = float((gaps == 0).mean()), float(gaps.mean())
    if not (top1 >= bounds.min_top1 and gap <= bounds.max_mean_gap):
        raise PromotionError(
            f"{model.name}: of {len(gaps)} recorded tokens {top1:.0%} are the most likely ones, "
            f"{bounds.min_top1:.0%} are needed in {model.base.session.layout.precision}; they are {gap:.2g} nats "
            f"behind those, {bounds.max_mean_gap:.2g} are allowed: the server does not run the model that was judged"
        )


def _gaps(model: ServedModel, sample: SmokeSample) -> np.ndarray:
    """How far each recorded token's logit is below the largest one, given the tokens before it."""
    tokens = [*sample.prompt, *sample.answer]
    session, runner = model.base.session, model.base.new_runner(model.adapter)
    step = Step([tokens], [len(tokens)], every_position=True)
    logits_TV = runner.step(session.new_cache(1, len(tokens)), step)[0]
    before_NV = logits_TV[len(sample.prompt) - 1 : -1]
    return before_NV.max(axis=1) - before_NV[np.arange(len(sample.answer)), list(sample.answer)]


def greedy(model: ServedModel, prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """The greedy continuation, computed outside the scheduler (a session can be used from several threads)."""
    session = model.base.session
    runner = model.base.new_runner(model.adapter)
    cache = session.new_cache(1, len(prompt) + num_tokens)
    tokens: list[int] = []
    logits_BV = runner.step(cache, Step([prompt], [len(prompt)]))
    for count in range(1, num_tokens + 1):
        tokens.append(int(logits_BV[0].argmax()))
        if count < num_tokens:
            logits_BV = runner.step(cache, Step([tokens[-1:]], [len(prompt) + count]))
    return tuple(tokens)


def check_release(folder: Path, *, base: Path, runtime: Runtime) -> None:
    """The smoke run of a promotion: load a release's adapter on its base as the server does, and `check` it.

    Raises:
        PromotionError: there are no recorded answers, or one differs.
        GraftlineError: the adapter is refused; the reason is given.
    """
    catalog = Catalog()
    catalog.add_base("base", Base(base, runtime))
    check(catalog.load_adapter("candidate", folder / "adapter"), folder)
