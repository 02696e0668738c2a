"""Great Expectations over the rows: a suite declared in pipelines.yaml, results as checks, Data Docs as HTML.

GX 1.x has moved its interfaces before; this is the only file that knows them. It works offline and sends nothing.
"""

import difflib
import html
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas

from graftline import settings
from graftline.data.checks import Check, Side
from graftline.digest import write_text
from graftline.errors import DataError

# Great Expectations' Data Docs as pages that need no network: GX's own load styles, scripts and images from six hosts.
#
# Without them its index is empty. Here the result pages keep GX's content, get one style sheet of our own and lose
# their scripts and outside links; the index is written anew. A content security policy forbids what might be left.

_POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
_OUTSIDE = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<footer\b.*?</footer>", re.DOTALL | re.IGNORECASE
)
_INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="UTF-8"><title>Data Docs</title>{head}</head><body>
<h1>Data Docs</h1>
<p>What the rows must meet (<a href="expectations/rows.html">the suite</a>), made by Great Expectations.</p>
<table><tr><th>rows</th><th>status</th><th>expectations met</th><th>page</th></tr>
{lines}</table></body></html>
"""


def make_self_contained(site: Path, checks: Sequence[Check]) -> None:
    """Rewrite GX's site in ``site`` for reading without a network; ``checks`` are its results."""
    style = resources.files("graftline.data").joinpath("data_docs.css").read_text(encoding="utf-8")
    head = f"{_POLICY}<style>{style}</style>"
    for page in site.rglob("*.html"):
        text = _OUTSIDE.sub("", page.read_text(encoding="utf-8"))
        write_text(
            page, text.replace("<head>", f"<head>{_POLICY}", 1).replace("</head>", f"<style>{style}</style></head>", 1)
        )
    shutil.rmtree(site / "static", ignore_errors=True)
    pages = sorted(page.relative_to(site).as_posix() for page in (site / "validations").rglob("*.html"))
    lines = "".join(_line(page, checks) for page in pages)
    write_text(site / "index.html", _INDEX.format(head=head, lines=lines))


def _line(page: str, checks: Sequence[Check]) -> str:
    side = page.rsplit("rows-", 1)[1].removesuffix(".html")
    met = [check.passed for check in checks if check.side == side]
    mark = '<span class="text-success">✓ met</span>' if all(met) else '<span class="text-danger">✗ not met</span>'
    link = f'<a href="{html.escape(page)}">results</a>'
    return f"<tr><td>{html.escape(side)}</td><td>{mark}</td><td>{sum(met)} of {len(met)}</td><td>{link}</td></tr>\n"


LINE = "line"
"""Name of the column with source lines: how GX names the rows at fault."""


ALWAYS = tuple(
    settings.Check.model_validate(check)
    for check in (
        {"expectation": "expect_column_values_to_not_be_null", "column": "prompt"},
        {"expectation": "expect_column_values_to_not_be_null", "column": "completion"},
        {"expectation": "expect_column_values_to_be_between", "column": "supervised_tokens", "min_value": 1},
    )
)
"""Expectations of every pipeline, so that its Data Docs have something to show."""


def run_expectations(
    frames: Mapping[Side, pandas.DataFrame], expectations: Sequence[settings.Check], *, site: Path
) -> list[Check]:
    """Run `ALWAYS` and ``expectations`` on each frame and write Data Docs to ``site``/index.html.

    Each frame has a column `LINE`.

    Raises:
        DataError: an expectation or an argument of it is unknown.
    """
    gx = _great_expectations()
    built = [_build(gx, one) for one in (*ALWAYS, *(one for one in expectations if one not in ALWAYS))]
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    for name in list(context.get_site_names()):
        context.delete_data_docs_site(name)
    context.add_data_docs_site("rows", _site_config(site))
    suite = context.suites.add(gx.ExpectationSuite(name="rows", expectations=built))
    source = context.data_sources.add_pandas("rows")
    checks: list[Check] = []
    for side, frame in frames.items():
        batch = source.add_dataframe_asset(side).add_batch_definition_whole_dataframe("all")
        validation = context.validation_definitions.add(gx.ValidationDefinition(name=side, data=batch, suite=suite))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GX's own deprecated calls into pandas
            result = validation.run(
                batch_parameters={"dataframe": frame},
                result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [LINE]},
            )
        checks += [_to_check(side, one) for one in result.results]
    _escape_stored_results(context)
    context.build_data_docs()
    make_self_contained(site, checks)
    return checks


def _great_expectations() -> ModuleType:
    # Imported here: it takes seconds, and only validation needs it.
    import great_expectations

    return great_expectations


def _build(gx: ModuleType, check: settings.Check) -> Any:
    name = check.expectation
    class_name = "".join(part.capitalize() for part in name.split("_"))
    known = {
        re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower() for kind in dir(gx.expectations) if kind.startswith("Expect")
    }
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see https://greatexpectations.io/expectations"
        raise DataError(f"data.checks: Great Expectations knows no {name!r}; {hint}")
    try:
        return getattr(gx.expectations, class_name)(**check.arguments)
    except (TypeError, ValueError) as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise DataError(f"data.checks: {name} does not take these arguments: {reasons}") from error


def _site_config(site: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site.resolve())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", "show_cta_footer": False},
    }


def _escape_stored_results(context: Any) -> None:
    """GX puts the rows' texts into its pages as they are: a text with a tag in it would break the page."""
    store = context.validation_results_store
    for key in store.list_keys():
        stored = store.get(key)
        for one in stored.results:
            one.result = _escaped(one.result)
        store.set(key, stored)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


def _to_check(side: Side, result: Any) -> Check:
    config = result.expectation_config
    arguments = {key: value for key, value in config.kwargs.items() if key != "batch_id"}
    name = f"{config.type}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    found = result.result
    lines = tuple(sorted(int(row[LINE]) for row in found.get("unexpected_index_list") or ()))
    if message := _exception(result.exception_info):
        detail = f"could not run: {message}"
    elif "unexpected_count" in found:
        values = ", ".join(repr(value)[:40] for value in found.get("partial_unexpected_list", [])[:3])
        detail = f"{found['unexpected_count']} of {found['element_count']} rows do not meet it" + (
            f": {values}" if values else ""
        )
    else:
        detail = f"observed {found.get('observed_value')}"
    return Check(name, side, bool(result.success), detail, lines)


def _exception(info: Mapping[str, Any]) -> str:
    """The message of an expectation that raised: ``info`` is one record, or one for each metric."""
    records = [info] if "raised_exception" in info else list(info.values())
    return next((str(one["exception_message"]) for one in records if one.get("raised_exception")), "")
