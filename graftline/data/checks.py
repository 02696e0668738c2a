"""Checks of rows as they will be learned: each says what it found and on which lines."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from graftline.data.columns import EncodedColumns
from graftline.data.encoding import EncodedRows
from graftline.data.row_file import keys_of
from graftline.data.row_keys import Integers, RowKeys, first_of, opposite_of, pairs
from graftline.data.rows import Row
from graftline.data.screening import contradiction_policy
from graftline.data.split import find_leaks
from graftline.data.template import encode_answers, labels_as_answers, stop_ids
from graftline.errors import DataError
from graftline.logs import OnProgress, silent
from graftline.settings.data import Policy

Side = Literal["training", "evaluation"]
Severity = Literal["error", "warning"]
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found. ``lines``: source lines of the rows at fault. A ``warning`` does not stop the line."""

    name: str
    side: Side
    passed: bool
    detail: str
    lines: tuple[int, ...] = ()
    severity: Severity = "error"

    @property
    def stops(self) -> bool:
        """Whether the line must stop."""
        return not self.passed and self.severity == "error"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the base takes. ``num_tokens``: rows of its embedding. ``num_positions``: tokens of the longest row.

    ``num_new_tokens``: what evaluation may write behind a prompt; 0: nothing.
    """

    num_tokens: int
    num_positions: int
    num_new_tokens: int = 0


def check_encoded(
    side: Side,
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    limits: ModelLimits | None = None,
    special_tokens: Literal["error", "keep"] = "error",
) -> list[Check]:
    """Checks of token ids: something to learn, EOS learned, no template tokens in texts, what was cut, what fits.

    ``limits``: of the base; None leaves out whether rows fit it. ``special_tokens``: ``keep``: texts with some are a
    warning.
    """
    return [
        *_what_fits(side, rows, tokenizer, template, limits),
        _something_to_learn(side, rows),
        _end_is_learned(side, rows, stop_ids(tokenizer, template=template)[0]),
        _no_template_tokens(side, rows.rows, tokenizer, "warning" if special_tokens == "keep" else "error"),
        _what_was_cut(side, rows),
    ]


def check_rejected(
    side: Side,
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    limits: ModelLimits | None = None,
) -> list[Check]:
    """Checks of the token ids of pairs' rejected answers: whether they fit the model, and what was cut."""
    fits = _what_fits(side, rows, tokenizer, template, limits)
    found = [*fits, _something_to_learn(side, rows), _what_was_cut(side, rows)]
    return [replace(check, name=f"{check.name}: rejected answers") for check in found]


def check_texts(
    side: Side,
    rows: Sequence[Row],
    *,
    labels: Sequence[str] | None,
    duplicates: Policy = "error",
    contradictions: Policy | None = None,
) -> list[Check]:
    """Checks of texts: duplicates, prompts with two answers, answers outside ``labels`` (outer blanks ignored).

    Args:
        side: which rows these are. An evaluation that counts an item twice is an error whatever ``duplicates`` says.
        rows: as they will be learned.
        labels: every answer that is allowed, if there are such.
        duplicates: ``keep``: rows that are there twice are a warning.
        contradictions: ``error`` or ``keep``; None: see `contradiction_policy`.
    """
    may_contradict, keys = contradiction_policy(contradictions, labels) == "keep", keys_of(rows)
    checks = [
        _no_duplicates(side, keys, "warning" if duplicates == "keep" and side == "training" else "error"),
        _pairs_agree(side, keys, "warning" if contradictions == "keep" else "error")
        if keys.of_pairs
        else _one_answer_a_prompt(side, keys, "warning" if may_contradict else "error"),
        _prompts_differ_clearly(side, keys),
    ]
    if labels is not None:
        checks.append(_labels(side, rows, labels))
    if keys.of_pairs:
        checks.append(_length_of_pairs(side, rows))
    return checks


def check_labels(
    side: Side,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    labels: Sequence[str],
    limits: ModelLimits | None = None,
) -> Check:
    """Labels in the place of the first row's answer: all can be written by the model, no two as the same token ids."""
    name, row = "labels can be told apart", rows[0]
    try:
        _, answers = encode_answers(row, tokenizer, template=template, texts=labels_as_answers(row, labels))
    except DataError as error:
        return Check(name, side, passed=False, detail=str(error), lines=(row.source_line,))
    beyond = [
        label
        for label, ids in zip(labels, answers, strict=True)
        if limits is not None and any(token >= limits.num_tokens for token in ids[:-1])
    ]
    if beyond and limits is not None:
        shown = ", ".join(map(repr, beyond[:_EXAMPLES]))
        detail = f"the model's embedding has {limits.num_tokens} rows, so it has none for a token of {shown}; "
        return Check(name, side, passed=False, detail=f"{detail}resize the base, or rename the labels")
    first: dict[tuple[int, ...], str] = {}
    same = [
        f"{earlier!r} and {label!r}"
        for label, ids in zip(labels, map(tuple, answers), strict=True)
        if (earlier := first.setdefault(ids, label)) != label
    ]
    return Check(
        name,
        side,
        not same,
        f"{', '.join(same[:_EXAMPLES])} have the same token ids behind a prompt; rename one of them"
        if same
        else f"{len(labels)} labels with different token ids",
    )


def check_leakage(training: Sequence[Row], evaluation: Sequence[Row], *, on_progress: OnProgress = silent) -> Check:
    """No evaluation prompt among the training prompts: exactly, normalized or nearly (`graftline.data.split`)."""
    leaks = find_leaks(training, evaluation, on_progress=on_progress)
    kinds = Counter(leak.kind for leak in leaks)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    pairs = ", ".join(
        f"{leak.evaluation_line} = training {leak.training_line} ({leak.kind})" for leak in leaks[:_EXAMPLES]
    )
    return Check(
        "no evaluation row in training",
        "evaluation",
        not leaks,
        f"{len(leaks)} of {len(evaluation)} evaluation prompts are in training ({found}): {pairs}; remove them there"
        if leaks
        else f"none of {len(evaluation)} evaluation prompts is among {len(training)} training prompts",
        tuple(leak.evaluation_line for leak in leaks),
    )


def _something_to_learn(side: Side, rows: EncodedRows) -> Check:
    empty = rows.lines(rows.columns.count_learned() == 0)
    return Check(
        "every row has supervised tokens",
        side,
        not empty,
        f"{len(empty)} of {len(rows.rows)} rows have no token to learn after truncation; raise data.max_tokens"
        if empty
        else f"all {len(rows.rows)} rows have at least one",
        empty,
    )


def _end_is_learned(side: Side, rows: EncodedRows, end: int) -> Check:
    columns, cut = rows.columns, set(rows.truncated_lines)
    _, stops = columns.last_learned()
    is_ended = (stops == columns.lengths) & (columns.token_at(columns.lengths - 1) == end)
    missing = tuple(line for line in rows.lines(~is_ended) if line not in cut)
    return Check(
        "the token that ends an answer is learned",
        side,
        not missing,
        f"{len(missing)} rows do not end in a supervised token {end}; a model trained on them does not stop"
        if missing
        else f"token {end} ends all {len(rows.rows) - len(cut)} rows that are not truncated",
        missing,
    )


def _what_fits(
    side: Side, rows: EncodedRows, tokenizer: PreTrainedTokenizerBase, template: str, limits: ModelLimits | None
) -> list[Check]:
    if limits is None:
        return []
    return [_tokens_fit(side, rows, tokenizer, template, limits), _positions_fit(side, rows, limits)]


def _tokens_fit(
    side: Side, rows: EncodedRows, tokenizer: PreTrainedTokenizerBase, template: str, limits: ModelLimits
) -> Check:
    """A tokenizer that tokens were added to, over a model that was not resized: the lookup would be out of range."""
    bound = limits.num_tokens
    at_fault, beyond = rows.columns.beyond(bound)
    beyond |= {token for token in stop_ids(tokenizer, template=template) if token >= bound}
    named = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in sorted(beyond)[:_EXAMPLES])
    return Check(
        "every token is in the model",
        side,
        not beyond,
        f"the model's embedding has {bound} rows, so it has none for the tokens {named}; resize the base "
        "(resize_token_embeddings) and save it with its tokenizer, or use a template without these tokens"
        if beyond
        else f"no token is beyond the embedding's {bound} rows",
        rows.lines(at_fault),
    )


def _positions_fit(side: Side, rows: EncodedRows, limits: ModelLimits) -> Check:
    columns = rows.columns
    num_needed, bound = columns.lengths, limits.num_positions
    if side == "evaluation" and limits.num_new_tokens:
        num_needed = numpy.maximum(num_needed, _num_prompt_tokens(columns) + limits.num_new_tokens)
    longest, lines = int(num_needed.max(initial=0)), rows.lines(num_needed > bound)
    behind = f" with up to {limits.num_new_tokens} new tokens" if side == "evaluation" and limits.num_new_tokens else ""
    return Check(
        "every row fits the model's positions",
        side,
        not lines,
        f"{len(lines)} rows need up to {longest} positions{behind}, the model has {bound}: shorten them, or set "
        "data.max_tokens and data.overlength to drop or truncate; where the base's rotary scaling reaches further, say "
        "so in its config.json (max_position_embeddings)"
        if lines
        else f"the longest needs {longest} of {bound} positions{behind}",
        lines,
    )


def _num_prompt_tokens(columns: EncodedColumns) -> NDArray[numpy.int64]:
    """(R,) tokens before each row's last answer; all where the row was cut behind it."""
    starts, stops = columns.last_learned()
    return numpy.where(stops == columns.lengths, starts, columns.lengths)


def _no_template_tokens(
    side: Side, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, severity: Severity
) -> Check:
    """A text that holds ``<|im_end|>`` would be read as the end of its turn."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    at_fault = tuple(row.source_line for row in rows if any(token in text for text in _texts(row) for token in special))
    return Check(
        "no special token in a text",
        side,
        not at_fault,
        f"{len(at_fault)} rows hold one of {', '.join(sorted(special)[:_EXAMPLES])}…, which the model would read as a "
        "control token; remove it from the text, or set data.special_tokens to keep if that is meant"
        if at_fault
        else f"none of {len(special)} special tokens occurs",
        at_fault,
        severity,
    )


def _texts(row: Row) -> Iterator[str]:
    """All that a row says; of a pair both answers."""
    yield from (message.content for message in row.messages)
    if row.rejected is not None:
        yield row.rejected


def _what_was_cut(side: Side, rows: EncodedRows) -> Check:
    lines = tuple(sorted(rows.truncated_lines + rows.dropped_lines))
    return Check(
        "no row is too long",
        side,
        not lines,
        f"{len(rows.truncated_lines)} rows truncated, {len(rows.dropped_lines)} dropped; raise data.max_tokens"
        if lines
        else "no row truncated or dropped",
        lines,
        severity="warning",
    )


def _no_duplicates(side: Side, keys: RowKeys, severity: Severity) -> Check:
    first = first_of(keys["text"])
    again = _told(keys, numpy.flatnonzero(first != numpy.arange(len(first))), first)
    return Check(
        "no row twice",
        side,
        not again,
        f"{len(again)} rows repeat an earlier one (lines {_pairs(again)}); remove them, or set data.duplicates to drop"
        if again
        else f"{len(first)} different rows",
        tuple(line for line, _ in again),
        severity,
    )


def _one_answer_a_prompt(side: Side, keys: RowKeys, severity: Severity) -> Check:
    first, answers = first_of(keys["question"]), keys["answer"]
    again = _told(keys, numpy.flatnonzero(answers != answers[first]), first)
    return Check(
        "one answer a prompt",
        side,
        not again,
        f"{len(again)} rows answer an earlier prompt differently (lines {_pairs(again)}); correct or remove them, or "
        "set data.contradictions to drop or keep"
        if again
        else "no contradictions",
        tuple(line for line, _ in again),
        severity,
    )


def _prompts_differ_clearly(side: Side, keys: RowKeys) -> Check:
    """Such prompts may well mean different things: Polish and polish, 2² and 22, indented lines of a program."""
    first, questions = first_of(keys["normal"]), keys["question"]
    again = _told(keys, numpy.flatnonzero(questions != questions[first]), first)
    return Check(
        "prompts differ by more than case and blanks",
        side,
        not again,
        f"{len(again)} prompts differ from an earlier one in case, width or white space only (lines {_pairs(again)}); "
        "remove them if they mean the same, or set data.near_duplicates to drop"
        if again
        else "no two prompts are alike but for these",
        tuple(line for line, _ in again),
        severity="warning",
    )


def _told(keys: RowKeys, at_fault: Integers, first: Integers) -> tuple[tuple[int, int], ...]:
    """Source lines of bad rows, each with that of the first row it conflicts with."""
    return pairs(keys["line"], at_fault, first[at_fault])


def check_dropped(
    dropped: Mapping[str, Sequence[Sequence[int]]],
    near: Sequence[Sequence[int]],
    *,
    place: Callable[[int], str] = str,
) -> list[Check]:
    """What was left out before the rows were split, and which training rows are nearly the same; the source's lines.

    ``place``: where to look for a line of the source, which may be several files.
    """
    told = {
        "empty": "ask nothing or have no answer to learn",
        "duplicates": "repeat an earlier row",
        "contradictions": "ask what another row asks, and answer it differently",
        "near_duplicates": "have a prompt that is nearly an earlier row's",
        "evaluation": "ask the same as a row of data.evaluation, or nearly",
    }
    out = [
        f"{len(dropped[name])} {what} (lines {_pairs(dropped[name], place)})"
        for name, what in told.items()
        if dropped.get(name)
    ]
    return [
        Check(
            "no row left out",
            "training",
            not out,
            f"of the source's rows, {'; '.join(out)}" if out else "every row of the source is on one of the sides",
            tuple(line for pairs in dropped.values() for line, _ in pairs),
            severity="warning",
        ),
        Check(
            "no near duplicate in training",
            "training",
            not near,
            f"{len(near)} prompts are nearly an earlier one's (lines {_pairs(near, place)} of the source); set "
            "data.near_duplicates to drop if they teach nothing new"
            if near
            else "no two are nearly the same",
            tuple(line for line, _ in near),
            severity="warning",
        ),
    ]


def _pairs(pairs: Sequence[Sequence[int]], place: Callable[[int], str] = str) -> str:
    shown = ", ".join(
        place(line) if line == earlier else f"{place(line)} = {place(earlier)}" for line, earlier in pairs[:_EXAMPLES]
    )
    return shown + (f" and {len(pairs) - _EXAMPLES} more" if len(pairs) > _EXAMPLES else "")


def _pairs_agree(side: Side, keys: RowKeys, severity: Severity) -> Check:
    """Whether no two pairs of one prompt prefer the same two answers in opposite order."""
    earlier = opposite_of(keys["question"], keys["answer"], keys["rejected"])
    again = _told(keys, numpy.flatnonzero(earlier < numpy.arange(len(earlier))), earlier)
    return Check(
        "pairs agree",
        side,
        not again,
        f"{len(again)} pairs choose what an earlier pair of the same prompt rejects, and the reverse (lines "
        f"{_pairs(again)}): remove one of each two, or set data.contradictions to drop or keep"
        if again
        else "no two pairs prefer the same answers in opposite order",
        tuple(line for line, _ in again),
        severity,
    )


_LENGTH_BIAS = 0.65
"""Largest share of pairs with the longer answer on one side; above it a model may learn length, not quality."""


def _length_of_pairs(side: Side, rows: Sequence[Row]) -> Check:
    """Whether the answers' lengths alone show which one was chosen."""
    pairs = [(len(row.answer), len(row.rejected)) for row in rows if row.rejected is not None]
    longer = sum(chosen > rejected for chosen, rejected in pairs) / len(pairs)
    shorter = sum(chosen < rejected for chosen, rejected in pairs) / len(pairs)
    chosen, rejected = (sum(lengths) / len(pairs) for lengths in zip(*pairs, strict=True))
    told = (
        f"the chosen answer is the longer one in {longer:.0%} of {len(pairs)} pairs and the shorter one in "
        f"{shorter:.0%} ({chosen:.0f} characters on average, rejected {rejected:.0f})"
    )
    biased = max(longer, shorter) > _LENGTH_BIAS
    advice = ": a model may learn the length; balance the pairs, or compare answers of like length" if biased else ""
    return Check("length does not decide pairs", side, not biased, told + advice, severity="warning")


def _labels(side: Side, rows: Sequence[Row], labels: Sequence[str]) -> Check:
    known = {label.strip() for label in labels}
    outside, examples = list[int](), list[str]()
    for row in rows:
        if (answer := row.answer.strip()) not in known:
            outside.append(row.source_line)
            examples = sorted({*examples, repr(answer[:40])})[:_EXAMPLES]
    given, advice = ", ".join(examples), ""
    if outside and {unicodedata.normalize("NFC", label) for label in known} >= {
        unicodedata.normalize("NFC", row.answer.strip()) for row in rows
    }:
        given = ", ".join(map(ascii, examples))
        advice = " (the same letters, composed otherwise: normalize the rows or the labels to NFC)"
    return Check(
        "answers are labels",
        side,
        not outside,
        f"{len(outside)} rows answer {given}; expected {', '.join(sorted(known))}{advice}: correct them or data.labels"
        if outside
        else f"every answer is one of {len(known)} labels",
        tuple(outside),
    )
