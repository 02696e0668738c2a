"""Every class of the exception tree is raised in some test, and the tree that is drawn is the tree that is there."""

import inspect
import re
from pathlib import Path

import pytest

from graftline import errors

TESTS = Path(__file__).resolve().parents[1]
CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, errors.GraftlineError) and value is not errors.GraftlineError
]


@pytest.fixture(scope="module")
def tests_text() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_is_expected_in_some_test(error: type, tests_text: str) -> None:
    assert re.search(rf"raises\(\s*\(?[^)]*\b{error.__name__}\b", tests_text), f"no test expects {error.__name__}"


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"^[│├└─ ]*(\w+Error) ", inspect.getdoc(errors) or "", flags=re.M)
    assert sorted(drawn) == sorted([error.__name__ for error in CLASSES] + ["GraftlineError"])
