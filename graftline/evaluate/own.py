"""Metrics computed from a model's answers after generation: JSON, a project's own functions, a judge.

They do not need the model, so they are computed anew for every model of a comparison, with the same files, and never
taken from a release: `Scores.measured_by` has the digests of the files that computed them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graftline.data.rows import Row
from graftline.data.scripts import call
from graftline.errors import EvaluationError
from graftline.evaluate.extraction import JsonSchema
from graftline.evaluate.judge import JUDGE, JudgeModel
from graftline.evaluate.scores import Scores, item_id
from graftline.settings.model import Evaluate

ACCURACY = "accuracy"
UNIFORM = "labels of equal prior"
_BY_CHOICE = (ACCURACY, "macro_f1", "class_nll")
"""What changes where labels are scored as of equal prior."""


@dataclass(frozen=True, kw_only=True)
class OwnMetrics:
    """A pipeline's own metrics."""

    section: Evaluate
    root: Path
    """The project's root; files are relative to it."""
    cache: Path
    """Folder for a judge's replies."""
    digests: Mapping[str, str]
    """What computes each metric, by name."""

    def add(self, scores: Scores, rows: Sequence[Row]) -> Scores:
        """The scores with the metrics computed here, without those that an earlier version computed.

        Args:
            scores: a model's scores.
            rows: the evaluation rows, in the order of their file.

        Raises:
            EvaluationError: a file cannot be used, or a function did not return a number for each answer.
        """
        scores = with_label_prior(scores, uniform=self.section.uniform_labels)
        by_id = {item_id(row): row for row in rows}
        asked = [by_id[answer.item_id] for answer in scores.answers]
        texts = [answer.answer for answer in scores.answers]
        columns = self._measure(asked, texts) if asked else {}
        found = [{name: values[at] for name, values in columns.items()} for at in range(len(asked))]
        answers = tuple(replace(answer, own=own) for answer, own in zip(scores.answers, found, strict=True))
        measured_by = dict(self.digests) | (dict.fromkeys(_BY_CHOICE, UNIFORM) if self.section.uniform_labels else {})
        return replace(scores, answers=answers, measured_by=measured_by)

    def judge_numbers(self) -> dict[str, float]:
        """How well the judge agrees with people; empty without a judge or human labels."""
        judge = self._judge()
        return judge.agreement() if judge else {}

    def _measure(self, rows: Sequence[Row], answers: list[str]) -> dict[str, Sequence[float]]:
        section = self.section.answers
        if section is None:
            return {}
        columns: dict[str, Sequence[float]] = {}
        if section.json_schema:
            schema = JsonSchema.read(self.root / section.json_schema)
            each = [schema.score(answer, row.answer) for row, answer in zip(rows, answers, strict=True)]
            columns |= {name: [found[name] for found in each] for name in each[0]}
        for name, script in section.scores.items():
            columns[name] = scores_of(self.root / script, rows, answers)
        if judge := self._judge():
            columns[JUDGE] = judge.score(rows, answers)
        return columns

    def _judge(self) -> JudgeModel | None:
        section = self.section.answers and self.section.answers.judge
        return JudgeModel(section, self.root, self.cache / "judge") if section else None


def scores_of(script: Path, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
    """The result of ``score(rows, answers)`` of a Python file: one finite number for each answer.

    Each row is a dict with ``prompt`` and ``completion`` as text, and ``messages`` and ``tools`` as chat templates take
    them.

    Raises:
        EvaluationError: it returned anything else.
        DataError: the file cannot be imported, has no such function, or fails; its line is named.
    """
    plain = [
        {
            "prompt": row.prompt,
            "completion": row.answer,
            "messages": [message.turn for message in row.messages],
            "tools": [dict(tool) for tool in row.tools],
        }
        for row in rows
    ]
    given = call(script, "score", plain, list(answers))
    try:
        values = [_number(value) for value in given]
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{script}: score() returned {error}; expected a finite number for each answer") from None
    if len(values) != len(answers):
        raise EvaluationError(f"{script}: score() returned {len(values)} numbers for {len(answers)} answers")
    return values


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"{value[:40]!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(repr(value)[:40]) from None
    if not math.isfinite(number):
        raise ValueError(f"{number}")
    return number


def with_label_prior(scores: Scores, *, uniform: bool) -> Scores:
    """Choose labels anew: the likeliest after the prompt, or, with ``uniform``, after division by the label's prior.

    The prior is the label's mean probability over all of the evaluation's prompts (batch calibration, Zhou et al. 2024,
    arXiv 2309.17249): argmax_i log p(i | x) - log mean_x p(i | x). It does not use the right answers. Log-likelihoods
    stay as they were scored.
    """
    if not scores.labels or not (uniform or scores.measured_by.get(ACCURACY) == UNIFORM):
        return scores
    scores_NL = np.array([item.log_likelihoods for item in scores.items])
    if uniform:
        log_p_NL = scores_NL - np.logaddexp.reduce(scores_NL, axis=1, keepdims=True)
        scores_NL = log_p_NL - np.logaddexp.reduce(log_p_NL, axis=0)
    best = scores_NL.argmax(axis=1).tolist()
    items = [replace(item, chosen=at, correct=at == item.gold) for item, at in zip(scores.items, best, strict=True)]
    return replace(scores, items=tuple(items))
