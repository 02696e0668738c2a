"""Whatever the study prefers, the starter is a right file that says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline.plan.evidence import Evidence
from graftline.scaffold.starter import starter
from graftline.settings import parse_config


@pytest.mark.parametrize(
    ("adapter", "bits"),
    [
        ({"method": "full"}, 16),
        ({"method": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}, 3),
        ({"method": "pissa", "rank": 16, "alpha": 16}, 4),
        ({"method": "vera", "rank": 256}, 16),
    ],
)
def test_the_starter_has_the_first_arm(adapter: dict[str, Any], bits: int) -> None:
    arm = {"name": "first", "adapter": adapter, "bits": bits, "learning_rate": 2e-05, "learning_rates_tried": []}
    document = {"format": 1, "page": "docs/evidence.md", "arms": [{**arm, "found": "good,\nwith $5", "claims": [3]}]}
    evidence = Evidence.model_validate_json(json.dumps(document))
    written = starter(evidence)
    loaded = parse_config(written.encode(), Path("pipelines.yaml")).pipeline("my-task")
    assert loaded.adapter.model_dump(exclude_unset=True) == evidence.arms[0].sections()["adapter"]
    assert loaded.quantize.model_dump(exclude_unset=True) == evidence.arms[0].sections()["quantize"]
    assert loaded.train.learning_rate == 2e-05
    assert "first: good, with $5." in written
    assert "docs/evidence.md#claim-3" in written
