"""docs/evidence.md is what the results say."""

import re
from pathlib import Path

import pytest

from studies.survey import page
from studies.survey.__main__ import RESULTS

ROOT = Path(__file__).resolve().parents[3]


NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.fixture(scope="module")
def claims() -> list[page.Claim]:
    """Made of the results once: fits and resamples take seconds."""
    return page.collect(RESULTS)


def test_the_page_is_made_of_the_results(claims: list[page.Claim], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "collect", lambda results: claims)
    written = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    made = page.render(RESULTS)
    assert NUMBER.sub("#", written) == NUMBER.sub("#", made), "run `python -m studies survey page`"
    # A value half way between two roundings may be rounded to either: it depends on the processor's last digits.
    for ours, theirs in zip(NUMBER.findall(written), NUMBER.findall(made), strict=True):
        assert abs(float(ours) - float(theirs)) <= 1.01 * last_digit(ours), "run `python -m studies survey page`"


def last_digit(number: str) -> float:
    """What a step of the last printed digit is worth: 0.01 for 1.23."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) if "." in mantissa or exponent else 0.0


def test_all_claims_have_a_verdict_and_every_figure_is_there(claims: list[page.Claim]) -> None:
    assert [claim.number for claim in claims] == list(range(1, 14))
    assert not [claim.number for claim in claims if claim.verdict == "not run"]
    text = (ROOT / "docs" / "evidence.md").read_text()
    figures = re.findall(r"\(evidence/(\w+)\.svg\)", text)
    assert len(figures) >= 8
    assert not [name for name in figures if not (ROOT / "docs" / "evidence" / f"{name}.svg").is_file()]


def test_claims_7_and_9_take_in_what_came_after_the_survey(claims: list[page.Claim]) -> None:
    found = {claim.number: claim for claim in claims}
    (calibrated,) = [line for line in found[7].findings if "weighted by the inputs" in line and "size s" in line]
    assert re.findall(r"([\d.]+) bits [+-]", calibrated) == ["2", "2.5", "3", "4"]
    cures = [row for row in found[9].table if row[0].startswith("small task: ")]
    assert len(cures) == 5
    assert {row[-1] for row in cures} <= {f"{count} of 3" for count in range(4)}
