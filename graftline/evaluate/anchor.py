"""The anchor: a pinned release that candidates must be as good as, whatever production has become since.

A gate against production lets each night lose up to its margin, and the losses add up. So a candidate must also be
shown not to be worse than the anchor (`graftline.settings.gate_metrics.anchor_gates`), which moves only to a candidate
that is shown to be better. The channel's log records when it moves (`graftline.registry.channel`).
"""

from collections.abc import Mapping

from graftline.errors import EvaluationError
from graftline.evaluate.comparisons import Comparison
from graftline.evaluate.gate_rules import NO_SLICES, Slices, spec_of
from graftline.evaluate.gates import MIN_CLUSTERS, NO_CLUSTERS, Clusters, compare_scores, doubt
from graftline.evaluate.scores import Scores
from graftline.evaluate.verdict import AnchorResult
from graftline.settings.gate_metrics import ANCHOR
from graftline.settings.model import Gate

MOVE_ALPHA = 0.01
"""Chance, each night, of moving the anchor to a candidate that is not better: a fifth of a gate's usual alpha, because
there are many nights and a wrong move lasts."""


def compare_with_anchor(
    rules: Mapping[str, Gate],
    candidate: Scores,
    anchor: Scores,
    *,
    clusters: Clusters = NO_CLUSTERS,
    slices: Slices = NO_SLICES,
) -> AnchorResult | None:
    """Whether a candidate is shown to be better than the anchor, so that a promotion moves the anchor to it.

    It must be shown better on one metric of the gates against the anchor (superiority, margin 0, `MOVE_ALPHA` divided
    by the number of metrics; a metric on a slice is one by itself), and be observed worse on none of them.

    Args:
        rules: all rules of the verdict.
        candidate: its scores.
        anchor: the anchor's scores, which name its release.
        clusters: as for `gates.judge`.
        slices: as for `gates.judge`.

    Returns:
        None if no gate compares with the anchor, or the scores are not a release's.
    """
    against = [rule for rule in rules.values() if rule.against == ANCHOR and rule.test != "limit"]
    if not against or anchor.scored is None or anchor.scored.release is None:
        return None
    # A measured number, such as latency, is compared by its gate; it shows nobody to be better.
    asked = {rule.about: rule for rule in against if spec_of(candidate, rule.metric)}
    alpha = MOVE_ALPHA / max(1, len(asked))
    found = {
        about: _compare(rule.replace(test="superiority", margin=0.0, alpha=alpha), candidate, anchor, clusters, slices)
        for about, rule in asked.items()
    }
    shown = [
        about
        for about, each in found.items()
        if each and each.p_holds <= alpha and _suffices(asked[about], each) and not doubt(asked[about], candidate)
    ]
    worse = [about for about, each in found.items() if each is None or asked[about].sign * each.difference < 0]
    release = anchor.scored.release
    return AnchorResult(
        version=release.version,
        release=release.digest,
        is_better=bool(shown) and not worse,
        evidence="; ".join(_in_words(about, each, alpha) for about, each in found.items()) or _NO_ITEMS,
    )


_NO_ITEMS = "no gate on items compares with it, so it stays"


def _compare(rule: Gate, candidate: Scores, anchor: Scores, clusters: Clusters, slices: Slices) -> Comparison | None:
    try:
        return compare_scores(rule, candidate, {ANCHOR: anchor}, clusters, slices)
    except EvaluationError:  # the gate itself fails and says why
        return None


def _suffices(rule: Gate, found: Comparison) -> bool:
    """Whether there are enough items, and enough clusters, for the gate to decide."""
    return found.num_items >= rule.min_items and (found.num_clusters is None or found.num_clusters >= MIN_CLUSTERS)


def _in_words(about: str, found: Comparison | None, alpha: float) -> str:
    if found is None:
        return f"{about} could not be compared"
    return (
        f"{about} {found.difference:+.4g} on {found.num_items} items, p of not better {found.p_holds:.2g}, asked: at "
        f"most {alpha:.2g}"
    )
