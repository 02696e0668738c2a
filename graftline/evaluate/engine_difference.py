"""The candidate on our own engine and on the one that will serve: how far apart, and on which items."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftline.data.rows import Row
from graftline.errors import EvaluationError
from graftline.evaluate.metrics import summarize
from graftline.evaluate.scores import Scores, item_id
from graftline.evaluate.words import words
from graftline.settings.gate_metrics import FROM_LOG_PROBABILITIES
from graftline.settings.model import Evaluate, Gate

NUM_SHOWN = 10
_SURE_NATS = 0.05
"""Nats a token; scores of one model on two engines are closer, even in half precision."""
_NEARER = 2.0
"""A model is taken for another one if that one is nearer by this factor."""


@dataclass(frozen=True)
class DifferentItem:
    """An item that the engines answer differently; ``prompt`` and the answers are None if texts are hidden."""

    line: int
    """In the evaluation rows, from 1."""
    prompt: str | None
    own: str | None
    engine: str | None


@dataclass(frozen=True)
class EngineDifference:
    """What the report shows of the two engines."""

    about: str
    """The engine, in a sentence."""
    metrics: tuple[tuple[str, float, float], ...]
    """Name, value on our own engine, value on the other."""
    num_different: int
    num_items: int
    items: tuple[DifferentItem, ...]
    """The first items that differ."""


def engine_numbers(own: Scores, engine: Scores) -> dict[str, float]:
    """``engine_label_agreement``, ``engine_answer_agreement`` and ``engine_nll_difference``, as far as both have them.

    The agreements are shares of items; answers agree word by word. The difference is the mean over items of the
    absolute difference of the right answer's NLL, in nats a token.
    """
    numbers = {}
    if gives_log_probabilities(engine):
        pairs = list(zip(own.items, engine.items, strict=True))
        if own.labels:
            numbers["engine_label_agreement"] = statistics.fmean(a.chosen == b.chosen for a, b in pairs)
        numbers["engine_nll_difference"] = statistics.fmean(abs(a.nll - b.nll) / a.num_tokens for a, b in pairs)
    if own.answers:
        answers = zip(own.answers, engine.answers, strict=True)
        numbers["engine_answer_agreement"] = statistics.fmean(words(a.answer) == words(b.answer) for a, b in answers)
    return numbers


def gives_log_probabilities(scores: Scores) -> bool:
    """Whether the scores' log-probabilities are the engine's; otherwise they are our own code's."""
    return scores.served_by.get("offers") != "generation"


def require_log_probabilities(section: Evaluate, gates: Mapping[str, Gate], offers: str) -> None:
    """Refuse what a server that only generates cannot decide.

    Raises:
        EvaluationError: a gate, or the pipeline's metric, needs log-probabilities, or nothing is generated.
    """
    if offers != "generation":
        return
    needing = [f"gate {name} ({gate.metric})" for name, gate in gates.items() if _needs(gate.metric)]
    if _needs(section.metric):
        needing.append(f"evaluate.metric ({section.metric})")
    advice = (
        "serve with one that does (vLLM does), name metrics of free answers (evaluate.answers, such as exact_match), "
        "or leave evaluate.engine out, so that graftline's own code scores"
    )
    if needing:
        raise EvaluationError(
            f"the engine gives no log-probabilities of a prompt (neither prompt_logprobs nor echo), but these need "
            f"them: {', '.join(needing)}; {advice}"
        )
    if section.answers is None:
        raise EvaluationError(f"the engine only generates, and no answers are asked for; {advice}")


def _needs(metric: str) -> bool:
    return metric in (*FROM_LOG_PROBABILITIES, "engine_label_agreement", "engine_nll_difference")


def refuse_other_model(engine: Scores, candidate: Scores, others: Mapping[str, Scores]) -> None:
    """Refuse scores that are another model's: those of the base, or of what was promoted before.

    Only a clear case is refused: two engines round differently, and two models may be nearly the same.

    Args:
        engine: the engine's scores.
        candidate: our own of the candidate.
        others: our own of further models, by name.

    Raises:
        EvaluationError: another model answers much more like the engine than the candidate does.
    """
    ours = _distance(engine, candidate)
    if ours <= _SURE_NATS:
        return
    for name, scores in others.items():
        if scores.ids("items") != candidate.ids("items") or scores.ids("answers") != candidate.ids("answers"):
            continue
        theirs = _distance(engine, scores)
        if ours > _NEARER * theirs:
            raise EvaluationError(
                f"the engine's model {engine.served_by.get('model')!r} answers like {name} ({theirs:.2g} apart), not "
                f"like the candidate ({ours:.2g} apart): load the candidate's adapter there, best under a name with "
                "{adapter} in evaluate.engine.model, which no other adapter can have"
            )


def _distance(engine: Scores, other: Scores) -> float:
    """Mean difference of log-likelihoods in nats a token; without them, the share of answers that differ."""
    if not gives_log_probabilities(engine):
        return 1.0 - engine_numbers(other, engine)["engine_answer_agreement"]
    found = [
        abs(one - two) / a.num_tokens
        for a, b in zip(engine.items, other.items, strict=True)
        for one, two in zip(a.log_likelihoods, b.log_likelihoods, strict=True)
    ]
    return statistics.fmean(found) if found else math.inf


def compare_engines(own: Scores, engine: Scores, rows: Sequence[Row], *, with_texts: bool) -> EngineDifference:
    """What the report shows.

    Args:
        own: the candidate's scores on our own engine.
        engine: those on the other one.
        rows: the evaluation rows, in the order of their file.
        with_texts: whether prompts and answers may be shown.
    """
    left, right = summarize(_of_engine(own, engine)), summarize(_of_engine(engine, engine))
    metrics = [
        (name, float(left[name]), float(value))
        for name, value in right.items()
        if name in left and isinstance(value, int | float) and name not in engine.numbers
    ]
    pairs = _answers(own, engine)
    different = []
    for line, row in enumerate(rows, start=1):
        ours, theirs, same = pairs.get(item_id(row), ("", "", True))
        if not same:
            texts = (row.prompt.strip(), ours, theirs) if with_texts else (None, None, None)
            different.append(DifferentItem(line, *texts))
    return EngineDifference(
        about_engine(engine.served_by), tuple(metrics), len(different), len(pairs), tuple(different[:NUM_SHOWN])
    )


def _of_engine(scores: Scores, engine: Scores) -> Scores:
    """Only the sections that the engine scored."""
    return scores if gives_log_probabilities(engine) else replace(scores, items=(), general=(), documents=())


def _answers(own: Scores, engine: Scores) -> dict[str, tuple[str, str, bool]]:
    """By item, both answers and whether they are the same: labels, or free answers where there are none."""
    if own.labels and gives_log_probabilities(engine):
        return {
            a.item_id: (own.labels[a.chosen], own.labels[b.chosen], a.chosen == b.chosen)
            for a, b in zip(own.items, engine.items, strict=True)
        }
    return {
        a.item_id: (a.answer, b.answer, words(a.answer) == words(b.answer))
        for a, b in zip(own.answers, engine.answers, strict=True)
    }


def about_engine(engine: Mapping[str, Any]) -> str:
    """The server of `Scores.served_by`, how it was asked and what it says of the model."""
    ways = {
        "prompt_logprobs": "log-probabilities by prompt_logprobs",
        "echo": "log-probabilities by echo",
        "generation": "answers only; log-likelihoods, and what is made of them, are our own engine's",
    }
    served = ", ".join(f"{name} {value}" for name, value in engine["served"].items())
    prompts = "" if engine["takes_ids"] else ", prompts as text"
    told = f"; it says: {served}" if served else ""
    return f"{engine['model']} at {engine['url']} ({ways[engine['offers']]}{prompts}{told})"
