"""What pipelines.yaml offers is what the library's tables know: every choice on one side stands on the other."""

from typing import get_args

import pytest
from pydantic import BaseModel

from graftline.adapters.methods import METHODS
from graftline.data.template import TEMPLATES
from graftline.evaluate import gate_rules
from graftline.settings import measured, model
from graftline.train.optimizers import FACTORIES


def choices(section: type[BaseModel], field: str) -> set[str]:
    return set(get_args(section.model_fields[field].annotation))


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (choices(model.Adapter, "method"), set(METHODS) - {method.on_quantized for method in METHODS.values()}),
        (choices(model.Base, "template"), set(TEMPLATES)),
        (choices(model.Train, "optimizer"), set(FACTORIES)),
        ({name for name, found in measured.METRICS.items() if found.num_items}, set(gate_rules.METRICS)),
    ],
)
def test_every_choice_that_is_offered_is_known_and_every_known_one_is_offered(
    offered: set[str], known: set[str]
) -> None:
    assert offered == known
