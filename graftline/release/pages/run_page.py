"""The content of a run's page, gathered from the stages' outputs: a folder ``runs`` with one folder a stage."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from graftline.data.preparation import EVALUATION
from graftline.data.rows import read_rows
from graftline.digest import Digest
from graftline.errors import EvaluationError
from graftline.evaluate.engine_difference import compare_engines
from graftline.evaluate.gate_rules import METRICS, sample, spec_of
from graftline.evaluate.metrics import confusion
from graftline.evaluate.scores import CANDIDATE, OWN_ENGINE, Scores, against, read_scores
from graftline.evaluate.side_by_side import in_production, worst_first
from graftline.evaluate.statistics.intervals import bootstrap_ratio
from graftline.evaluate.statistics.proportions import wilson_interval
from graftline.evaluate.verdict import verdict_from_dict
from graftline.plain_text import count
from graftline.release.manifest import Lineage
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
from graftline.settings.data import Data
from graftline.settings.gate_metrics import ANCHOR
from graftline.settings.machines import Prices
from graftline.settings.model import Adapter, Pipeline, Quantize
from graftline.train.devices import STEP_PARTS
from graftline.weights.quant.report import REPORT_FILE

_STAGES = ("fetch", "validate", "init", "train", "evaluate", "merge", "gate")


def collect(name: str, pipeline: Pipeline, runs: Path, *, created: datetime, lineage: Lineage) -> ReportData:
    """The content of the page; ``created`` is when the package was made."""
    verdict = _read(runs, "gate", "verdict.json")
    scores = {path.stem: read_scores(path) for path in (runs / "evaluate" / "scores").glob("*.jsonl")}
    return ReportData(
        pipeline=name,
        created=created,
        outcome=verdict["outcome"],
        reasons=(*notes(runs), *(f"{gate['name']}: {gate['reason']}" for gate in verdict["gates"])),
        facts=(
            *_facts(runs, pipeline.adapter, pipeline.quantize, scores),
            ("figures from", judged_by(pipeline.data, runs)),
        ),
        gates=tuple(_gate(gate) for gate in verdict["gates"] if gate["interval"] is not None),
        metrics=_metric_rows(runs, scores[CANDIDATE]),
        slices=verdict_from_dict(verdict).slices,
        loss=tuple(
            LossPoint(step=point["step"], training=point["loss"], evaluation=point.get("held_out_loss"))
            for point in _read(runs, "train", "history.json")
        ),
        confusion=_confusion(scores[CANDIDATE]),
        sample=_sample(runs) if pipeline.package.show_texts else (),
        worst_rows=tuple(
            worst_first(
                read_rows(runs / "fetch" / EVALUATION),
                scores[CANDIDATE],
                in_production(scores),
                metric=pipeline.evaluate.metric,
                with_texts=pipeline.package.show_texts,
            )
        ),
        engine=compare_engines(
            scores[OWN_ENGINE],
            scores[CANDIDATE],
            read_rows(runs / "fetch" / EVALUATION),
            with_texts=pipeline.package.show_texts,
        )
        if OWN_ENGINE in scores
        else None,
        layer_errors=_layer_errors(runs),
        stages=tuple(_stage(runs, name) for name in _STAGES),
        memory=memory_parts(_read(runs, "train", "memory.json")),
        lineage=tuple((name, str(value)) for name, value in lineage if isinstance(value, Digest | str)),
    )


def _sample(runs: Path) -> tuple[tuple[str, bool], ...]:
    """The first training row as validation saw it; empty for a run from before it was kept."""
    return tuple((text, learned) for text, learned in _read(runs, "validate", "report.json").get("sample_parts", ()))


def notes(runs: Path) -> tuple[str, ...]:
    """What the verdict says beside its gates, such as why no merged model ships."""
    return tuple(_read(runs, "gate", "verdict.json").get("notes", ()))


def sources(runs: Path) -> dict[str, Any]:
    """Where base and rows came from: address, digest and script, as the fetch stage recorded them."""
    return {"base": _read(runs, "fetch", "base.json"), "data": _read(runs, "fetch", "data.json")["source"]}


def judged_by(data: Data, runs: Path) -> str:
    """Which rows the figures come from and whether they chose the release, in a sentence."""
    origin = "the newest of the source" if data.split == "newest" else "drawn from the source"
    if data.evaluation:
        origin = (
            "a file that only evaluates" if data.evaluation_rows == 0 else f"{origin}, and a file that only evaluates"
        )
    gates = _read(runs, "gate", "verdict.json")["gates"]
    chose = sorted(
        {
            gate["metric"]
            for gate in gates
            if gate["num_items"] and not gate["guard"] and gate["metric"] not in _OF_OTHERS
        }
    )
    rows = f"{count(count_rows(runs)['evaluation'], 'evaluation row')} ({origin})"
    kept = data.reserve_rows
    reserve = f"; none comes from the {count(kept, 'row')} that only promotions look at" if kept else ""
    if not chose:
        return f"{rows}; no gate asked them, so they did not choose this release{reserve}"
    return (
        f"{rows}; the gates on {', '.join(chose)} chose this release by them, so its figures are slightly too high "
        f"if it passed narrowly; newer rows would show its true quality{reserve}"
    )


_OF_OTHERS = {name for name, metric in METRICS.items() if metric.section not in ("items", "answers")}
"""Metrics of rows other than the evaluation's."""


def method(adapter: Adapter) -> str:
    """The adapter's method in words."""
    return adapter.method if adapter.method == "full" else f"{adapter.method}, rank {adapter.rank}"


def count_rows(runs: Path) -> dict[str, int]:
    """Rows to train on and to evaluate with."""
    folder = runs / "fetch"
    return {name: len((folder / f"{name}.jsonl").read_bytes().splitlines()) for name in ("train", "evaluation")}


def memory_parts(document: Mapping[str, Any]) -> tuple[MemoryPart, ...]:
    """The planned and the measured memory of training by part; of a step's parts only the sum is measured."""
    measured = document["measured_parts_bytes"] | {"total": document["measured_peak_bytes"]}
    planned = {part["name"]: part for part in document["planned"]["parts"]}
    step = [planned[name] for name in STEP_PARTS if name in planned]
    total = planned.pop("total")
    sums = {key: sum(part[key] for part in step) for key in step[0] if key.endswith("_bytes")}
    return tuple(
        MemoryPart(
            name="a step's in all" if part["name"] == "step" else part["name"],
            low_bytes=part["low_bytes"],
            expected_bytes=part["expected_bytes"],
            high_bytes=part["high_bytes"],
            measured_bytes=measured.get(part["name"]),
        )
        for part in (*planned.values(), {"name": "step", **sums}, total)
        if part["high_bytes"]
    )


def stage_cost(runs: Path, name: str) -> dict[str, Any]:
    """Seconds and peak memory that a stage measured for itself."""
    cost: dict[str, Any] = _read(runs, name, "stage.json")
    return cost


def money(prices: Prices | None, runs: Path) -> str:
    """What the stages up to the package cost, in a sentence for the model card; empty without prices.

    Hours are those in which a stage had a GPU for itself, whether it kept it busy or not.
    """
    if prices is None:
        return ""
    costs = [stage_cost(runs, name) for name in _STAGES]
    parts, total = [], 0.0
    if prices.gpu_hour is not None:
        hours = sum(cost["seconds"] * cost.get("gpus", 0) for cost in costs) / 3600
        total += hours * prices.gpu_hour
        parts.append(f"{hours:.2f} GPU hours at {prices.gpu_hour:g} {prices.currency}")
    if prices.kilowatt_hour is not None:
        energies = [cost.get("energy_watt_hours") for cost in costs]
        kilowatt_hours = sum(filter(None, energies)) / 1000
        total += kilowatt_hours * prices.kilowatt_hour
        unknown = energies.count(None)
        left_out = f" ({unknown} of {count(len(costs), 'stage')} did not measure it)" if unknown else ""
        parts.append(f"{kilowatt_hours:.3g} kWh at {prices.kilowatt_hour:g} {prices.currency}{left_out}")
    amount = f"{total:.2f}" if total >= 0.01 or not total else "less than 0.01"
    return f"Cost of all stages up to the package: {amount} {prices.currency} ({', '.join(parts)})"


def _metric_rows(runs: Path, scores: Scores) -> tuple[MetricRow, ...]:
    """Metrics of base, production and candidate, the candidate's with a 95 % interval."""
    metrics = _read(runs, "evaluate", "metrics.json")
    rows = []
    for name, value in metrics["candidate"].items():
        if not isinstance(value, int | float):  # confusion and calibration are shown elsewhere
            continue
        low, high = interval(name, scores) or (None, None)
        rows.append(
            MetricRow(
                name=name,
                base=metrics["base"].get(name),
                production=metrics.get("production", {}).get(name),
                candidate=value,
                low=low,
                high=high,
            )
        )
    return tuple(rows)


def interval(metric: str, scores: Scores) -> tuple[float, float] | None:
    """The 95 % interval of a metric over items, if it has one: Wilson for shares, BCa bootstrap for means."""
    try:
        found = sample(scores, metric) if spec_of(scores, metric) else None
    except EvaluationError:  # Not measured for every item.
        return None
    if found is None or len(found.values) < 2:
        return None
    if found.kind == "rate":
        return wilson_interval(round(sum(found.values)), len(found.values), alpha=0.05)
    drawn = bootstrap_ratio(found.values, found.weights)
    return drawn.lower_limit(0.025), drawn.upper_limit(0.025)


def _facts(
    runs: Path, adapter: Adapter, quantize: Quantize, scores: Mapping[str, Scores]
) -> tuple[tuple[str, str], ...]:
    trained, counts = _read(runs, "train", "metrics.json"), count_rows(runs)
    champion = against(scores)
    share = 100 * trained["trained_parameters"] / trained["base_parameters"]
    return (
        ("base", sources(runs)["base"]["source"]),
        ("method", method(adapter)),
        ("quantization", _quantization(quantize)),
        ("trained parameters", f"{trained['trained_parameters']:,} ({share:.2g} %)"),
        ("rows", f"{counts['train']:,} to train on, {counts['evaluation']:,} to evaluate with"),
        ("training", f"{trained['steps']} steps, {trained['tokens_per_second']} tokens/s"),
        ("compared with", champion.version if champion else "the base: nothing was in production"),
        *(
            [("anchor", anchor.scored.release.version)]
            if (anchor := scores.get(ANCHOR)) and anchor.scored and anchor.scored.release
            else []
        ),
    )


def _quantization(quantize: Quantize) -> str:
    if quantize.init_kind == "plain":
        return quantize.method
    weighting = "" if quantize.weighting == "none" else f", {quantize.weighting} weighting"
    return f"{quantize.method} with {quantize.init_kind}{weighting}"


def _gate(gate: dict[str, Any]) -> Gate:
    """A gate for the page; one with a limit is shown as the distance from it."""
    low, high = gate["interval"]
    sign = 1 if gate["direction"] == "higher" else -1
    limit = gate["limit"] or 0.0
    if gate["test"] == "limit":
        reference, difference, threshold = limit, gate["candidate"] - limit, 0.0
        low, high = low - limit, high - limit
    else:
        reference, difference = gate["reference"], gate["difference"]
        threshold = sign * gate["margin"] if gate["test"] == "superiority" else -sign * gate["margin"]
    return Gate(
        name=gate["name"],
        metric=gate["metric"],
        better=gate["direction"],
        candidate=gate["candidate"],
        reference=reference,
        difference=difference,
        low=low,
        high=high,
        threshold=threshold,
        outcome=gate["outcome"],
        num_items=gate["num_items"],
        detectable=gate["smallest_effect"],
    )


def _confusion(scores: Scores) -> Confusion | None:
    if not scores.labels:
        return None
    counts = confusion(scores.items, len(scores.labels))
    return Confusion(labels=scores.labels, counts=tuple(tuple(row) for row in counts))


def _layer_errors(runs: Path) -> tuple[LayerError, ...]:
    path = runs / "init" / "base" / REPORT_FILE
    layers = json.loads(path.read_text(encoding="utf-8"))["layers"] if path.is_file() else []
    return tuple(LayerError(name=layer["module"], relative_error=layer["error"]) for layer in layers)


def _stage(runs: Path, name: str) -> StageCost:
    cost = stage_cost(runs, name)
    return StageCost(name=name, seconds=cost["seconds"], peak_bytes=cost["peak_rss_mb"] * 1_000_000)


def _read(runs: Path, stage: str, name: str) -> Any:
    return json.loads((runs / stage / name).read_text(encoding="utf-8"))
