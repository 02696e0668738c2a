"""docs/gates.md: its example runs, and its table is that of the recorded simulation."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
CELLS = json.loads((ROOT / "studies" / "results" / "gates.json").read_text())["simulation"]["cells"]


def test_the_example_runs_and_passes(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(compile(code, "docs/gates.md", "exec"), {})
    assert capsys.readouterr().out.startswith("pass accuracy 0.850 against 0.450 (base): +0.400 [")


def test_the_table_is_that_of_the_recorded_simulation() -> None:
    lines = [f"| {cell['gate']} | {cell['items']} | {cell['truth']} | {cell['promoted']:.3f} |" for cell in CELLS]
    assert len(lines) >= 20
    assert [line for line in lines if line not in PAGE] == []


def test_no_recorded_cell_promotes_more_often_than_alpha_allows() -> None:
    """Two standard errors above alpha; looking four times without spending is there to show that it does not hold."""
    for cell in CELLS:
        if cell["question"] == "false promotion" or "spending" in cell["gate"]:
            assert cell["promoted"] <= 0.05 + 2 * (0.05 * 0.95 / cell["comparisons"]) ** 0.5, cell
        if cell["question"] == "power":
            assert cell["promoted"] >= 0.8 - 2.5 * (0.8 * 0.2 / cell["comparisons"]) ** 0.5, cell
