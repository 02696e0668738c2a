"""Charts of every page: what is drawn where, and that what people wrote stays text."""

import re
from datetime import UTC, datetime, timedelta

import pytest

from graftline.release.pages.registry_page import (
    ChannelView,
    EntryView,
    Estimate,
    PipelineView,
    RegistryView,
    SweepView,
    VariantView,
    chart,
    render_registry,
    render_sweep,
    timeline,
)
from graftline.release.pages.report import Chart, gate_strip, loss_chart, memory_chart, page_environment, shape
from tests.release.pages.reports import FULL

HOSTILE = "</text><script>alert('me')</script> & \"you\""
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def draw(drawn: Chart | None) -> str:
    return str(page_environment().globals["draw"](drawn))


def sweep(name: str, metric: str, *values: float) -> SweepView:
    seeds = tuple(enumerate(values, start=1))
    metrics = {metric: Estimate(mean=values[0], low=values[0] - 1, high=values[0] + 1)} if values else {}
    variant = VariantView(name=name, values=seeds, metrics=metrics, difference=None)
    return SweepView(
        pipeline="p", metric=metric, columns=(metric,), seeds=(1,), variants=(variant,), revisions=("0123abc",)
    )


def registry(name: str) -> RegistryView:
    entry = EntryView(number=1, time=NOON, action="promote", version=name, actor=name, reason=name)
    channel = ChannelView(name=name, entries=(entry,))
    later = NOON + timedelta(days=1)
    return RegistryView(
        store="s3://models", time=later, pipelines=(PipelineView(name="p", channels=(channel,), releases=()),)
    )


@pytest.mark.parametrize(
    "page",
    [render_sweep(sweep("plain", HOSTILE, 1.0)), render_sweep(sweep(HOSTILE, "nll", 1.0))],
    ids=["metric", "variant"],
)
def test_names_in_a_sweeps_chart_cannot_inject_html(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;" in re.findall("<svg.*?</svg>", page)[0]


def test_names_in_a_registrys_chart_cannot_inject_html() -> None:
    page = render_registry(registry(HOSTILE))
    assert "<script" not in page
    assert "&lt;script&gt;" in re.findall("<svg.*?</svg>", page)[0]


def test_a_quote_does_not_end_an_attribute() -> None:
    drawn = draw(Chart(10, 10, "a chart", [shape("rect", 'a" onload="alert(1)', x=1, y=2)]))
    assert '<rect class="a&#34; onload=&#34;alert(1)" x="1" y="2"/>' in drawn


def test_a_shape_is_written_with_whole_numbers_as_they_are_and_others_with_one_decimal() -> None:
    shapes = [
        shape("rect", "track", x=8, y=2.0, width=10.06, height=1, rx=3),
        shape("circle", "seed", title="seed 1: 0.5", cx=1.25, cy=2, r=3.5),
        shape("text", text="", x=0, y=0, text_anchor="end"),
    ]
    assert draw(Chart(100, 20.4, "Two", shapes)) == (
        '<svg role="img" viewBox="0 0 100 20" width="100" height="20"><title>Two</title>'
        '<rect class="track" x="8" y="2.0" width="10.1" height="1" rx="3"/>'
        '<circle class="seed" cx="1.2" cy="2" r="3.5"><title>seed 1: 0.5</title></circle>'
        '<text x="0" y="0" text-anchor="end"></text></svg>'
    )


def test_a_page_without_results_has_no_chart() -> None:
    assert chart(sweep("plain", "nll")) is None
    assert timeline((ChannelView(name="production"),), NOON) is None
    assert draw(None) == ""
    assert "<svg" not in render_sweep(sweep("plain", "nll"))


def test_a_gates_estimate_lies_between_the_ends_of_its_interval() -> None:
    shapes = {one.attributes["class"]: one.attributes for one in gate_strip(FULL.gates[0]).shapes}
    interval, estimate = shapes["interval pass"], shapes["estimate pass"]
    assert float(interval["x1"]) < float(estimate["cx"]) < float(interval["x2"])
    assert shapes["zero"]["x1"] < estimate["cx"]


def test_a_higher_loss_lies_higher() -> None:
    (line,) = [one for one in loss_chart(FULL.loss).shapes if one.attributes.get("class") == "thin"]
    heights = [float(point.partition(",")[2]) for point in str(line.attributes["points"]).split()]
    assert len(heights) == len(FULL.loss)
    assert heights == sorted(heights), "SVG counts from the top, and this loss falls"


def test_measured_memory_is_a_point_at_its_share_of_the_largest() -> None:
    drawn = memory_chart(FULL.memory, width=1000)
    (point,) = [one.attributes for one in drawn.shapes if one.tag == "circle"]
    (track, *_) = [one.attributes for one in drawn.shapes if one.attributes.get("class") == "track"]
    expected = float(track["x"]) + 1_340 / 1_700 * float(track["width"])
    assert float(point["cx"]) == pytest.approx(expected)
