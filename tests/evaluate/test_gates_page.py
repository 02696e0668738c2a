"""docs/gates.md: its example runs, and its table is that of the recorded simulation."""

import json
import re
from pathlib import Path
from typing import Any

from scipy.stats import norm

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
CELLS = json.loads((ROOT / "studies" / "results" / "gates.json").read_text())["simulation"]["cells"]


def test_the_example_runs_and_passes(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(compile(code, "docs/gates.md", "exec"), {})
    assert capsys.readouterr().out.startswith("pass accuracy 0.850 against 0.450 (base): +0.400 [")


def test_the_table_is_that_of_the_recorded_simulation() -> None:
    lines = [
        f"| {cell['gate']} | {cell['items']} | {cell['truth']} | {cell['share']:.3f} | {cell['share_before']:.3f} |"
        for cell in CELLS
    ]
    assert len(lines) >= 20
    assert [line for line in lines if line not in PAGE] == []


def of(question: str) -> list[dict[str, Any]]:
    return [cell for cell in CELLS if cell["question"] == question]


def margin(share: float, cells: list[dict[str, Any]]) -> float:
    """How far the worst of so many cells may lie from a true ``share`` by chance, one time in a hundred."""
    return float(norm.isf(0.01 / len(cells))) * (share * (1 - share) / cells[0]["comparisons"]) ** 0.5


def test_no_recorded_cell_errs_more_often_than_alpha_allows() -> None:
    cells = of("false promotion") + of("false failure")
    assert [cell for cell in cells if cell["share"] > 0.05 + margin(0.05, cells)] == []


def test_the_rule_before_failed_sound_candidates_more_often_and_promoted_no_more() -> None:
    cells = of("false failure")
    assert [cell for cell in cells if cell["share_before"] < 0.05 + margin(0.05, cells)] == []
    assert [cell for cell in CELLS if cell["question"] == "power" and cell["share"] < cell["share_before"]] == []


def test_items_planned_for_a_power_of_four_fifths_have_it() -> None:
    # Right or wrong items are whole: the gate's own power with 773 of them, 5 % discordant, is 0.777.
    cells = of("power")
    assert [cell for cell in cells if cell["share"] < 0.777 - margin(0.777, cells)] == []
