"""Evaluate a pull request: what it changes, whether that is better, and a comment that says so.

1. Find the pipelines that differ between two revisions, by DVC's graph. None: nothing runs.
2. In a worktree of its own, with the shared caches: bring each one's scores up to date at the base revision, then at
   the head. What was ever run comes from DVC's run cache.
3. Compare the head's candidate with the base revision's, and take the head's own verdict against production.
4. Write a Markdown comment and the result as JSON. Exit code 0: pass; 1: fail or inconclusive; 2: an error.

    python -m flows.evaluate_pr --base origin/main --head HEAD --out pull-request
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows import stages, worktree
from flows.changes import Change, find_changes
from flows.comment import PipelineResult, Side, render, worst
from flows.retrain import reproduce, resolve
from graftline import config
from graftline.digest import write_json, write_text
from graftline.errors import GraftlineError
from graftline.evaluate.gate_rules import METRICS, GateRule
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import Scores, read_scores
from graftline.evaluate.verdict import Verdict, verdict_from_dict

UNTIL_SCORES = stages.STAGES[: stages.STAGES.index("evaluate") + 1]
UNTIL_VERDICT = stages.STAGES[: stages.STAGES.index("gate") + 1]
BASE_REVISION = "base revision"


@flow(name="evaluate-pr", flow_run_name="evaluate-pr-{head}")
def evaluate_pr(base: str, head: str, out: Path, link: str | None = None) -> int:
    """Evaluate what ``head`` changes.

    Args:
        base: revision to compare with, such as origin/main.
        head: revision to look at.
        out: folder for comment.md and result.json.
        link: address of the run, for the comment.

    Returns:
        Exit code: 0 for pass, 1 for fail or inconclusive.
    """
    root, log = Path.cwd(), get_run_logger()
    base_commit, head_commit = worktree.commit_of(root, base), worktree.commit_of(root, head)
    changes = find_changes(root, base_commit, head_commit)
    log.info(f"changed: {', '.join(change.pipeline for change in changes) or 'no pipeline'}")
    results, num_pipelines = [], len(config.load(root / config.DEFAULT_FILE).names)
    if changes:
        with worktree.isolated(root, base_commit) as tree:
            before = {change.pipeline: _score_base(tree, change) for change in changes}
            worktree.switch(tree, head_commit)
            num_pipelines = len(config.load(tree / config.DEFAULT_FILE).names)
            results = [_evaluate(tree, change, *before[change.pipeline]) for change in changes]
    text = render(base_commit, head_commit, results, num_pipelines=num_pipelines, link=link)
    write_text(out / "comment.md", text)
    write_json(out / "result.json", _as_json(base_commit, head_commit, results))
    create_markdown_artifact(text, key="pull-request", description="What the pull request is told")
    return 0 if worst(results) == "pass" else 1


def _score_base(tree: Path, change: Change) -> tuple[Scores | None, Side, str | None]:
    """Scores of the base revision's candidate; a base revision that cannot be evaluated is no fault of the head."""
    if change.pipeline not in config.load(tree / config.DEFAULT_FILE).names:
        return None, Side(), "The pipeline is new: there is no base revision of it to compare with."
    try:
        _bring_up_to_date(tree, change.pipeline, UNTIL_SCORES)
    except GraftlineError as error:
        return None, Side(), f"The base revision could not be evaluated: {error}"
    return _scores(tree, change.pipeline), _side(tree, change.pipeline), None


def _evaluate(tree: Path, change: Change, base: Scores | None, side: Side, problem: str | None) -> PipelineResult:
    found = PipelineResult(change, base=side, problem=problem)
    try:
        ran = _bring_up_to_date(tree, change.pipeline, UNTIL_VERDICT)
    except GraftlineError as error:
        return replace(found, problem=f"This revision could not be evaluated: {error}")
    gate = tree / "runs" / change.pipeline / "gate"
    found = replace(
        found,
        stages_run=ran,
        head=_side(tree, change.pipeline),
        verdict=verdict_from_dict(json.loads((gate / "verdict.json").read_text())),
        verdict_text=(gate / "verdict.md").read_text(),
    )
    compared = None if base is None else _compare(tree, change.pipeline, base)
    if compared and all(gate.difference is None for gate in compared.gates):
        # Other rows or another template: the head's own verdict has to do.
        return replace(found, problem=f"Not comparable with the base revision: {compared.gates[0].reason}")
    return replace(found, comparison=compared)


def _bring_up_to_date(tree: Path, pipeline: str, until: tuple[str, ...]) -> tuple[str, ...]:
    resolve(pipeline, tree)
    todo = [stage for stage in stages.outdated(pipeline, root=tree) if stage in until]
    return tuple(stage for stage in todo if reproduce(stage, pipeline, tree))


def _compare(tree: Path, pipeline: str, base: Scores) -> Verdict | None:
    """Head against base revision, by the metrics and margins of the head's gates: is it shown to be worse?"""
    gates = config.load(tree / config.DEFAULT_FILE).pipeline(pipeline).gates.values()
    rules: dict[str, GateRule] = {}
    for gate in sorted(gates, key=lambda gate: gate.test != "non-inferiority"):
        if gate.test != "limit" and gate.metric in METRICS and gate.metric not in rules:
            rule = GateRule(**gate.model_dump())
            rules[gate.metric] = replace(rule, test="non-inferiority", against=BASE_REVISION)
    return judge(rules, _scores(tree, pipeline), {BASE_REVISION: base}) if rules else None


def _scores(tree: Path, pipeline: str) -> Scores:
    return read_scores(tree / "runs" / pipeline / "evaluate" / "scores" / "candidate.jsonl")


def _side(tree: Path, pipeline: str) -> Side:
    runs = tree / "runs" / pipeline
    evaluated = json.loads((runs / "evaluate" / "metrics.json").read_text())["candidate"]
    history = json.loads((runs / "train" / "history.json").read_text())
    trained = json.loads((runs / "train" / "metrics.json").read_text())
    return Side(evaluated | trained, [point["loss"] for point in history])


def _as_json(base: str, head: str, results: list[PipelineResult]) -> dict[str, Any]:
    pipelines = [
        {
            "pipeline": result.change.pipeline,
            "outcome": result.outcome,
            "reasons": list(result.change.reasons),
            "stages_run": list(result.stages_run),
            "problem": result.problem,
            "comparison": None if result.comparison is None else [asdict(gate) for gate in result.comparison.gates],
        }
        for result in results
    ]
    return {"format": 1, "base": base, "head": head, "outcome": worst(results), "pipelines": pipelines}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.evaluate_pr",
        description="Evaluate what a pull request changes.",
        epilog="example: python -m flows.evaluate_pr --base origin/main --head HEAD --out pull-request",
    )
    parser.add_argument("--base", required=True, help="revision to compare with")
    parser.add_argument("--head", default="HEAD", help="revision to look at (default HEAD)")
    parser.add_argument("--out", type=Path, default=Path("pull-request"), help="folder for comment.md and result.json")
    parser.add_argument("--link", help="address of the run, for the comment")
    arguments = parser.parse_args()
    call: Callable[..., int] = evaluate_pr
    try:
        code = call(arguments.base, arguments.head, arguments.out.absolute(), arguments.link)
    except GraftlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print((arguments.out / "comment.md").read_text())
    sys.exit(code)


if __name__ == "__main__":
    main()
