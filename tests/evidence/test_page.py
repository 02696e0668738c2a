"""docs/evidence.md is what the results say."""

import re
from pathlib import Path

from evidence import page
from evidence.page import HERE

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_made_of_the_results() -> None:
    assert (ROOT / "docs" / "evidence.md").read_text() == page.render(HERE / "results"), "run `python -m evidence.page`"


def test_all_claims_have_a_verdict_and_every_figure_is_there() -> None:
    claims = page.collect(HERE / "results")
    assert [claim.number for claim in claims] == list(range(1, 14))
    assert not [claim.number for claim in claims if claim.verdict == "not run"]
    text = (ROOT / "docs" / "evidence.md").read_text()
    figures = re.findall(r"\(evidence/(\w+)\.svg\)", text)
    assert len(figures) >= 8
    assert not [name for name in figures if not (ROOT / "docs" / "evidence" / f"{name}.svg").is_file()]
