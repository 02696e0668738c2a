"""The tuning of a rate."""

from dataclasses import replace
from typing import Any

import pytest

from studies.survey.cells import Cell
from studies.survey.grid import tune

CELL = Cell(arm="lora", size="xs", method="lora", learning_rate=0.0, seed=100, marks=(5,))


def _runner(best: float, tried: list[Cell]) -> Any:
    def run(cell: Cell) -> dict[str, Any]:
        tried.append(cell)
        if cell.learning_rate > 0.05:
            return {"failed": "the loss exploded"}
        return {"after": {"tuning": abs(cell.learning_rate - best)}}

    return run


@pytest.mark.parametrize(("best", "rates"), [(3e-3, [1e-3, 3e-3, 1e-2]), (1e-4, [1e-3, 3e-3, 1e-2, 3e-4, 1e-4])])
def test_a_grid_grows_while_its_best_lies_at_an_edge(best: float, rates: list[float]) -> None:
    tried: list[Cell] = []
    assert tune(CELL, (1e-3, 3e-3, 1e-2), _runner(best, tried)) == best
    assert [cell.learning_rate for cell in tried] == rates
    assert all(cell.marks == () for cell in tried)


def test_a_rate_that_explodes_is_not_chosen() -> None:
    assert tune(CELL, (1e-2, 3e-2), _runner(0.03, [])) == 3e-2


def test_equal_settings_are_the_same_cell() -> None:
    assert replace(CELL, seed=100).name == CELL.name
    assert replace(CELL, rows=10).name != CELL.name
