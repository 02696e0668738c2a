"""The fixture that compares with the records."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.golden.record import Golden

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def golden(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Golden:
    """Compares, or rewrites with ``--update-golden``."""
    processor = f"{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}-threads-torch-{torch.__version__}"
    exact = ROOT / ".cache" / "golden" / processor if request.config.getoption("--golden-exact") else None
    update = bool(request.config.getoption("--update-golden"))
    return Golden(update, exact, report=lambda text: record_property("golden", text))
