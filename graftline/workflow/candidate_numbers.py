"""What is measured of the candidate alone, for guards and for gates with a limit.

Leakage, template, training loss, size, answers, latency, MIUB.
"""

import json
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.leakage import find_leaks
from graftline.data.rows import Row, read_rows
from graftline.data.template import encode, encode_prompt
from graftline.evaluate.generation import timed_answer
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
from graftline.progress import Reporter
from graftline.weights.quant.load import load_model, load_tokenizer
from graftline.workflow.base import original_base, trained_base
from graftline.workflow.stage import Context


def candidate_numbers(
    context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[AnswerScore]
) -> dict[str, float]:
    """Numbers by name, those that ``evaluate`` switches on among them.

    Args:
        context: the pipeline.
        model: the candidate.
        tokenizer: the one that is released with it.
        answers: what it answered, if it was asked.
    """
    fetched, section = context.folder("fetch"), context.pipeline.evaluate
    template, rows = context.pipeline.base.template, read_rows(fetched / "evaluation.jsonl")
    mismatches = template_mismatches(
        rows, load_tokenizer(original_base(context)), tokenizer, template=template, served_template=template
    )
    numbers = leakage_numbers(find_leaks(read_rows(fetched / "train.jsonl"), rows)) | {
        "adapter_bytes": float(folder_bytes(context.folder("train") / "adapter")),
        "template_mismatches": float(mismatches),
    }
    numbers |= training_numbers(_losses(context))
    if section.answers and section.answers.forbidden:
        numbers["forbidden_answers"] = float(forbidden_answers(answers, section.answers.forbidden))
    if section.miub_rows:
        documents = [encode(row, tokenizer, template=template).input_ids for row in rows[: section.miub_rows]]
        numbers |= measure_miub(model, documents, on_progress=Reporter("MIUB", "passes")).numbers()
    if section.latency_tokens:
        numbers |= _latency(context, model, tokenizer, rows[0], section.latency_tokens)
    return numbers


def _losses(context: Context) -> list[float]:
    """Training losses up to the step whose adapter was kept: later ones belong to an adapter that was dropped."""
    history = json.loads((context.folder("train") / "history.json").read_text(encoding="utf-8"))
    looks = [point for point in history if "held_out_loss" in point]
    kept = min(looks, key=lambda point: point["held_out_loss"])["step"] if looks else history[-1]["step"]
    return [point["loss"] for point in history if point["step"] <= kept]


def _latency(
    context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Row, num_tokens: int
) -> dict[str, float]:
    """The candidate's answer against that of the base that it sits on: what the adapter costs while it is unmerged."""
    base = load_model(trained_base(context), device=str(model.device), dtype=torch.float32)
    prompt = tuple(encode_prompt(row, tokenizer, template=context.pipeline.base.template))
    return latency_numbers(*(timed_answer(which, prompt, num_tokens=num_tokens) for which in (model, base)))
