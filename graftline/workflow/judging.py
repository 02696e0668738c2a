"""A verdict on scores at hand, and the digests of what it comes from: for gate, package and pull requests."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftline.digest import of_file
from graftline.evaluate.gates import judge
from graftline.evaluate.guard_rules import pipeline_rules
from graftline.evaluate.guards import parity_numbers
from graftline.evaluate.scores import Scores
from graftline.evaluate.verdict import GateResult, Verdict
from graftline.merge.parity import ParityReport
from graftline.workflow import scored
from graftline.workflow.stage import Context


def judge_scores(context: Context, scores: Mapping[str, Scores]) -> Verdict:
    """The verdict on scores (by model's name) that `scored.read_all` found to be about what lies here.

    Raises:
        EvaluationError: the merged model was made of something else.
    """
    candidate = scores[scored.CANDIDATE]
    scored.check_merged(context, scored.of_candidate(scores))
    candidate = replace(candidate, numbers={**candidate.numbers, **merged_numbers(context)})
    # Nothing is in production at first: the base stands in.
    references = {scored.PRODUCTION: scores["base"], **scores}
    del references[scored.CANDIDATE]
    verdict = judge(pipeline_rules(context.pipeline), candidate, references)
    if not_merged := why_not_merged(context):
        gates = tuple(_explain(gate, not_merged) for gate in verdict.gates)
        verdict = replace(verdict, gates=gates, notes=(not_merged,))
    return verdict


def judged_files(context: Context) -> dict[str, Any]:
    """Digests of the files that the verdict comes from."""
    files = sorted(scored.scores_folder(context).glob("*.jsonl"))
    parity = of_file(context.folder("merge") / "parity.json")
    return {"scores": {path.stem: str(of_file(path)) for path in files}, "parity": str(parity)}


def merged_numbers(context: Context) -> dict[str, float]:
    """Merged against unmerged, and the merged model's size; nothing where none is made."""
    record = _parity(context)
    if not record["merged"]:
        return {}
    parity = ParityReport.from_json(record["parity"])
    return parity_numbers(parity) | {"merged_bytes": float(record["merge"]["num_bytes"])}


def why_not_merged(context: Context) -> str | None:
    """Why there is no merged model though the pipeline asks for one; None where there is one, or none is asked for."""
    reason: str | None = _parity(context).get("reason") if not _parity(context)["merged"] else None
    return reason


def _explain(gate: GateResult, not_merged: str) -> GateResult:
    """A gate on a merged model that does not exist fails, and says why it does not exist."""
    if not gate.metric.startswith("merged_"):
        return gate
    return replace(gate, reason=f"could not run: {gate.metric} was not measured: {not_merged}")


def _parity(context: Context) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((context.folder("merge") / "parity.json").read_text(encoding="utf-8"))
    return record
