"""Checks of the project: its pipelines, their gates, their stores and their channels."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from graftline import settings
from graftline.address import store_address
from graftline.data.sources import default_cache
from graftline.doctor.machine import Finding, existing_above
from graftline.errors import GraftlineError, HistoryLostError, StoreError
from graftline.evaluate.comparisons import POWER_TESTS, gate_power, weakness
from graftline.evaluate.gate_rules import METRICS as BY_ITEM
from graftline.evaluate.statistics.error_rates import ASSUMED_DISCORDANT_SHARE, Power
from graftline.evaluate.verdict import GateResult, verdict_from_dict
from graftline.plain_text import count
from graftline.registry import channel, releases
from graftline.registry.reserve import MANY_LOOKS, all_looks, looks_in_words
from graftline.registry.store import Store, folder_of, open_store
from graftline.registry.trust import judged_head, open_trust
from graftline.registry.webhooks import read_secrets, shown_address
from graftline.settings import Gate, Pipeline
from graftline.settings.gate_metrics import MANY, METRICS
from graftline.settings.webhooks import Webhook


def look_at_channels(root: Path) -> Iterator[Finding]:
    """The newest entry of every channel that a pipeline's store has, or had when this machine last looked."""
    try:
        loaded = settings.load(root / settings.DEFAULT_FILE)
    except GraftlineError:
        return  # reported by look_at_project
    for pipeline in loaded.names:
        yield from _channels(loaded, pipeline, default_cache(root) / "seen")


def _channels(loaded: settings.Config, pipeline: str, seen: Path) -> Iterator[Finding]:
    try:
        store = open_store(loaded.store_url(pipeline), seen=seen)
        names = channel.names(store, pipeline)
    except StoreError:
        return  # reported by look_at_project
    try:
        trust = open_trust(loaded.root, loaded.channels) if names else None
    except GraftlineError as error:
        yield Finding(f"channels of {pipeline}", "missing", str(error), "docs/security.md")
        trust = None
    for name in names:
        try:
            head, _ = judged_head(store, pipeline, name, trust)
        except HistoryLostError as error:
            yield Finding(
                f"channel {pipeline}@{name}", "missing", str(error), "docs/runbooks.md, restore a lost channel"
            )
        except GraftlineError as error:
            yield Finding(f"channel {pipeline}@{name}", "missing", str(error), "graftline history says more")
        else:
            found = f"{head.change.version}, entry {head.number}" if head else "empty"
            yield Finding(f"channel {pipeline}@{name}", "ok", found)
            yield from _looks(store, pipeline, name)
    with contextlib.suppress(StoreError):  # roles from before there were looks may not list them
        for rows, number in all_looks(store, pipeline).items():
            name, told = f"reserve {pipeline}", looks_in_words(rows, number)
            advice = "judge by newer rows (data.split: newest), or bring new ones (docs/promotion.md, a reserve)"
            yield Finding(name, "note", told, advice) if number >= MANY_LOOKS else Finding(name, "ok", told)


MOST_LOOKS = MANY_LOOKS
"""Number of promotions by the same rows from which on the doctor reports it (docs/promotion.md says why)."""
_COUNTED = 50


def _looks(store: Store, pipeline: str, name: str) -> Iterator[Finding]:
    """A note where the same rows have chosen a channel's newest releases again and again."""
    rows, chosen = None, set[str]()
    for entry in islice(channel.backwards(store, pipeline, name), _COUNTED):
        try:
            judged = releases.load_manifest(store, pipeline, entry.change.version).judged
        except GraftlineError:
            break  # removed, or reported by `graftline verify`
        if judged is None or rows not in (None, judged.rows):
            break
        rows = judged.rows
        chosen.add(entry.change.version)
    if rows and len(chosen) >= MOST_LOOKS:
        least = "at least " if len(chosen) == _COUNTED else ""
        yield Finding(
            f"rows {pipeline}@{name}",
            "note",
            f"the same evaluation rows ({rows.short}) have let in the newest {least}{len(chosen)} releases: rows that "
            "are looked at again and again show more than there is",
            "judge by newer rows (data.split: newest) or by others (docs/promotion.md, a hundred nights)",
        )


_ADVICE = "change the margin or data.evaluation_rows (docs/gates.md)"


def look_at_gates(name: str, pipeline: Pipeline, verdict: Path) -> Iterator[Finding]:
    """Whether each gate would let a candidate pass that is as good as production.

    ``verdict`` is that of the last run, if there was one; its figures are used for gates that have not changed.
    """
    last = _last_results(verdict)
    for gate_name, gate in pipeline.gates.items():
        if gate.test in POWER_TESTS:
            yield _look(f"gate {name}/{gate_name}", gate, pipeline, last.get(gate_name))


def _look(name: str, gate: Gate, pipeline: Pipeline, last: GateResult | None) -> Finding:
    num_items_of = METRICS[gate.metric].num_items
    num_items = num_items_of(pipeline) if num_items_of else 0
    if last is not None and _asks_the_same(gate, last) and last.power is not None and last.num_items <= num_items:
        power, num_items = Power(last.power, last.power_margin, last.power_items), last.num_items
        source = "by the last run"
    elif BY_ITEM[gate.metric].kind == "rate" and num_items < MANY:
        share = ASSUMED_DISCORDANT_SHARE
        power = gate_power("rate", gate.test, gate.margin, num_items, spread=share, alpha=gate.alpha)
        source = f"if it answers {share:.0%} of the items differently"
    else:
        return Finding(
            name, "ok", f"how often an equal candidate passes is known after a run, which shows {_unknown(gate.metric)}"
        )
    weak = weakness(power, gate.margin, num_items)
    if weak is None:
        return Finding(name, "ok", f"an equal candidate passes {power.value:.0%} of the time, {source}")
    return Finding(name, "note", f"{weak} ({source})", _ADVICE)


def _unknown(metric: str) -> str:
    if BY_ITEM[metric].kind == "mean":
        return f"how much {metric} differs from item to item"
    return f"how many items {metric} has"


def _asks_the_same(gate: Gate, last: GateResult) -> bool:
    """Whether a result is of this gate as it is now."""
    asked = (gate.metric, gate.test, gate.margin, gate.alpha, gate.against)
    return asked == (last.metric, last.test, last.margin, last.alpha, last.against)


def _last_results(path: Path) -> dict[str, GateResult]:
    try:
        verdict = verdict_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, GraftlineError):  # none yet, or of another version
        return {}
    return {result.name: result for result in verdict.gates}


def look_at_project(root: Path) -> Iterator[Finding]:
    """Whether pipelines.yaml can be read, its gates can be passed, and its stores can be used."""
    try:
        loaded = settings.load(root / settings.DEFAULT_FILE)
    except GraftlineError as error:
        yield Finding(
            "pipelines", "missing", str(error), "run in the project's folder, or make one: graftline init NAME"
        )
        return
    yield Finding("pipelines", "ok", ", ".join(loaded.names))
    for name in loaded.names:
        yield from look_at_gates(name, loaded.pipeline(name), root / "runs" / name / "gate" / "verdict.json")
    for store in dict.fromkeys(loaded.pipeline(name).release.store for name in loaded.names):
        yield _store(root, store)
    for name, policy in loaded.channels.items():
        for webhook in policy.webhooks:
            yield _secret(name, webhook)


def _store(root: Path, store: str) -> Finding:
    name = f"store {store}"
    if store.startswith("s3://"):
        return _try(name, lambda: _read_s3(store), "check AWS_ENDPOINT_URL, credentials and the bucket")
    advice = "make the folder writable, or change release.store"
    return _try(name, lambda: _write_below(folder_of(store_address(store, root))), advice)


def _secret(channel_name: str, webhook: Webhook) -> Finding:
    """Whether the secret that signs a receiver's messages is there; its value is never shown."""
    name, advice = f"webhook {shown_address(webhook)} of channel {channel_name}", "docs/promotion.md, Tell others"
    if not os.environ.get(webhook.secret, "").strip():
        # As with the signing key: a machine that only trains needs none.
        return Finding(name, "note", f"{webhook.secret} is not set: a promotion from here tells it nothing", advice)
    return _try(name, lambda: f"{count(len(read_secrets(webhook.secret)), 'secret')} in {webhook.secret}", advice)


def _try(name: str, look: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding(name, "ok", look())
    except (OSError, GraftlineError) as error:
        return Finding(name, "missing", str(error), advice)


def _write_below(folder: Path) -> str:
    with tempfile.TemporaryFile(dir=existing_above(folder)):
        return f"{folder} is writable"


def _read_s3(store: str) -> str:
    versions = sum(1 for _ in open_store(store).list("releases"))
    return f"{count(versions, 'object')} below releases/"
