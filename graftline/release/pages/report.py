"""One self-contained HTML page for a run: no script, no network, charts inline."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from graftline.digest import Digest, write_text
from graftline.release.pages import charts
from graftline.release.pages.report_data import ReportData


def page_environment() -> Environment:
    """Jinja over the templates: everything is escaped, unknown names are errors.

    ``style`` is the style sheet; ``draw`` draws a chart, or nothing where it is None.
    """
    environment = Environment(
        loader=PackageLoader("graftline.release"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["style"] = Markup(
        (files("graftline.release") / "templates" / "page.css").read_text(encoding="utf-8")
    )
    environment.globals["megabytes"] = charts.megabytes
    macros: Any = environment.get_template("chart.svg").module
    environment.globals["draw"] = macros.draw
    return environment


def render_report(data: ReportData) -> str:
    """The page's HTML."""
    errors = [error.relative_error for error in data.layer_errors]
    return (
        page_environment()
        .get_template("report.html")
        .render(
            data=data,
            gate_strip=charts.gate_strip,
            loss_chart=charts.loss_chart,
            confusion_chart=charts.confusion_chart,
            layer_chart=charts.layer_chart,
            memory_chart=charts.memory_chart,
            layer_range=(min(errors), max(errors)) if errors else None,
            longest=max((stage.seconds for stage in data.stages), default=0.0) or 1.0,
            duration=_duration,
            number=_number,
        )
    )


def write_report(path: Path, data: ReportData) -> Digest:
    """Write the page; returns the file's digest."""
    return write_text(path, render_report(data))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    # Bytes and perplexities: 9,824,262 rather than 9.824e+06.
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
