"""The section ``evaluate.answers``: free answers, and what they are scored by."""

from typing import Annotated

from pydantic import Field, StringConstraints

from graftline.settings.fields import Count, LocalFile, PythonFile, Section, Text

MetricName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]


class AnswerJudge(Section):
    """A model behind an OpenAI-compatible address that compares answers with the rows' own, for the metric `judge`."""

    address: Annotated[str, StringConstraints(pattern=r"^https?://[^\s?#]+$", max_length=1024)]
    """Base address of the service, such as https://judge.example/v1. Its key, if it needs one, is read from the
    variable GRAFTLINE_JUDGE_KEY."""
    model: Text
    """Name of the model there. Replies are cached by address, model, rubric and texts, so name a fixed version."""
    rubric: LocalFile
    """File, relative to pipelines.yaml, that tells the judge what makes one answer better than another."""
    human_labels: LocalFile | None = None
    """File of JSON lines with people's decisions: {"prompt", "first", "second", "better": "first", "second" or "tie"}.
    Without it the judge is only reported, and no gate may name it."""
    min_agreement: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Share of the human labels on which the judge must be shown to agree (lower end of the 90 % interval) before a
    gate on it decides anything."""


class Answers(Section):
    """Free answers to the held-out prompts, greedy, compared with the rows' own answers."""

    max_new_tokens: Annotated[int, Field(ge=1, le=65_536)]
    """Longest answer in tokens; one that has not ended by then counts against `stop_rate`. The time grows with it."""
    max_rows: Count | None = None
    """Held-out rows that are answered, the first ones; all when left out."""
    forbidden: tuple[Text, ...] = ()
    """Regular expressions, any case, that no answer may match: the metric `forbidden_answers` counts those that do."""
    json_schema: LocalFile | None = None
    """JSON Schema that answers must meet, a file relative to pipelines.yaml (draft 2020-12 unless it names another);
    `{}` allows any JSON. For the metrics `json_valid`, `json_equal`, `field_precision`, `field_recall`, `field_f1`."""
    scores: dict[MetricName, PythonFile] = Field(default_factory=dict)
    """Your own metrics by name: a Python file with `score(rows, answers) -> list[float]`, relative to
    pipelines.yaml."""
    judge: AnswerJudge | None = None
    """A judge model for the metric `judge`."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the project that these metrics are made of."""
        judge = (self.judge.rubric, self.judge.human_labels) if self.judge else ()
        return tuple(path for path in (self.json_schema, *self.scores.values(), *judge) if path)
