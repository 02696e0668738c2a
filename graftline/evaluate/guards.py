"""Numbers besides the task metric, for `Scores.numbers`; a gate or guard compares each with a limit.

===================== ================================================= ====================
number                what it counts                                    usual gate
===================== ================================================= ====================
leaked_rows           evaluation rows found among the training rows     lower, limit 0
template_mismatches   rows that serving would tokenize differently      lower, limit 0
forbidden_answers     answers that match a forbidden pattern            lower, limit 0
training_loss_end     where the training loss ended, in nats a token    guard `training`
adapter_bytes, ...    size of what would be released                    lower, limit
latency_seconds       median time of the measured call                  lower, limit
latency_ratio         candidate's time over the reference's, its upper  lower, limit 1.02
                      95 % limit
merged_mean_kl, ...   what `graftline.merge.parity` found               lower, limit
===================== ================================================= ====================

Quantized against 16-bit is an ordinary paired gate: its reference is the 16-bit model's scores.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from graftline.data.rows import Row
from graftline.data.split import Leak
from graftline.data.template import encode, encode_prompt
from graftline.errors import EvaluationError
from graftline.evaluate.scores import AnswerScore
from graftline.evaluate.statistics.intervals import bootstrap_ratio
from graftline.merge.parity import ParityReport

MIN_LATENCY_RUNS = 30


def leakage_numbers(leaks: Iterable[Leak]) -> dict[str, float]:
    """Evaluation rows found in the training rows: exact, normalized and near matches, and the total."""
    kinds = [leak.kind for leak in leaks]
    counts = {f"leaked_rows_{kind}": float(kinds.count(kind)) for kind in ("exact", "normalized", "near")}
    return counts | {"leaked_rows": float(len(kinds))}


def template_mismatches(
    rows: Sequence[Row],
    trained: PreTrainedTokenizerBase,
    served: PreTrainedTokenizerBase,
    *,
    template: str,
    served_template: str,
) -> int:
    """Number of rows whose prompt gets other token ids in serving than in training.

    Args:
        rows: any rows of the task.
        trained: tokenizer that training used.
        served: tokenizer of the folder that would be released.
        template: template that training used.
        served_template: template that serving would use.
    """
    mismatches = 0
    for row in rows:
        prompt = encode_prompt(row, served, template=served_template)
        learned = encode(row, trained, template=template).input_ids  # shorter if the last answer is not learned
        mismatches += any(ours != theirs for ours, theirs in zip(learned, prompt, strict=False))
    return mismatches


def forbidden_answers(answers: Sequence[AnswerScore], patterns: Sequence[str]) -> int:
    """Number of answers that match a forbidden pattern (a case-insensitive regular expression).

    Raises:
        EvaluationError: a pattern is not a valid regular expression.
    """
    try:
        compiled = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    except re.error as error:
        raise EvaluationError(
            f"the forbidden pattern {error.pattern!r} is not a regular expression ({error}); correct it"
        ) from error
    return sum(any(pattern.search(answer.answer) for pattern in compiled) for answer in answers)


def training_numbers(losses: Sequence[float]) -> dict[str, float]:
    """Summary of a training run: steps, mean loss at the start and at the end, and number of non-finite losses.

    Start and end average a tenth of the steps, at least five and at most half of them, because batches differ in
    difficulty. With one step, both are that step's loss. If any loss is not finite, neither is given.

    Args:
        losses: the loss of every step that led to the kept adapter, in nats per supervised token.

    Raises:
        EvaluationError: there are no steps.
    """
    if not losses:
        raise EvaluationError("the training's history has no step; run the train stage again")
    infinite = sum(not math.isfinite(loss) for loss in losses)
    numbers = {"training_steps": float(len(losses)), "training_losses_not_finite": float(infinite)}
    if infinite:
        return numbers
    width = max(1, min(len(losses) // 2, max(5, len(losses) // 10)))
    return numbers | {
        "training_loss_start": statistics.fmean(losses[:width]),
        "training_loss_end": statistics.fmean(losses[-width:]),
    }


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder, in bytes.

    Raises:
        EvaluationError: there is no such folder.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is not a folder, so its size cannot be measured; package first")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parity_numbers(report: ParityReport) -> dict[str, float]:
    """Numbers that compare the merged with the unmerged model.

    ``merged_failures`` counts violated limits of `merge.parity`. ``merged_nll_change`` bounds how much worse the
    answers may be, in nats per token: the upper end of the 90 % interval, below 0 if they are shown to be better.
    """
    return {
        "merged_max_logit_difference": report.max_logit_difference,
        "merged_argmax_agreement": report.argmax_agreement,
        "merged_mean_kl": report.mean_kl,
        "merged_nll_change": report.answer_nll_change_interval[1],
        "merged_failures": float(len(report.failures)),
    }


def latency_numbers(
    candidate: Callable[[], object],
    reference: Callable[[], object] | None = None,
    *,
    num_runs: int = MIN_LATENCY_RUNS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time a call, alternating with a reference so that both run under the same load.

    Args:
        candidate: the call to time; on a GPU it must wait for its result.
        reference: the call to compare with.
        num_runs: timed runs of each, after one warm-up run.
        clock: returns seconds.

    Returns:
        ``latency_seconds`` (median) and, with a reference, ``latency_ratio`` and ``latency_ratio_low``: the upper and
        lower one-sided 95 % limits of the ratio of total times, bootstrapped over pairs of runs.

    Raises:
        EvaluationError: fewer than 30 runs.
    """
    if num_runs < MIN_LATENCY_RUNS:
        raise EvaluationError(f"{num_runs} timed runs; a latency needs at least {MIN_LATENCY_RUNS} to have an interval")
    calls = [candidate] if reference is None else [candidate, reference]
    times = np.array([[_seconds(call, clock) for call in calls] for _ in range(num_runs + 1)])[1:]
    numbers = {"latency_seconds": statistics.median(times[:, 0].tolist())}
    if reference is not None:
        found = bootstrap_ratio(times[:, 0], times[:, 1])
        numbers |= {"latency_ratio": found.upper_limit(0.05), "latency_ratio_low": found.lower_limit(0.05)}
    return numbers


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start
