"""Every class of the exception tree is raised in some test, and the tree that is drawn is the tree that is there."""

import inspect
import re
from pathlib import Path

from graftline import errors

TESTS = Path(__file__).resolve().parents[1]
CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, errors.GraftlineError) and value is not errors.GraftlineError
]


def test_every_error_is_expected_in_some_test() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    names = [error.__name__ for error in CLASSES]
    unexpected = [name for name in names if not re.search(rf"raises\(\s*\(?[^)]*\b{name}\b", text)]
    assert not unexpected, f"no test expects {', '.join(unexpected)}"


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"^[│├└─ ]*(\w+Error) ", inspect.getdoc(errors) or "", flags=re.M)
    assert sorted(drawn) == sorted([error.__name__ for error in CLASSES] + ["GraftlineError"])
