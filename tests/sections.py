"""Sections of pipelines.yaml for tests: small values where a test says nothing."""

from typing import Any

from graftline.settings.data import Check, Data
from graftline.settings.model import Adapter, Direction, Evaluate, Gate, GateTest, Quantize, Train


def train_section(**given: Any) -> Train:
    """One thread and a constant rate, so that a test's numbers depend on what it says alone."""
    return Train(**{"batch_size": 16, "learning_rate": 2e-4, "scheduler": "constant", "threads": 1} | given)


def adapter_section(method: str, **given: Any) -> Adapter:
    """Also for methods that pipelines.yaml does not offer, such as ``qpissa``."""
    return Adapter(method="lora", **given).model_copy(update={"method": method})


def gate_section(metric: str, direction: Direction, test: GateTest, **given: Any) -> Gate:
    """One gate, in the order in which it is said: accuracy, higher, non-inferiority."""
    return Gate(metric=metric, direction=direction, test=test, **given)


def quantize_section(method: str = "nf4", **given: Any) -> Quantize:
    """How a base is quantized; NF4 where a test is about something else."""
    return Quantize(**{"method": method} | given)


def data_section(**given: Any) -> Data:
    """Rows that only what is tested looks at."""
    return Data(**{"source": "path:rows.jsonl", "evaluation_rows": 1, "max_tokens": 64} | given)


def check_section(expectation: str, arguments: dict[str, Any]) -> Check:
    """One expectation with its arguments, which the file writes as keys beside it."""
    return Check(expectation=expectation, **arguments)


def evaluate_section(**given: Any) -> Evaluate:
    """How models are scored: by labels unless a test says more."""
    return Evaluate(**{"metric": "accuracy"} | given)
