"""A report with every part, with the shapes of a real run."""

import math
from datetime import UTC, datetime

from graftline.digest import of_bytes
from graftline.evaluate.side_by_side import ShownAnswer, ShownRow
from graftline.release.pages.report import (
    Confusion,
    Gate,
    LayerError,
    LossPoint,
    MemoryPart,
    MetricRow,
    ReportData,
    StageCost,
)

LABELS = ("animal", "plant", "a <b>label</b> & more")
FULL = ReportData(
    pipeline="wordnet-category",
    created=datetime(2026, 11, 24, 6, 18, tzinfo=UTC),
    outcome="inconclusive",
    reasons=("accuracy rose by 0.393 (0.330 to 0.453)", "stop rate: the interval crosses the limit"),
    facts=(("base", "SmolLM2-135M-Instruct, NF4"), ("method", "LoRA, rank 8")),
    gates=(
        Gate(
            name="task",
            metric="accuracy",
            better="higher",
            candidate=0.84,
            reference=0.447,
            difference=0.393,
            low=0.33,
            high=0.453,
            threshold=-0.02,
            outcome="pass",
            num_items=300,
            detectable=0.061,
        ),
        Gate(
            name="forgetting",
            metric="NLL",
            better="lower",
            candidate=3.3,
            reference=3.2,
            difference=0.1,
            low=0.06,
            high=0.14,
            threshold=0.05,
            outcome="fail",
            num_items=400,
        ),
        Gate(
            name="stop rate",
            metric="stopped",
            better="higher",
            candidate=0.99,
            reference=1.0,
            difference=-0.01,
            low=-0.035,
            high=0.0,
            threshold=-0.02,
            outcome="inconclusive",
            num_items=300,
        ),
    ),
    metrics=(MetricRow(name="accuracy", base=0.447, production=None, candidate=0.84, low=0.797, high=0.88),),
    loss=tuple(
        LossPoint(step=step, training=0.35 + 2.6 * math.exp(-step / 14), evaluation=0.5 if step % 20 == 0 else None)
        for step in range(1, 85)
    ),
    confusion=Confusion(labels=LABELS, counts=((24, 1, 0), (2, 22, 1), (0, 0, 0))),
    worst_rows=(
        ShownRow(
            3,
            "a\nprompt <i>",
            "plant",
            {"production": ShownAnswer("plant", 1.0), "candidate": ShownAnswer("animal", 0)},
        ),
        ShownRow(9, "another", "plant", {"production": None, "candidate": ShownAnswer("animal", 0.0)}),
    ),
    layer_errors=tuple(
        LayerError(name=f"model.layers.{block}.{kind}", relative_error=0.09 + 0.001 * block)
        for block in range(3)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ),
    stages=(
        StageCost(name="train", seconds=251.4, peak_bytes=2_100_000_000),
        StageCost(name="gate", seconds=1.4, peak_bytes=210_000_000),
    ),
    memory=(
        MemoryPart(name="activations", low_bytes=400_000_000, expected_bytes=620_000_000, high_bytes=900_000_000),
        MemoryPart(
            name="peak",
            low_bytes=900_000_000,
            expected_bytes=1_200_000_000,
            high_bytes=1_700_000_000,
            measured_bytes=1_340_000_000,
        ),
    ),
    lineage=(("base", str(of_bytes(b"base"))), ("code", "0123abc")),
)
EMPTY = ReportData(pipeline="demo", created=FULL.created, outcome=None)
