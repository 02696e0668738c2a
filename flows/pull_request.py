"""Two revisions of the repository, evaluated and compared: the work behind `flows.evaluate_pr`, without a scheduler.

In a worktree of its own, with the shared caches, every pipeline that differs is brought up to date at the base
revision, then at the head; what was ever run comes from DVC's run cache.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flows import stages, worktree
from flows.changes import Change, find_changes
from flows.comment import PipelineResult, Side, render, worst
from flows.git import merge_base
from graftline import config
from graftline.digest import write_json, write_text
from graftline.errors import GraftlineError
from graftline.evaluate.gate_rules import METRICS, GateRule
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import Scores, read_scores
from graftline.evaluate.verdict import Outcome, Verdict, verdict_from_dict

UNTIL_SCORES = stages.STAGES[: stages.STAGES.index("evaluate") + 1]
UNTIL_VERDICT = stages.STAGES[: stages.STAGES.index("gate") + 1]
BASE_REVISION = "base revision"


@dataclass(frozen=True)
class Runner:
    """How a pipeline's moving inputs are pinned, and how a stage is brought up to date (whether it ran)."""

    resolve: Callable[[str, Path], None]
    reproduce: Callable[[str, str, Path], bool]


@dataclass(frozen=True)
class Before:
    """What the base revision has to compare with; ``problem`` says why it has nothing."""

    scores: Scores | None = None
    side: Side = field(default_factory=Side)
    problem: str | None = None


def evaluate_revisions(
    root: Path, base: str, head: str, *, out: Path, runner: Runner, link: str | None = None
) -> Outcome:
    """Evaluate what ``head`` changes; write ``comment.md`` and ``result.json``.

    Args:
        root: a checkout of the repository; it is left alone.
        base: revision whose merge base with ``head`` is compared with.
        head: revision to look at.
        out: folder for the two files.
        runner: runs the stages.
        link: address of the run, for the comment.

    Raises:
        GraftlineError: a revision is unknown, the two have no commit in common, or a graph or a
            configuration cannot be read.
    """
    head_commit = worktree.commit_of(root, head)
    base_commit = merge_base(root, worktree.commit_of(root, base), head_commit)
    changes = find_changes(root, base_commit, head_commit)
    results, num_pipelines = [], len(config.load(root / config.DEFAULT_FILE).names)
    if changes:
        with worktree.isolated(root, base_commit) as tree:
            before = [_score_base(tree, change, runner) for change in changes]
            worktree.switch(tree, head_commit)
            num_pipelines = len(config.load(tree / config.DEFAULT_FILE).names)
            results = [_evaluate(tree, change, old, runner) for change, old in zip(changes, before, strict=True)]
    write_text(out / "comment.md", render(base_commit, head_commit, results, num_pipelines=num_pipelines, link=link))
    write_json(out / "result.json", _as_json(base_commit, head_commit, results))
    return worst(results)


def _score_base(tree: Path, change: Change, runner: Runner) -> Before:
    """Scores of the base revision's candidate; a base revision that cannot be evaluated is no fault of the head."""
    if change.removed:
        return Before(problem=_tell_removal(tree, change.pipeline))
    if change.pipeline not in config.load(tree / config.DEFAULT_FILE).names:
        return Before(problem="The pipeline is new: there is no base revision of it to compare with.")
    try:
        _bring_up_to_date(tree, change.pipeline, UNTIL_SCORES, runner)
    except GraftlineError as error:
        return Before(problem=f"The base revision could not be evaluated: {error}")
    return Before(_scores(tree, change.pipeline), _side(tree, change.pipeline))


def _tell_removal(tree: Path, pipeline: str) -> str:
    release = config.load(tree / config.DEFAULT_FILE).pipeline(pipeline).release
    return (
        f"This revision removes the pipeline {pipeline}. Its channel {release.channel} in {release.store} is still "
        "served, and nothing will retrain it. A person has to decide, and to take it out of service if that is meant."
    )


def _evaluate(tree: Path, change: Change, before: Before, runner: Runner) -> PipelineResult:
    found = PipelineResult(change, base=before.side, problem=before.problem)
    if change.removed:
        return found
    try:
        ran = _bring_up_to_date(tree, change.pipeline, UNTIL_VERDICT, runner)
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
    compared = None if before.scores is None else _compare(tree, change.pipeline, before.scores)
    if compared and all(gate.difference is None for gate in compared.gates):
        # Other rows or another template: the head's own verdict has to do.
        return replace(found, problem=f"Not comparable with the base revision: {compared.gates[0].reason}")
    return replace(found, comparison=compared)


def _bring_up_to_date(tree: Path, pipeline: str, until: tuple[str, ...], runner: Runner) -> tuple[str, ...]:
    runner.resolve(pipeline, tree)
    todo = [stage for stage in stages.outdated(pipeline, root=tree) if stage in until]
    return tuple(stage for stage in todo if runner.reproduce(stage, pipeline, tree))


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
    numbers = {name: value for name, value in evaluated.items() if isinstance(value, int | float)}
    return Side(numbers | trained, [point["loss"] for point in history])


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
