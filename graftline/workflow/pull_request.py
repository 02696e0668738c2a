"""Evaluate and compare two revisions of the repository: the work of `flows.evaluate_pr`, without Prefect.

In a worktree that shares the caches, every pipeline that differs is brought up to date at the base revision, then at
the head; earlier runs come from DVC's run cache.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.address import mask_secrets
from graftline.data.rows import read_rows
from graftline.digest import Digest, of_folder, of_json, write_json, write_text
from graftline.errors import GraftlineError
from graftline.evaluate.gate_rules import pipeline_rules, with_anchor
from graftline.evaluate.scores import CANDIDATE, OWN_ENGINE, Scores, read_scores, scores_digest, with_stand_ins
from graftline.evaluate.side_by_side import ShownRow, in_production, worst_first
from graftline.evaluate.verdict import GateResult, Verdict, combined_outcome, verdict_from_dict
from graftline.settings.gate_metrics import ANCHOR
from graftline.settings.model import Gate
from graftline.workflow import outcome, stages, worktree
from graftline.workflow.against_base import BASE_REVISION, compare, judge_shown
from graftline.workflow.changes import PipelineChange, find_changes
from graftline.workflow.comment import Answer, PipelineResult, RevisionFigures, render, worst
from graftline.workflow.deciding import DecidingSetting, find_settings, measured_settings, read_config
from graftline.workflow.git import commit_of, merge_base
from graftline.workflow.workspace import Workspace

FORMAT = 2
EXIT_CODES: dict[Answer, int] = {"pass": 0, "fail": 1, "inconclusive": 3, "needs a look": 3}
"""2 is an error. Servers show 3 as a neutral check."""
UNTIL_SCORES = stages.STAGES[: stages.STAGES.index("evaluate") + 1]
UNTIL_VERDICT = stages.STAGES[: stages.STAGES.index("gate") + 1]


@dataclass(frozen=True)
class StageRunner:
    """Pins a pipeline's moving inputs; brings a stage up to date, and returns whether it ran."""

    resolve: Callable[[str, Path], None]
    reproduce: Callable[[str, str, Path], bool]


@dataclass(frozen=True)
class BaseRevision:
    """The base revision's side of the comparison, or the ``problem`` with it.

    ``rules`` are its gates, which judge the head; ``made`` are digests of adapter and scores; ``shows_texts``
    says whether a comment may quote rows.
    """

    rules: Mapping[str, Gate] = field(default_factory=dict)
    scores: Scores | None = None
    made: Mapping[str, Digest] = field(default_factory=dict)
    side: RevisionFigures = field(default_factory=RevisionFigures)
    shows_texts: bool = True
    problem: str | None = None


def parser() -> argparse.ArgumentParser:
    """The command line of `flows.evaluate_pr`."""
    made = argparse.ArgumentParser(
        prog="python -m flows.evaluate_pr",
        description="Evaluate what a pull request changes.",
        epilog="exit codes: 0 pass, 1 fail, 2 error, 3 inconclusive or for a person to look at. "
        "Example: python -m flows.evaluate_pr --base origin/main --head HEAD --out pull-request",
    )
    made.add_argument("--base", required=True, help="revision to merge into; the merge base is compared with")
    made.add_argument("--head", default="HEAD", help="revision to evaluate (default HEAD)")
    made.add_argument("--out", type=Path, default=Path("pull-request"), help="folder for comment.md and result.json")
    made.add_argument("--link", help="address of the run, for the comment")
    return made


def evaluate_revisions(
    root: Path, base: str, head: str, *, out: Path, runner: StageRunner, link: str | None = None
) -> Answer:
    """Evaluate what ``head`` changes since its merge base with ``base``.

    Args:
        root: a checkout of the repository, which is not changed.
        base: revision to merge into.
        head: revision to evaluate.
        out: folder for ``comment.md`` and ``result.json``.
        runner: runs the stages.
        link: address of the run, for the comment.

    Raises:
        GraftlineError: a revision is unknown, the two have no commit in common, or a graph or a
            configuration cannot be read.
    """
    head_commit = commit_of(root, head)
    base_commit = merge_base(root, commit_of(root, base), head_commit)
    changes = find_changes(root, base_commit, head_commit)
    settings = find_settings(root, base_commit, head_commit)
    names = read_config(root, head_commit).names
    results = []
    if changes:
        with worktree.isolated(root, base_commit) as tree:
            before = [_score_base(tree, change, runner) for change in changes]
            worktree.switch(tree, head_commit)
            for change, old in zip(changes, before, strict=True):
                found = _gone(change, old) if change.removed else _evaluate(tree, change, old, runner)
                own = tuple(each for each in settings if each.pipeline == change.pipeline)
                results.append(replace(found, settings=own + found.settings))
    rendered = render(base_commit, head_commit, results, num_pipelines=len(names), link=link, settings=settings)
    write_text(out / "comment.md", rendered)
    write_json(out / "result.json", as_json(base_commit, head_commit, results, settings))
    return worst(results, settings)


def _gone(change: PipelineChange, before: BaseRevision) -> PipelineResult:
    return PipelineResult(change, problem=before.problem)


def _score_base(tree: Path, change: PipelineChange, runner: StageRunner) -> BaseRevision:
    """Scores of the base revision's candidate, or the problem with it, which is not the head's fault."""
    if change.removed:
        return BaseRevision(problem=_tell_removal(tree, change.pipeline))
    loaded = settings.load(tree / settings.DEFAULT_FILE)
    if change.pipeline not in loaded.names:
        return BaseRevision(
            problem="The pipeline is new: there is no base revision of it to compare with, and its gates are its own."
        )
    name, pipeline = change.pipeline, loaded.pipeline(change.pipeline)
    found = BaseRevision(pipeline_rules(pipeline), shows_texts=pipeline.package.show_texts)
    try:
        _bring_up_to_date(tree, name, UNTIL_SCORES, runner)
        # The stages of an older version may have written other files than are read here.
        scores = read_scores(_scores_file(tree, name))
        return replace(found, scores=scores, made=_made(tree, name), side=_side(tree, name))
    except Exception as error:  # noqa: BLE001  # any error is this pipeline's, the others are still evaluated
        return replace(found, problem=f"The base revision could not be evaluated: {_explain(error)}")


def _tell_removal(tree: Path, pipeline: str) -> str:
    release = settings.load(tree / settings.DEFAULT_FILE).pipeline(pipeline).release
    return (
        f"This revision removes the pipeline {pipeline}. Its channel {release.channel} in {release.store} is still "
        "served, and nothing will retrain it. A person has to decide, and to take it out of service if that is meant."
    )


def _evaluate(tree: Path, change: PipelineChange, before: BaseRevision, runner: StageRunner) -> PipelineResult:
    found = PipelineResult(change, base=before.side, problem=before.problem)
    try:
        return _evaluate_head(tree, found, before, _bring_up_to_date(tree, change.pipeline, UNTIL_VERDICT, runner))
    except Exception as error:  # noqa: BLE001  # as above
        return replace(found, problem=f"This revision could not be evaluated: {_explain(error)}")


def _explain(error: Exception) -> str:
    return str(error) if isinstance(error, GraftlineError) else outcome.error_in_one_line(error)


def _evaluate_head(tree: Path, found: PipelineResult, before: BaseRevision, ran: tuple[str, ...]) -> PipelineResult:
    name = found.change.pipeline
    gate = tree / "runs" / name / "gate"
    found = replace(
        found,
        stages_run=ran,
        head=_side(tree, name),
        verdict=verdict_from_dict(json.loads((gate / "verdict.json").read_text(encoding="utf-8"))),
        verdict_text=(gate / "verdict.md").read_text(encoding="utf-8"),
        worst_rows=_worst_rows(tree, name, before),
    )
    return _judge(tree, found, before) if before.rules else found


def _worst_rows(tree: Path, name: str, before: BaseRevision) -> tuple[ShownRow, ...]:
    """Texts are shown only where both revisions say so: a pull request cannot publish what was hidden."""
    pipeline, scores = settings.load(tree / settings.DEFAULT_FILE).pipeline(name), _scores(tree, name)
    references = in_production(scores) | ({BASE_REVISION: before.scores} if before.scores is not None else {})
    return tuple(
        worst_first(
            read_rows(tree / "runs" / name / "fetch" / "evaluation.jsonl"),
            scores[CANDIDATE],
            references,
            metric=pipeline.evaluate.metric,
            with_texts=pipeline.package.show_texts and before.shows_texts,
        )
    )


def _judge(tree: Path, found: PipelineResult, before: BaseRevision) -> PipelineResult:
    """Apply the base revision's gates to the head: against the base revision, and, if gates changed, as they were."""
    name = found.change.pipeline
    candidate = _candidate(tree, name)
    equal = bool(before.made) and before.made == _made(tree, name)
    clusters, slices = _clusters(tree, name), _slices(tree, name)
    comparison = compare(before.rules, candidate, before.scores, equal=equal, clusters=clusters, slices=slices)
    found = replace(found, comparison=comparison)
    if before.scores is not None:
        found = replace(found, settings=tuple(measured_settings(name, before.scores, candidate)))
    if not equal and before.rules != pipeline_rules(settings.load(tree / settings.DEFAULT_FILE).pipeline(name)):
        scores = _scores(tree, name)
        rules = with_anchor(before.rules) if ANCHOR in scores else before.rules
        gates = judge_shown(rules, candidate, with_stand_ins(scores), clusters=clusters, slices=slices)
        found = replace(found, former=Verdict(combined_outcome(gates), gates))
    return found


def _bring_up_to_date(tree: Path, pipeline: str, until: tuple[str, ...], runner: StageRunner) -> tuple[str, ...]:
    runner.resolve(pipeline, tree)
    todo = [stage for stage in stages.outdated(pipeline, root=tree) if stage in until]
    return tuple(stage for stage in todo if runner.reproduce(stage, pipeline, tree))


def _scores_file(tree: Path, pipeline: str) -> Path:
    """The candidate's scores by our own code, so that two revisions are always compared on one engine."""
    folder = tree / "runs" / pipeline / "evaluate" / "scores"
    own = folder / f"{OWN_ENGINE}.jsonl"
    return own if own.is_file() else folder / f"{CANDIDATE}.jsonl"


def _clusters(tree: Path, pipeline: str) -> dict[str, str]:
    if not (tree / "runs" / pipeline / "fetch" / "clusters.json").is_file():
        return {}
    # As in `_candidate`: it takes torch along.
    from graftline.workflow.judging import read_clusters

    return read_clusters(tree / "runs" / pipeline / "fetch")


def _slices(tree: Path, pipeline: str) -> dict[str, dict[str, str]]:
    if not (tree / "runs" / pipeline / "fetch" / "slices.json").is_file():
        return {}
    from graftline.workflow.judging import read_slices  # as above

    return read_slices(tree / "runs" / pipeline / "fetch")


def _candidate(tree: Path, pipeline: str) -> Scores:
    """The candidate as the head's gates saw it: its scores with the merged model's numbers."""
    scores = read_scores(_scores_file(tree, pipeline))
    if not (tree / "runs" / pipeline / "merge" / "parity.json").is_file():
        return scores
    # It imports torch, which takes seconds that a change of documentation should not cost.
    from graftline.workflow.judging import merged_numbers

    return replace(scores, numbers={**scores.numbers, **merged_numbers(Workspace(tree, pipeline))})


def _scores(tree: Path, pipeline: str) -> dict[str, Scores]:
    return {path.stem: read_scores(path) for path in _scores_file(tree, pipeline).parent.glob("*.jsonl")}


def _made(tree: Path, pipeline: str) -> dict[str, Digest]:
    """Digests of adapter and scores, without the training run's name, which differs between equal results."""
    folder = tree / "runs" / pipeline / "train" / "adapter"
    made = {f"adapter/{path}": digest for path, digest in of_folder(folder).items() if path != _IDENTITY}
    if (folder / _IDENTITY).is_file():
        identity = json.loads((folder / _IDENTITY).read_text(encoding="utf-8"))
        made[f"adapter/{_IDENTITY}"] = of_json({**identity, "training_run": None})
    scores = read_scores(_scores_file(tree, pipeline))
    scored = scores.scored and replace(scores.scored, adapter=None)
    return made | {"scores": scores_digest(replace(scores, scored=scored))}


_IDENTITY = "graftline.json"
"""An adapter's identity, as in `graftline.adapters.peft_config`, which imports torch."""


def _side(tree: Path, pipeline: str) -> RevisionFigures:
    runs = tree / "runs" / pipeline
    evaluated = json.loads((runs / "evaluate" / "metrics.json").read_text(encoding="utf-8"))["candidate"]
    history = json.loads((runs / "train" / "history.json").read_text(encoding="utf-8"))
    trained = json.loads((runs / "train" / "metrics.json").read_text(encoding="utf-8"))
    numbers = {name: value for name, value in evaluated.items() if isinstance(value, int | float)}
    return RevisionFigures(numbers | trained, [point["loss"] for point in history])


def as_json(base: str, head: str, results: list[PipelineResult], settings: list[DecidingSetting]) -> dict[str, Any]:
    """The findings as a JSON value, without secrets; the arguments are those of `render`."""
    pipelines = [
        {
            "pipeline": result.change.pipeline,
            "outcome": result.outcome,
            "reasons": [mask_secrets(reason) for reason in result.change.reasons],
            "stages_run": list(result.stages_run),
            "problem": result.problem and mask_secrets(result.problem),
            "comparison": None if result.comparison is None else _gates(result.compared),
            "former": None if result.former is None else _gates(result.former.gates),
        }
        for result in results
    ]
    all_settings = dict.fromkeys([*settings, *(each for result in results for each in result.settings)])
    return {
        "format": FORMAT,
        "base": base,
        "head": head,
        "outcome": worst(results, settings),
        "settings": [asdict(each) for each in all_settings],
        "pipelines": pipelines,
    }


def _gates(gates: Sequence[GateResult]) -> list[dict[str, Any]]:
    return [{**asdict(gate), "reason": mask_secrets(gate.reason)} for gate in gates]
