"""Compare the digests of the checkout's files with those in the scores: are these the bytes that were scored?

DVC does not read a file again if its size and time are unchanged, and so misses a block that went bad on the disk or in
DVC's cache. So every stage that uses an artefact hashes it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.data.template import template_digest
from graftline.digest import Digest, of_file, of_files, of_folder
from graftline.errors import EvaluationError
from graftline.evaluate.scores import CANDIDATE, Scores, read_scores
from graftline.evaluate.verdict import ScoredInputs, ScoredRelease, adapter_digest, differences, tokenizer_digest
from graftline.weights.identity import verify_identity
from graftline.weights.model_folder import load_tokenizer
from graftline.workflow.pinned_base import trained_base
from graftline.workflow.workspace import Workspace

_TENSORS = "*.safetensors"


@dataclass(frozen=True)
class BaseDigests:
    """What lies in the folder of a base."""

    weights: Digest
    """With what its configuration computes with them (`graftline.weights.identity`)."""
    files: Digest
    """Whatever else lies there."""
    tokenizer: Digest


def read_base(base: Path) -> BaseDigests:
    """What lies in the folder of a base now: every byte is read.

    Raises:
        BaseMismatchError: the base's weights differ from its record.
    """
    others = {
        path.relative_to(base).as_posix(): of_file(path)
        for path in base.rglob("*")
        if path.is_file() and not path.match(_TENSORS)
    }
    return BaseDigests(verify_identity(base).digest, of_files(others), tokenizer_digest(others))


def read_digests(
    base: BaseDigests, adapter: Path | None, *, fetched: Path, release: ScoredRelease | None = None
) -> ScoredInputs:
    """What is scored: a base, what lies in an adapter's folder now, and the rows that were fetched."""
    return ScoredInputs(
        base=base.weights,
        base_files=base.files,
        tokenizer=base.tokenizer,
        adapter=adapter_digest(of_folder(adapter)) if adapter else None,
        rows=of_file(fetched / "evaluation.jsonl"),
        texts=of_file(fetched / "general.jsonl"),
        release=release,
    )


def scores_folder(at: Workspace) -> Path:
    """The evaluate stage's folder with a file of scores for each model."""
    return at.folder("evaluate") / "scores"


def read_all(section: settings.Base, at: Workspace) -> dict[str, Scores]:
    """Scores by model, after a check that they belong to the files in ``runs/``.

    Raises:
        EvaluationError: they do not record what was scored, or the files are different now.
        BaseMismatchError: the base's weights differ from its record.
    """
    found = {path.stem: read_scores(path) for path in sorted(scores_folder(at).glob("*.jsonl"))}
    refuse = partial(_refuse, at.name)
    if CANDIDATE not in found:
        raise refuse(f"there are no scores of the candidate in {scores_folder(at)}")
    if silent := [name for name, scores in found.items() if scores.scored is None]:
        raise refuse(f"the scores of {', '.join(silent)} do not say which bytes were scored: an earlier version's")
    base, adapter = trained_base(section, at), at.folder("train") / "adapter"
    about = {name: scores.scored for name, scores in found.items() if scores.scored}
    here = f"what was scored is not what lies in runs/{at.name} now"
    if other := differences(about[CANDIDATE], read_digests(read_base(base), adapter, fetched=at.folder("fetch"))):
        raise refuse(f"{here}: {'; '.join(other)}")
    template = template_digest(load_tokenizer(base), section.template)
    if found[CANDIDATE].template != template:
        raise refuse(f"{here}: template: scored {found[CANDIDATE].template}, found {template}")
    for name, scored in about.items():
        if (scored.rows, scored.texts) != (about[CANDIDATE].rows, about[CANDIDATE].texts):
            raise refuse(f"rows: the candidate was scored on {about[CANDIDATE].rows}, {name} on {scored.rows}")
    return found


def of_candidate(scores: Mapping[str, Scores]) -> ScoredInputs:
    """The digests of the candidate in scores from `read_all`."""
    scored = scores[CANDIDATE].scored
    assert scored is not None  # read_all refuses such scores
    return scored


def check_merged(scored: ScoredInputs, at: Workspace) -> None:
    """Raise EvaluationError if the merged model was made from another adapter or base than was scored."""
    record: dict[str, Any] = json.loads((at.folder("merge") / "parity.json").read_text(encoding="utf-8"))
    pairs = (("adapter", scored.adapter), ("base", scored.base)) if record["merged"] else ()
    for name, scored_digest in pairs:
        if record.get(name) != str(scored_digest):
            raise EvaluationError(
                f"the merged model of {at.name} was made of another {name} than was scored: scored "
                f"{scored_digest}, merged {record.get(name)}; merge again: "
                f"dvc repro --force --single-item merge@{at.name}"
            )


def _refuse(pipeline: str, what: str) -> EvaluationError:
    return EvaluationError(
        f"{what}; score what lies there now: dvc repro --force --single-item evaluate@{pipeline}, or put back what "
        "was scored"
    )
