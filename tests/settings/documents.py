"""A small right document, and documents that differ from it in a few places."""

import copy
import json
from pathlib import Path
from typing import Any

from graftline.settings import Config, parse_config


class _Remove:
    """Says so, because the name of a test must be the same in every process."""

    def __repr__(self) -> str:
        return "REMOVE"


REMOVE = _Remove()
"""As a value: take the key away."""

RIGHT: dict[str, Any] = {
    "pipelines": {
        "demo": {
            "base": {"source": "path:base", "template": "none"},
            "data": {
                "source": "path:rows.jsonl",
                "evaluation_rows": 200,
                "max_tokens": 64,
                "labels": ["cat", "dog"],
            },
            "quantize": {"method": "none"},
            "adapter": {"method": "lora", "rank": 8},
            "train": {"steps": 10, "batch_size": 4, "learning_rate": 0.001},
            "evaluate": {"metric": "accuracy"},
            "gates": {
                "better": {
                    "metric": "accuracy",
                    "direction": "higher",
                    "test": "non-inferiority",
                    "margin": 0.02,
                    "against": "base",
                }
            },
            "package": {"merged": True},
            "release": {"store": "store", "channel": "production"},
        }
    },
    "channels": {"staging": {}, "production": {"verdicts": ["pass"]}},
}


def changed(**changes: Any) -> bytes:
    """The right document with other values at dotted paths; ``demo.`` paths start inside the pipeline.

    A part of the path that has dots itself cannot be written; nothing here needs one.
    """
    document = copy.deepcopy(RIGHT)
    for path, value in changes.items():
        parts = path.split(".")
        if parts[0] == "demo":
            parts.insert(0, "pipelines")
        place = document
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        if value is REMOVE:
            del place[parts[-1]]
        else:
            place[parts[-1]] = value
    return json.dumps(document, indent=1).encode()


def read(data: bytes) -> Config:
    """Parse bytes as if they were pipelines.yaml."""
    return parse_config(data, Path("pipelines.yaml"))
