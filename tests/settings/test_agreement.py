"""What pipelines.yaml offers is what the library's tables know, and its defaults are declared once."""

import ast
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import graftline
from graftline.adapters.methods import METHODS
from graftline.data.template import TEMPLATES
from graftline.evaluate import gate_rules
from graftline.settings import answers, data, engine, gate_metrics, machines, model, objective
from graftline.train.optimizers import FACTORIES

SECTIONS = [kind for kind in vars(model).values() if isinstance(kind, type) and issubclass(kind, model.Section)]


def choices(section: type[BaseModel], field: str) -> set[str]:
    return set(get_args(section.model_fields[field].annotation))


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (choices(model.Adapter, "method"), set(METHODS) - {method.on_quantized for method in METHODS.values()}),
        (choices(model.Base, "template"), set(TEMPLATES)),
        (choices(model.Train, "optimizer"), set(FACTORIES)),
        ({name for name, found in gate_metrics.METRICS.items() if found.num_items}, set(gate_rules.METRICS)),
    ],
)
def test_every_choice_that_is_offered_is_known_and_every_known_one_is_offered(
    offered: set[str], known: set[str]
) -> None:
    assert offered == known


def repeated(source: str) -> dict[str, set[str]]:
    """Classes of a module that give two or more fields of one section a default again: their name to the fields."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        own = {
            line.target.id
            for line in node.body
            if isinstance(line, ast.AnnAssign) and line.value is not None and isinstance(line.target, ast.Name)
        }
        for section in SECTIONS:
            optional = {name for name, field in section.model_fields.items() if not field.is_required()}
            if len(own & optional) > 1:
                found[node.name] = own & optional
    return found


def test_a_section_s_defaults_are_declared_nowhere_else() -> None:
    found: dict[str, set[str]] = {}
    for path in Path(graftline.__file__).parent.rglob("*.py"):
        if path not in (
            Path(model.__file__),
            Path(data.__file__),
            Path(answers.__file__),
            Path(engine.__file__),
            Path(machines.__file__),
            Path(objective.__file__),
        ):
            found |= repeated(path.read_text(encoding="utf-8"))
    # What a server runs on, not what a pipeline trains on: its fields share two names with `train`.
    del found["Runtime"]
    # What a client may ask the server for; a request's `seed` and `labels` are nobody's setting.
    del found["Generate"]
    assert found == {}


def test_a_second_declaration_is_found() -> None:
    assert repeated("class GateRule:\n    metric: str\n    margin: float = 0.0\n    alpha: float = 0.05\n") == {
        "GateRule": {"margin", "alpha"}
    }
