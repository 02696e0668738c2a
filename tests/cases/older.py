"""Calls that cases from outside still make in an older way, in terms of what there is now."""

from typing import Any

from graftline.settings.model import Gate
from tests.sections import gate_section


def GateRule(*said: Any, **given: Any) -> Gate:  # noqa: N802  # the name that cases use
    """A gate whose metric, direction and test are given in this order."""
    return gate_section(*said, **given)
