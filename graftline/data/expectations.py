"""Great Expectations over the rows: a suite declared in pipelines.yaml, results as checks, Data Docs as HTML.

GX 1.x has moved its interfaces before; this is the only file that knows them. It works offline and sends nothing.
"""

import contextlib
import difflib
import html
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas

from graftline import settings
from graftline.data.checks import Check, Side
from graftline.digest import rename_synced, write_text
from graftline.errors import DataError, disk_error

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
    _check_whole(site, {check.side for check in checks})
    for page in site.rglob("*.html"):
        text = _OUTSIDE.sub("", page.read_text(encoding="utf-8"))
        write_text(
            page, text.replace("<head>", f"<head>{_POLICY}", 1).replace("</head>", f"<style>{style}</style></head>", 1)
        )
    if (site / "static").exists():
        shutil.rmtree(site / "static")
    pages = sorted(page.relative_to(site).as_posix() for page in (site / "validations").rglob("*.html"))
    lines = "".join(_line(page, checks) for page in pages)
    write_text(site / "index.html", _INDEX.format(head=head, lines=lines))


@contextlib.contextmanager
def _refused_as_errors(site: Path) -> Iterator[None]:
    """Raise what GX only logs, with a traceback in its text: a page that it could not make or write."""
    said: list[str] = []
    log = logging.getLogger("great_expectations.render.renderer.site_builder")

    def hear(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            said.append(record.getMessage())
        return record.levelno < logging.ERROR

    log.addFilter(hear)
    try:
        yield
    finally:
        log.removeFilter(hear)
    if said:
        found = disk_error(RuntimeError(said[0]))
        reason = found.strerror if found else said[0].partition("Traceback")[0].strip()
        raise DataError(f"{site}: Great Expectations cannot write its pages: {reason}; free some space, then run again")


def _check_whole(site: Path, sides: Iterable[str]) -> None:
    for pattern in ("expectations/rows.html", *(f"validations/**/rows-{side}.html" for side in sorted(sides))):
        pages = [page.read_text(encoding="utf-8").rstrip() for page in site.glob(pattern)]
        if not pages or not all(page.endswith("</html>") for page in pages):
            raise DataError(
                f"{site}: Great Expectations did not write all of its pages ({pattern}); free space or permission may "
                "be missing there: look, then run again"
            )


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


Frames = Callable[[], Iterator[pandas.DataFrame]]
"""Makes a side's rows as frames, one after the other, each time it is called; each frame has a column `LINE`."""
_BY_ROW = re.compile(
    r"expect_(column_value_lengths_to_\w+|column_pair_values_\w+|column_values_to_(not_)?match_\w+"
    r"|column_values_to_(not_)?be_(between|in_set|null|dateutil_parseable|json_parseable)"
    r"|multicolumn_sum_to_equal|select_column_values_to_be_unique_within_record)"
)
"""Expectations that look at one row at a time: their findings on several frames are added up."""
_MOST_SHOWN = 20
"""Number of values that Data Docs show."""


def run_expectations(
    frames: Mapping[Side, pandas.DataFrame | Frames], expectations: Sequence[settings.Check], *, site: Path
) -> list[Check]:
    """Run `ALWAYS` and ``expectations`` on each side and write Data Docs to ``site``/index.html.

    Where there are several frames, only one of them is held, and whole columns for expectations that look at all rows
    at once (unique, increasing, a mean).

    Args:
        frames: each side's rows.
        expectations: ``data.checks`` and those of ``data.suite``.
        site: folder for the pages.

    Raises:
        DataError: an expectation or an argument of it is unknown.
    """
    gx = _great_expectations()
    making = site.with_name(f".{site.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    asked: list[settings.Check] = []
    for one in (*ALWAYS, *expectations):  # `data.checks` and `data.suite` may ask the same
        asked += [] if one in asked else [one]
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    for name in list(context.get_site_names()):
        context.delete_data_docs_site(name)
    context.add_data_docs_site("rows", _site_config(making))
    suite = context.suites.add(gx.ExpectationSuite(name="rows", expectations=[_build(gx, one) for one in asked]))
    source = context.data_sources.add_pandas("rows")
    checks: list[Check] = []
    merged: dict[str, list[Any]] = {}
    for side, given in frames.items():
        batch = source.add_dataframe_asset(side).add_batch_definition_whole_dataframe("all")
        validation = context.validation_definitions.add(gx.ValidationDefinition(name=side, data=batch, suite=suite))
        pieces = given() if callable(given) else iter([given])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GX's own deprecated calls into pandas
            result = validation.run(batch_parameters={"dataframe": next(pieces)}, result_format=_RESULT_FORMAT)
            if callable(given) and (second := next(pieces, None)) is not None:
                merged[side] = _of_all(gx, batch, asked, result.results, chain([second], pieces), given)
        checks += [_to_check(side, one) for one in merged.get(side, result.results)]
    _store(context, merged)
    with _refused_as_errors(making):
        context.build_data_docs()
    make_self_contained(making, checks)
    shutil.rmtree(site, ignore_errors=True)
    rename_synced(making, site)
    return checks


_RESULT_FORMAT = {"result_format": "COMPLETE", "unexpected_index_column_names": [LINE]}


def _of_all(
    gx: ModuleType,
    batch: Any,
    asked: Sequence[settings.Check],
    of_first: Sequence[Any],
    others: Iterator[pandas.DataFrame],
    frames: Frames,
) -> list[Any]:
    """Results over all frames, in the order of the first frame's."""
    by_row = [one for one in asked if _BY_ROW.fullmatch(one.expectation)]
    at_once = [one for one in asked if one not in by_row]
    found = {_name(one): one for one in of_first}
    for frame in others:
        for one in _results(gx, batch, by_row, frame):
            _add(found[_name(one)], one)
    if at_once:
        columns = _columns([one.arguments for one in at_once])
        whole = pandas.concat([frame[columns or list(frame)] for frame in frames()], ignore_index=True)
        found |= {_name(one): one for one in _results(gx, batch, at_once, whole)}
    return [found[_name(one)] for one in of_first]


def _results(gx: ModuleType, batch: Any, asked: Sequence[settings.Check], frame: pandas.DataFrame) -> list[Any]:
    suite = gx.ExpectationSuite(name="some", expectations=[_build(gx, one) for one in asked])
    part = batch.get_batch(batch_parameters={"dataframe": frame})
    return list(part.validate(suite, result_format=_RESULT_FORMAT).results)


def _columns(arguments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that expectations with these arguments read; none: it may be any of them."""
    names = {LINE}
    for given in arguments:
        own = [value for key, value in given.items() if key.startswith("column")]
        if not own or "row_condition" in given:
            return []
        names.update(*([value] if isinstance(value, str) else map(str, value) for value in own))
    return sorted(names)


def _add(to: Any, more: Any) -> None:
    """Add the result of one frame to that of earlier ones, with GX's own formulas."""
    if _exception(to.exception_info):
        return
    if _exception(more.exception_info) or "unexpected_count" not in to.result:
        to.success, to.exception_info = bool(to.success and more.success), more.exception_info
        return
    found, added = to.result, more.result
    for name in ("element_count", "unexpected_count", "missing_count"):
        if name in found:
            found[name] += added[name]
    for name in ("unexpected_list", "partial_unexpected_list", "partial_unexpected_index_list"):
        found[name] = [*found.get(name, ()), *added.get(name, ())][:_MOST_SHOWN]
    found["unexpected_index_list"] = [*found.get("unexpected_index_list", ()), *added.get("unexpected_index_list", ())]
    for name in ("partial_unexpected_counts", "unexpected_index_query"):
        found.pop(name, None)  # of one frame
    count, wrong = found["element_count"], found["unexpected_count"]
    given = count - found.get("missing_count", 0)
    found["unexpected_percent"] = 100 * wrong / given if given else None
    if "missing_count" in found:
        found["missing_percent"] = 100 * found["missing_count"] / count if count else None
        found["unexpected_percent_total"] = 100 * wrong / count if count else None
        found["unexpected_percent_nonmissing"] = found["unexpected_percent"]
    to.success = not given or (given - wrong) / given >= to.expectation_config.kwargs.get("mostly", 1.0)


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
        raise DataError(f"data.checks or data.suite: Great Expectations knows no {name!r}; {hint}")
    try:
        return getattr(gx.expectations, class_name)(**check.arguments)
    except (TypeError, ValueError) as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise DataError(f"data.checks or data.suite: {name} does not take these arguments: {reasons}") from error


def _site_config(site: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site.resolve())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", "show_cta_footer": False},
    }


def _store(context: Any, merged: Mapping[str, list[Any]]) -> None:
    """Give Data Docs the results of all frames, escaped.

    GX puts the rows' texts into its pages as they are: a text with a tag in it would break the page.
    """
    store = context.validation_results_store
    for key in store.list_keys():
        stored = store.get(key)
        if results := merged.get(key.batch_identifier.rsplit("-", 1)[-1]):
            stored.results, stored.success = results, all(one.success for one in results)
            met = sum(bool(one.success) for one in results)
            stored.statistics |= {
                "successful_expectations": met,
                "unsuccessful_expectations": len(results) - met,
                "success_percent": 100 * met / len(results),
            }
        for one in stored.results:
            one.result = _escaped(one.result)
        store.set(key, stored)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


def _name(result: Any) -> str:
    config = result.expectation_config
    arguments = {key: value for key, value in config.kwargs.items() if key != "batch_id"}
    return f"{config.type}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _to_check(side: Side, result: Any) -> Check:
    name, found = _name(result), result.result
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
