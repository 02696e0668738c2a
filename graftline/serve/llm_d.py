"""A channel with its shares as a manifest of llm-d (Gateway API Inference Extension): an InferenceModelRewrite.

The platform then moves the name: ``pipeline@channel`` is rewritten to immutable names by weight. The manifest is a
snapshot of the channel; apply a new one after every entry. It has not been applied to a cluster here.
"""

import re
from typing import Any

from graftline.registry.channel import Entry
from graftline.serve.follower import ChannelRef

API_VERSION = "inference.networking.x-k8s.io/v1alpha2"


def model_rewrite(one: ChannelRef, entry: Entry, *, pool: str) -> dict[str, Any]:
    """The manifest of a channel's entry, for the InferencePool ``pool``."""
    step = entry.change.rollout
    targets = [{"modelRewrite": f"{one.pipeline}@{entry.change.version}", "weight": 100 - (step.share if step else 0)}]
    if step:
        targets.append({"modelRewrite": f"{one.pipeline}@{step.version}", "weight": step.share})
    return {
        "apiVersion": API_VERSION,
        "kind": "InferenceModelRewrite",
        "metadata": {
            "name": re.sub(r"[^a-z0-9-]", "-", f"{one.pipeline}-{one.channel}".lower())[:63].strip("-"),
            "annotations": {"graftline/entry": str(entry.number)},
        },
        "spec": {
            "poolRef": {"name": pool},
            "rules": [{"matches": [{"model": {"type": "Exact", "value": one.name}}], "targets": targets}],
        },
    }
