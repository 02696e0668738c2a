"""A promotion's look at the reserve: release, production and anchor scored on rows that no run has looked at."""

from collections.abc import Callable
from pathlib import Path

from graftline import settings
from graftline.address import store_address
from graftline.data.preparation import RESERVE
from graftline.digest import Digest
from graftline.errors import PromotionError
from graftline.evaluate.gate_rules import GuardRule, pipeline_rules, with_anchor
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import CANDIDATE, with_stand_ins
from graftline.evaluate.verdict import GateResult, Outcome
from graftline.plain_text import count
from graftline.registry.policy import PromotionFacts
from graftline.release.manifest import read_manifest
from graftline.settings.gate_metrics import ALWAYS_SCORED, ANCHOR, PRODUCTION, UNQUANTIZED, is_of_rows
from graftline.settings.model import Gate
from graftline.workflow.judging import read_clusters, read_slices
from graftline.workflow.scoring import Source, release_source, score_sources
from graftline.workflow.workspace import Workspace


def prepare_look(
    pipeline: settings.Pipeline,
    at: Workspace,
    folder: Path,
    case: PromotionFacts,
    *,
    find_base: Callable[[Digest], Path],
) -> Callable[[], tuple[Outcome, str]]:
    """The look at a release's reserve: what the pipeline's gates say, each at its own alpha, and why.

    All models that it takes are here when this returns, and nothing has been scored. Those gates and guards judge that
    are about rows or answers, against what production and the anchor are now.

    Args:
        pipeline: its settings, by the project of whoever promotes.
        at: its places; models' scores are kept in the cache.
        folder: the release's files.
        case: what it is compared with.
        find_base: the folder of a base, by its digest.

    Raises:
        PromotionError: no gate is about rows, or a base is not on this machine.
        ReleaseError, StoreError: a release that it is compared with cannot be fetched.
    """
    rows, rules = folder / RESERVE, reserve_rules(pipeline, anchored=case.anchor is not None)
    sources = _sources(pipeline, at, folder, case, rules, find_base)

    def look() -> tuple[Outcome, str]:
        return _judge(pipeline, at, rows, sources, rules)

    return look


def _judge(
    pipeline: settings.Pipeline, at: Workspace, rows: Path, sources: dict[str, Source], rules: dict[str, Gate]
) -> tuple[Outcome, str]:
    # Only what the rows are asked: neither general text and tasks nor times.
    asked = pipeline.evaluate.replace(forgetting=None, harness=None, references=(), latency_tokens=None, miub_rows=None)
    scores = score_sources(pipeline.replace(evaluate=asked), at, sources, rows=rows)
    references = with_stand_ins(scores)
    candidate = references.pop(CANDIDATE)
    verdict = judge(rules, candidate, references, clusters=read_clusters(rows), slices=read_slices(rows))
    told = [gate for gate in verdict.gates if gate.guard is None or gate.outcome != "pass"]
    return verdict.outcome, "; ".join([count(len(candidate.items), "row"), *map(_in_words, told)])


def reserve_rules(pipeline: settings.Pipeline, *, anchored: bool) -> dict[str, Gate]:
    """The pipeline's gates and guards that rows of the reserve can be judged by.

    Raises:
        PromotionError: there are guards at most, which show no release to be as good as another.
    """
    every = pipeline_rules(pipeline)
    rules = {
        name: rule for name, rule in (with_anchor(every) if anchored else every).items() if is_of_rows(rule, pipeline)
    }
    if all(isinstance(rule, GuardRule) for rule in rules.values()):
        raise PromotionError(
            f"no gate of the pipeline is about rows or answers, so its reserve shows nothing; add one on "
            f"{pipeline.evaluate.metric}, or take `reserve` out of the channel's policy"
        )
    return rules


def _sources(
    pipeline: settings.Pipeline,
    at: Workspace,
    folder: Path,
    case: PromotionFacts,
    rules: dict[str, Gate],
    find_base: Callable[[Digest], Path],
) -> dict[str, Source]:
    made_from = read_manifest(folder).lineage
    trained = find_base(made_from.base_digest)
    original = find_base(made_from.source_digest) if made_from.source_digest else trained
    store = store_address(pipeline.release.store, at.root)

    def released(version: str, digest: Digest | None = None) -> Source:
        place = at.cache / "releases" / at.name / version
        return release_source(store, at.name, version, place, digest=digest, bases=(trained, original))

    sources = {"base": Source(original), CANDIDATE: Source(trained, folder / "adapter")}
    if case.reference_release:
        sources[PRODUCTION] = released(case.reference, case.reference_release)
    if case.anchor:
        sources[ANCHOR] = released(case.anchor.version, case.anchor.release)
    for name in {rule.against for rule in rules.values() if rule.against} - {*ALWAYS_SCORED}:
        sources[name] = Source(original, folder / "adapter", owns_base=False) if name == UNQUANTIZED else released(name)
    return sources


def _in_words(gate: GateResult) -> str:
    return f"{gate.name}: {gate.outcome}, {gate.line}"
