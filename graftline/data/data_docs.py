"""Great Expectations' Data Docs as pages that need no network: GX's own load styles, scripts and images from six hosts.

Without them its index is empty. Here the result pages keep GX's content, get one style sheet of our own and lose their
scripts and outside links; the index is written anew. A content security policy forbids what might be left.
"""

import html
import re
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from graftline.data.checks import Check
from graftline.digest import write_text

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
