import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graftline.release.pages.report import LayerError, LossPoint, ReportData, _number, render_report, write_report
from tests.release.pages.reports import EMPTY, FULL

VOID = {"meta", "link", "br", "img"}


class Outline(HTMLParser):
    """Headings and text of a page; fails on tags that do not match and notes what would be loaded from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_every_part_that_is_given_is_shown() -> None:
    page = Outline(render_report(FULL))
    assert page.headings == [
        "Gates",
        "Metrics",
        "Loss",
        "Confusion",
        "Answers",
        "Quantization error per layer",
        "Stages",
        "Memory in training",
        "Made from",
    ]
    text = " ".join(page.text)
    for shown in (
        "wordnet-category",
        "inconclusive",
        "+0.393 (+0.33 to +0.453)",
        "4 min 11 s",
        "2.1 GB",
        "0.797 to 0.88",
        "The 2 held-out rows on which the candidate did worst against production.",
        "a\nprompt <i>",
    ):
        assert shown in text


def test_a_run_that_stopped_early_has_a_page_with_what_there_is() -> None:
    page = Outline(render_report(EMPTY))
    assert page.headings == []
    assert "no verdict" in " ".join(page.text)


@pytest.mark.parametrize(
    "part",
    [
        "reasons",
        "facts",
        "gates",
        "metrics",
        "loss",
        "confusion",
        "worst_rows",
        "layer_errors",
        "stages",
        "memory",
        "lineage",
    ],
)
def test_each_part_can_be_missing_or_alone(part: str) -> None:
    nothing = getattr(EMPTY, part)
    Outline(render_report(dataclasses.replace(FULL, **{part: nothing})))
    Outline(render_report(dataclasses.replace(EMPTY, **{part: getattr(FULL, part)})))


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    html = render_report(FULL)
    page = Outline(html)
    assert page.loaded == []
    assert "script" not in page.tags
    assert "url(" not in html
    assert "@import" not in html


@pytest.mark.parametrize(
    ("value", "shown"), [(9_824_262.0, "9,824,262"), (53_460.2, "53,460"), (0.87, "0.87"), (None, "–")]
)
def test_large_numbers_are_whole_ones(value: float | None, shown: str) -> None:
    assert _number(value) == shown


def test_labels_cannot_inject_html() -> None:
    page = Outline(render_report(FULL))
    assert page.tags.count("b") == len(FULL.metrics)  # the template's own
    assert any("a <b>label</b> & more" in text for text in page.text)


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write_report(tmp_path / "1.html", FULL) == write_report(tmp_path / "2.html", FULL)


@pytest.mark.parametrize(
    "data",
    [
        dataclasses.replace(EMPTY, loss=(LossPoint(step=1, training=0.0),)),
        dataclasses.replace(EMPTY, loss=(LossPoint(step=0, training=2.0), LossPoint(step=0, training=2.0))),
        dataclasses.replace(EMPTY, layer_errors=(LayerError(name="lm_head", relative_error=0.1),)),
        dataclasses.replace(
            EMPTY, gates=(dataclasses.replace(FULL.gates[0], difference=0, low=0, high=0, threshold=0),)
        ),
        dataclasses.replace(EMPTY, stages=(dataclasses.replace(FULL.stages[0], seconds=0.0, peak_bytes=0),)),
        dataclasses.replace(
            EMPTY, memory=(dataclasses.replace(FULL.memory[0], low_bytes=0, expected_bytes=0, high_bytes=0),)
        ),
    ],
)
def test_values_without_any_spread_are_drawn(data: ReportData) -> None:
    html = render_report(data)
    Outline(html)
    assert not re.search(r"\b(nan|inf)\b", html)


def test_a_layer_chart_has_a_cell_for_every_layer() -> None:
    html = render_report(dataclasses.replace(EMPTY, layer_errors=FULL.layer_errors))
    for error in FULL.layer_errors:
        assert f"<title>{error.name}: {error.relative_error:.4f}</title>" in html


def test_a_gates_zone_that_is_not_allowed_is_on_the_side_of_its_direction() -> None:
    html = render_report(dataclasses.replace(EMPTY, gates=FULL.gates[:2]))
    zones = [
        (float(zone), float(limit))
        for zone, limit in re.findall(r'class="forbidden" x="([\d.]+)".*?class="limit" x1="([\d.]+)"', html, re.S)
    ]
    assert zones[0][0] < zones[0][1]  # higher is better: the zone ends at the limit
    assert zones[1][0] == zones[1][1]  # lower is better: it starts there
