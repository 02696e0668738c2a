"""What is measured of the candidate alone, for guards and for gates with a limit.

Leakage, template, training loss, size, answers, latency, MIUB.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.preparation import EVALUATION, TRAINING
from graftline.data.rows import Row, read_rows
from graftline.data.split import find_leaks
from graftline.data.template import encode, encode_prompt
from graftline.evaluate.evaluation import timed_answer
from graftline.evaluate.guards import (
    folder_bytes,
    forbidden_answers,
    latency_numbers,
    leakage_numbers,
    template_mismatches,
    training_numbers,
)
from graftline.evaluate.miub import measure_miub
from graftline.evaluate.scores import AnswerScore
from graftline.logs import Reporter
from graftline.settings.model import Evaluate
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.linear import load_model


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The model that is judged, what it was made of, and what it answered."""

    model: Callable[[], PreTrainedModel]
    """Loads it, where it is not in memory."""
    tokenizer: PreTrainedTokenizerBase
    """The one that is released with it."""
    answers: Sequence[AnswerScore]
    """What it answered, if it was asked."""
    trained: Path
    """Folder of its training: adapter/ and history.json."""
    base: Path
    """The base that its adapter is on."""
    original: Path
    """That base before it was quantized."""


def candidate_numbers(candidate: Candidate, section: Evaluate, *, template: str, rows: Path) -> dict[str, float]:
    """Numbers by name, those that ``evaluate`` switches on among them.

    Args:
        candidate: the model.
        section: the pipeline's ``evaluate``.
        template: name of the chat template.
        rows: folder with train.jsonl and evaluation.jsonl.
    """
    tokenizer, answers = candidate.tokenizer, candidate.answers
    evaluation = read_rows(rows / EVALUATION)
    mismatches = template_mismatches(
        evaluation, load_tokenizer(candidate.original), tokenizer, template=template, served_template=template
    )
    numbers = leakage_numbers(find_leaks(read_rows(rows / TRAINING), evaluation)) | {
        "adapter_bytes": float(folder_bytes(candidate.trained / "adapter")),
        "template_mismatches": float(mismatches),
    }
    numbers |= training_numbers(_losses(candidate.trained / "history.json"))
    if section.answers and section.answers.forbidden:
        numbers["forbidden_answers"] = float(forbidden_answers(answers, section.answers.forbidden))
    if section.miub_rows:
        documents = [encode(row, tokenizer, template=template).input_ids for row in evaluation[: section.miub_rows]]
        numbers |= measure_miub(candidate.model(), documents, on_progress=Reporter("MIUB", "passes")).numbers()
    if section.latency_tokens:
        numbers |= _latency(candidate, evaluation[0], template=template, num_tokens=section.latency_tokens)
    return numbers


def _losses(history: Path) -> list[float]:
    """Training losses up to the step whose adapter was kept: later ones belong to an adapter that was dropped."""
    points = json.loads(history.read_text(encoding="utf-8"))
    looks = [point for point in points if "held_out_loss" in point]
    kept = min(looks, key=lambda point: point["held_out_loss"])["step"] if looks else points[-1]["step"]
    return [point["loss"] for point in points if point["step"] <= kept]


def _latency(candidate: Candidate, row: Row, *, template: str, num_tokens: int) -> dict[str, float]:
    """The candidate's answer against that of the base that it sits on: what the adapter costs while it is unmerged."""
    model = candidate.model()
    base = load_model(candidate.base, device=str(model.device), dtype=torch.float32)
    prompt = tuple(encode_prompt(row, candidate.tokenizer, template=template))
    return latency_numbers(*(timed_answer(which, prompt, num_tokens=num_tokens) for which in (model, base)))
