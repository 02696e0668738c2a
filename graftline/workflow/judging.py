"""The gates' verdict on scores, and the digests of its inputs, for gate, package and pull requests."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.data.preparation import CLUSTERS, SLICES
from graftline.digest import of_file, write_json, write_text
from graftline.evaluate.anchor import compare_with_anchor
from graftline.evaluate.engine_difference import about_engine, require_log_probabilities
from graftline.evaluate.gate_rules import pipeline_rules, with_anchor
from graftline.evaluate.gates import by_slice, judge
from graftline.evaluate.guards import parity_numbers
from graftline.evaluate.scores import CANDIDATE, Scores, with_stand_ins
from graftline.evaluate.verdict import GateResult, Verdict, verdict_markdown, verdict_to_dict
from graftline.merge.parity import ParityReport
from graftline.settings.gate_metrics import ANCHOR, PRODUCTION
from graftline.workflow import scored
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")


def judge_candidate(pipeline: settings.Pipeline, at: Workspace, *, out: Path) -> None:
    """Judge what was scored, and write ``verdict.json`` and ``verdict.md`` into ``out``.

    Raises:
        EvaluationError: the files in ``runs/`` are not those that were scored or merged.
        BaseMismatchError: the base's weights differ from its record.
    """
    verdict = judge_scores(pipeline, at, scored.read_all(pipeline.base, at))
    write_json(out / "verdict.json", verdict_to_dict(verdict) | {"judged": judged_files(at)})
    write_text(out / "verdict.md", verdict_markdown(verdict))
    logger.info("%s: %s", verdict.outcome, verdict.summary)


def judge_scores(pipeline: settings.Pipeline, at: Workspace, scores: Mapping[str, Scores]) -> Verdict:
    """The verdict on scores by model, as from `scored.read_all`.

    Raises:
        EvaluationError: the merged model was made from another adapter or base, or the engine that scored the
            candidate cannot decide a gate.
    """
    candidate = scores[CANDIDATE]
    # The gates may have changed since the engine was asked.
    require_log_probabilities(pipeline.evaluate, pipeline.gates, candidate.served_by.get("offers", ""))
    scored.check_merged(scored.of_candidate(scores), at)
    candidate = replace(candidate, numbers={**candidate.numbers, **merged_numbers(at)})
    fetched = at.folder("fetch")
    references, rules, clusters = with_stand_ins(scores), pipeline_rules(pipeline), read_clusters(fetched)
    del references[CANDIDATE]
    slices, anchor = read_slices(fetched), None
    if ANCHOR in scores:
        rules = with_anchor(rules)
        anchor = compare_with_anchor(rules, candidate, scores[ANCHOR], clusters=clusters, slices=slices)
    verdict = judge(rules, candidate, references, clusters=clusters, slices=slices)
    if slices:
        found = by_slice(
            pipeline.evaluate.metric,
            candidate,
            references[PRODUCTION],
            against=PRODUCTION,
            clusters=clusters,
            slices=slices,
        )
        verdict = replace(verdict, slices=found)
    not_merged = why_not_merged(at)
    if not_merged:
        verdict = replace(verdict, gates=tuple(_explain(gate, not_merged) for gate in verdict.gates))
    notes = [*([not_merged] if not_merged else []), *([anchor.note] if anchor else [])]
    if candidate.served_by:
        notes.append(f"judged on {about_engine(candidate.served_by)}; references were scored by graftline's own engine")
    return replace(verdict, notes=tuple(notes), anchor=anchor)


def read_clusters(rows: Path) -> dict[str, str]:
    """Which rows of a folder belong together, by item id; empty where the pipeline names no column."""
    path = rows / CLUSTERS
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def read_slices(rows: Path) -> dict[str, dict[str, str]]:
    """By column of ``data.slices``, the value of each row of a folder, by item id; empty without."""
    path = rows / SLICES
    found: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def judged_files(at: Workspace) -> dict[str, Any]:
    """Digests of the verdict's inputs."""
    files = sorted(scored.scores_folder(at).glob("*.jsonl"))
    parity = of_file(at.folder("merge") / "parity.json")
    return {"scores": {path.stem: str(of_file(path)) for path in files}, "parity": str(parity)}


def merged_numbers(at: Workspace) -> dict[str, float]:
    """Merged against unmerged, and the merged model's size; empty if none is made."""
    record = _parity(at)
    if not record["merged"]:
        return {}
    parity = ParityReport.from_json(record["parity"])
    return parity_numbers(parity) | {"merged_bytes": float(record["merge"]["num_bytes"])}


def why_not_merged(at: Workspace) -> str | None:
    """Why the merged model that the pipeline asks for is missing; None if it is not missing."""
    record = _parity(at)
    return None if record["merged"] else record.get("reason")


def _explain(gate: GateResult, not_merged: str) -> GateResult:
    """A gate on a missing merged model, with the reason why it is missing."""
    if not gate.metric.startswith("merged_"):
        return gate
    return replace(gate, reason=f"could not run: {gate.metric} was not measured: {not_merged}")


def _parity(at: Workspace) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((at.folder("merge") / "parity.json").read_text(encoding="utf-8"))
    return record
