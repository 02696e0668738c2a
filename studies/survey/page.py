"""docs/evidence.md and its figures, from the raw results."""

import json
from collections.abc import Iterable
from pathlib import Path

from graftline.digest import write_text
from studies.survey import cited, figures, law_claims
from studies.survey.arms import read_cells
from studies.survey.claims import NOT_RUN, TRAINED, Claim
from studies.survey.family import SIZES
from studies.survey.grid import SEEDS
from studies.survey.laws import weights_of

PARTS = ("methods", "ranks", "bits", "laws")

_HEAD = """# The survey's claims, tested

Made by `python -m studies survey page` from [studies/survey/results](../studies/survey/results); `make evidence` runs
what has no result yet. Thirteen claims of the survey, each with the method, a figure or table, and a verdict:
*supported* if a 95 % interval over seeds excludes the opposite, *not supported* if it excludes the claim, else *not
decided*. The verdicts only apply to these small models and this task, all trained on a machine with two cores and
no GPU.

**Models.** SmolLM2-135M-Instruct where a claim must be shown on a real model; beside it a family of four small
Llamas (width : depth = 16, tied embeddings of 2,048 tokens) that were trained from scratch on sentences of
nlp-corpus and WordNet's definitions, among them a tenth of the definitions of the task's categories that are not in
the task.
**Task.** A noun's definition → one of ten categories. The loss is in nats per supervised token (the answer's tokens
and the one that ends it) on 600 rows that were not used for any choice. **General text.** 150 other sentences of
nlp-corpus.
**Rates.** Every arm's learning rate is tuned with a separate seed on 400 other rows, from a grid of half decades, which
is extended if the best rate is at its edge. Variations within an arm (rank, bits, rows) use the arm's rate.
"""


def render(results: Path) -> str:
    """The page."""
    claims = collect(results)
    lines = [_HEAD, "## Verdicts", "", "| claim | verdict |", "|---|---|"]
    lines += [f"| [{claim.number}. {claim.title}](#claim-{claim.number}) | {claim.verdict} |" for claim in claims]
    lines += ["", *_family_table(), ""]
    for claim in claims:
        lines += _section(claim)
    lines += _cost(results)
    return "\n".join(lines).rstrip() + "\n"


def collect(results: Path) -> list[Claim]:
    """All claims in their order."""
    found = [make(results) for make in (*TRAINED, law_claims.miub, law_claims.loss_law)]
    found += [cited.latency(), cited.requantized(), cited.memory_table()]
    found = [cited.with_calibrated_starts(claim) if claim.number == 7 else claim for claim in found]
    return sorted(found, key=lambda claim: claim.number)


def _family_table() -> list[str]:
    rows = [("size", "width", "blocks", "weights in the blocks")]
    rows += [(name, str(size.width), str(size.blocks), f"{weights_of(name):,}") for name, size in SIZES.items()]
    return _table(rows)


def _section(claim: Claim) -> list[str]:
    lines = [f'<a id="claim-{claim.number}"></a>', "", f"## {claim.number}. {claim.title}", ""]
    lines += [f"*The survey:* {claim.says}.", "", f"*Method:* {claim.method}.", ""]
    lines += [f"**{claim.verdict[0].upper()}{claim.verdict[1:]}.**", ""]
    lines += [f"* {finding}" for finding in claim.findings] + [""]
    if claim.figure and claim.verdict != NOT_RUN:
        lines += [f"![{claim.title}](evidence/{claim.figure}.svg)", ""]
    return [*lines, *_table(claim.table), ""]


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rendered = [f"| {' | '.join(row)} |" for row in rows]
    if not rendered:
        return []
    rule = f"|{'---|' * (rendered[0].count(' | ') + 1)}"
    return [rendered[0], rule, *rendered[1:]]


def _cost(results: Path) -> list[str]:
    """What it took, what failed, and with what it was made."""
    lines = ["## What it took", "", "| part | cells | failed | CPU minutes |", "|---|---|---|---|"]
    total = 0.0
    for part in PARTS:
        path = results / f"{part}.json"
        if path.exists():
            cells = list(json.loads(path.read_text())["cells"].values())
            minutes = sum(cell.get("cpu_seconds", 0) for cell in cells) / 60
            total += minutes
            failed = sum("failed" in cell for cell in cells)
            lines.append(f"| {part} | {len(cells)} | {failed} | {minutes:.0f} |")
    real = read_cells(results, "real")
    minutes = sum(cell["seconds"] for cell in real) / 60
    lines += [
        f"| real (SmolLM2-135M) | {len(real)} | 0 | {minutes:.0f} (of the clock) |",
        "",
        f"{total:.0f} CPU minutes for the family, its pretraining (about 15) left out. Seeds 0 to {SEEDS[-1]}; all "
        "cells with their settings, versions and curves are in studies/survey/results.",
    ]
    return lines


def write(results: Path, docs: Path) -> None:
    """Write the page and its figures."""
    write_text(docs / "evidence.md", render(results))
    print("figures:", ", ".join(figures.draw_all(results, docs / "evidence")))
