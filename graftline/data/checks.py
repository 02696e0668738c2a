"""Checks of rows as they will be learned: each says what it found and on which lines."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from graftline.data.formats import Row
from graftline.data.leakage import find_leaks
from graftline.data.similarity import normalize
from graftline.data.template import Encoded, EncodedRows, stop_ids

Side = Literal["training", "evaluation"]
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found. ``lines``: source lines of the rows at fault. A ``warning`` does not stop the line."""

    name: str
    side: Side
    passed: bool
    detail: str
    lines: tuple[int, ...] = ()
    severity: Literal["error", "warning"] = "error"

    @property
    def stops(self) -> bool:
        """Whether the line must stop."""
        return not self.passed and self.severity == "error"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the base takes. ``num_tokens``: rows of its embedding. ``num_positions``: tokens of the longest row.

    ``num_new_tokens``: what evaluation may write behind a prompt; 0: nothing. ``num_scored``: the longest row that
    evaluation scores, where that is shorter (a sliding window); None: as ``num_positions``.
    """

    num_tokens: int
    num_positions: int
    num_new_tokens: int = 0
    num_scored: int | None = None


def check_encoded(
    side: Side,
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    limits: ModelLimits | None = None,
) -> list[Check]:
    """Checks of token ids: something to learn, EOS learned, no template tokens in texts, what was cut, what fits.

    ``limits``: of the base; None leaves out whether rows fit it.
    """
    fits = [_tokens_fit(side, rows, tokenizer, template, limits), _positions_fit(side, rows, limits)] if limits else []
    return [
        *fits,
        _something_to_learn(side, rows),
        _end_is_learned(side, rows, stop_ids(tokenizer, template=template)[0]),
        _no_template_tokens(side, rows.rows, tokenizer),
        _what_was_cut(side, rows),
    ]


def check_texts(side: Side, rows: Sequence[Row], *, labels: Sequence[str] | None) -> list[Check]:
    """Checks of texts: duplicates, prompts with two answers, answers outside ``labels`` (outer blanks ignored)."""
    checks = [_no_duplicates(side, rows), _one_answer_a_prompt(side, rows, has_labels=labels is not None)]
    if labels is not None:
        checks.append(_labels(side, rows, labels))
    return checks


def check_leakage(training: Sequence[Row], evaluation: Sequence[Row]) -> Check:
    """No evaluation prompt among the training prompts: exactly, normalized or nearly (`graftline.data.leakage`)."""
    leaks = find_leaks(training, evaluation)
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
    empty = tuple(row.source_line for row, one in zip(rows.rows, rows.encoded, strict=True) if not one.num_supervised)
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
    cut = set(rows.truncated_lines)
    missing = tuple(
        row.source_line
        for row, one in zip(rows.rows, rows.encoded, strict=True)
        if row.source_line not in cut and not (one.input_ids[-1:] == [end] and one.supervised[-1])
    )
    return Check(
        "the token that ends an answer is learned",
        side,
        not missing,
        f"{len(missing)} rows do not end in a supervised token {end}; a model trained on them does not stop"
        if missing
        else f"token {end} ends all {len(rows.rows) - len(cut)} rows that are not truncated",
        missing,
    )


def _tokens_fit(
    side: Side, rows: EncodedRows, tokenizer: PreTrainedTokenizerBase, template: str, limits: ModelLimits
) -> Check:
    """A tokenizer that tokens were added to, over a model that was not resized: the lookup would be out of range."""
    bound, lines, beyond = limits.num_tokens, [], set()
    for row, one in zip(rows.rows, rows.encoded, strict=True):
        if max(one.input_ids, default=0) >= bound:
            lines.append(row.source_line)
            beyond |= {token for token in one.input_ids if token >= bound}
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
        tuple(lines),
    )


def _positions_fit(side: Side, rows: EncodedRows, limits: ModelLimits) -> Check:
    longest, lines = 0, []
    bound = limits.num_scored or limits.num_positions if side == "evaluation" else limits.num_positions
    for row, one in zip(rows.rows, rows.encoded, strict=True):
        num_needed = len(one.input_ids)
        if side == "evaluation" and limits.num_new_tokens:
            num_needed = max(num_needed, _num_prompt_tokens(one) + limits.num_new_tokens)
        longest = max(longest, num_needed)
        if num_needed > bound:
            lines.append(row.source_line)
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
        tuple(lines),
    )


def _num_prompt_tokens(encoded: Encoded) -> int:
    """Tokens before the last answer."""
    num_tokens = len(encoded.input_ids)
    while num_tokens and encoded.supervised[num_tokens - 1]:
        num_tokens -= 1
    return num_tokens


def _no_template_tokens(side: Side, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Check:
    """A text that holds ``<|im_end|>`` would be read as the end of its turn."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    at_fault = tuple(
        row.source_line
        for row in rows
        if any(token in message.content for message in row.messages for token in special)
    )
    return Check(
        "no special token in a text",
        side,
        not at_fault,
        f"{len(at_fault)} rows hold one of {', '.join(sorted(special)[:_EXAMPLES])}…, which the model would read as a "
        "control token; remove it from the text"
        if at_fault
        else f"none of {len(special)} special tokens occurs",
        at_fault,
    )


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


def _no_duplicates(side: Side, rows: Sequence[Row]) -> Check:
    first: dict[tuple[tuple[str, str], ...], int] = {}
    again: list[tuple[int, int]] = []
    for row in rows:
        key = tuple((message.role, normalize(message.content)) for message in row.messages)
        if key in first:
            again.append((row.source_line, first[key]))
        else:
            first[key] = row.source_line
    pairs = ", ".join(f"{line} = {earlier}" for line, earlier in again[:_EXAMPLES])
    return Check(
        "no row twice",
        side,
        not again,
        f"{len(again)} rows repeat an earlier one (lines {pairs}); remove them"
        if again
        else f"{len(rows)} different rows",
        tuple(line for line, _ in again),
    )


def _one_answer_a_prompt(side: Side, rows: Sequence[Row], *, has_labels: bool) -> Check:
    """Two references for one prompt are usual in generation; two labels are a contradiction."""
    answers: dict[str, str] = {}
    again = []
    for row in rows:
        prompt, answer = normalize(row.prompt), normalize(row.answer)
        if answers.setdefault(prompt, answer) != answer:
            again.append(row.source_line)
    return Check(
        "one answer a prompt",
        side,
        not again,
        f"{len(again)} rows answer an earlier prompt differently; correct or remove them"
        if again
        else "no contradictions",
        tuple(again),
        severity="error" if has_labels else "warning",
    )


def _labels(side: Side, rows: Sequence[Row], labels: Sequence[str]) -> Check:
    known = {label.strip() for label in labels}
    outside = [row for row in rows if row.answer.strip() not in known]
    given = ", ".join(sorted({repr(row.answer.strip()[:40]) for row in outside})[:_EXAMPLES])
    return Check(
        "answers are labels",
        side,
        not outside,
        f"{len(outside)} rows answer {given}; expected {', '.join(sorted(known))}: correct them or data.labels"
        if outside
        else f"every answer is one of {len(known)} labels",
        tuple(row.source_line for row in outside),
    )
