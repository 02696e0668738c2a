"""Measurements of the candidate alone, for guards and gates with a limit.

Leakage, template, training loss, size, answers, latency and MIUB.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.attach import without_adapter
from graftline.data.preparation import EVALUATION, TRAINING
from graftline.data.row_file import RowFile
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


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The judged model, the inputs it was made from, and its answers."""

    model: Callable[[], PreTrainedModel]
    """Loads the model if it is not in memory."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer released with the model."""
    answers: Sequence[AnswerScore]
    """Its generated answers, if any."""
    trained: Path
    """Output folder of its training: adapter/ and history.json."""
    original: Path
    """Its base before quantization."""


def candidate_numbers(candidate: Candidate, section: Evaluate, *, template: str, rows: Path) -> dict[str, float]:
    """Measured numbers by name, including those that ``evaluate`` switches on.

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
    numbers = leakage_numbers(find_leaks(RowFile(rows / TRAINING), evaluation)) | {
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
    """Training losses up to the step whose adapter was kept; later ones belong to a discarded adapter."""
    points = json.loads(history.read_text(encoding="utf-8"))
    looks = [point for point in points if "held_out_loss" in point]
    kept = min(looks, key=lambda point: point["held_out_loss"])["step"] if looks else points[-1]["step"]
    return [point["loss"] for point in points if point["step"] <= kept]


def _latency(candidate: Candidate, row: Row, *, template: str, num_tokens: int) -> dict[str, float]:
    """Latency of the candidate against its base: the cost of the unmerged adapter. Both share their weights."""
    model = candidate.model()
    base = without_adapter(model)
    prompt = tuple(encode_prompt(row, candidate.tokenizer, template=template))
    return latency_numbers(*(timed_answer(which, prompt, num_tokens=num_tokens) for which in (model, base)))
