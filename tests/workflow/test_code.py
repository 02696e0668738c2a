"""What counts as code of a stage, and what does not."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

from graftline.workflow import code
from graftline.workflow.stages import STAGES

WORK = '''\
"""Trains."""
from typing import TYPE_CHECKING

import torch
from graftline.errors import ConfigError

from helpers import steps

if TYPE_CHECKING:
    from graftline.registry.channel import Entry


def main(rate: float) -> int:
    """Train for a while."""
    # Slowly.
    logger.info("training at %s", rate)
    if rate <= 0:
        raise ConfigError(f"{rate} is too low")
    refusal = ConfigError("too late")
    return steps() * 2
'''
FILES = {"tasks/__init__.py": '"""Stages."""', "tasks/train.py": WORK, "helpers.py": "def steps():\n    return 3\n"}


def reading(files: dict[str, str]) -> code.Read:
    return lambda path: files[path].encode() if path in files else None


def digest(**changed: str) -> str:
    return code.of_stage("train", reading(FILES | changed)).digest


def replaced(old: str, new: str) -> dict[str, str]:
    assert old in WORK
    return {"tasks/train.py": WORK.replace(old, new)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Trains."""', '"""Trains an adapter."""'),
        ("Train for a while.", "Train for long."),
        ("    # Slowly.\n", ""),
        ("training at", "now training at"),
        ("is too low", "must be above 0"),
        ("too late", "later than that"),
        ("rate: float) -> int", "rate: int) -> float"),
        ("graftline.registry.channel import Entry", "graftline.registry.keys import KeyRing"),
        ("    return steps() * 2", "\n\n    return (steps() * 2)"),
    ],
)
def test_words_and_hints_change_nothing(old: str, new: str) -> None:
    assert digest(**replaced(old, new)) == digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* 2", "* 3"),
        ("<= 0", "< 0"),
        ("raise ConfigError", "raise ValueError"),
        ("    if rate", "    rate += 1\n    if rate"),
        ("from helpers import steps", "from helpers import steps\nfrom graftline.weights.quant import scheme"),
    ],
)
def test_what_is_executed_counts(old: str, new: str) -> None:
    assert digest(**replaced(old, new)) != digest()


def test_a_module_of_the_project_that_a_stage_imports_counts() -> None:
    assert digest(**{"helpers.py": "def steps():\n    return 4\n"}) != digest()
    assert digest(**{"others.py": "x = 1\n"}) == digest()


def test_imports_inside_functions_and_modules_named_in_a_string_count() -> None:
    inside = replaced("    # Slowly.\n", "    from graftline.weights.quant import scheme\n")
    named = replaced("    # Slowly.\n", '    load("graftline.weights.quant.scheme")\n')
    for changed in (inside, named):
        assert "graftline.weights.quant.scheme" in code.of_stage("train", reading(FILES | changed)).modules


def test_relative_imports_are_followed() -> None:
    files = FILES | replaced("from helpers import steps", "from . import shared\nfrom .shared import steps")
    files |= {"tasks/shared.py": "def steps():\n    return 3\n"}
    assert "tasks.shared" in code.of_stage("train", reading(files)).modules


def test_a_package_runs_when_a_module_in_it_is_imported() -> None:
    files = FILES | replaced("from helpers import steps", "from kit.helpers import steps")
    files |= {"kit/__init__.py": "", "kit/helpers.py": "def steps():\n    return 3\n"}
    before = code.of_stage("train", reading(files)).digest
    assert code.of_stage("train", reading(files | {"kit/__init__.py": "import os\n"})).digest != before


def test_what_tells_about_the_work_does_not_count() -> None:
    assert "graftline.errors" not in code.of_stage("train", reading(FILES)).modules


def test_versions_of_libraries_that_compute_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = code.of_stage("train", reading(FILES))
    assert found.libraries == {"torch": metadata.version("torch")}
    monkeypatch.setattr(code, "_version", lambda name: "0.1")
    assert code.of_stage("train", reading(FILES)).digest != found.digest


def test_circular_imports_end() -> None:
    files = FILES | {"helpers.py": "from tasks import train\n\ndef steps():\n    return 3\n"}
    assert set(code.of_stage("train", reading(files)).modules) >= {"helpers", "tasks.train"}


def test_a_module_that_cannot_be_parsed_counts_by_its_bytes() -> None:
    first, second = (digest(**{"helpers.py": text}) for text in ("def (", "def )"))
    assert first != second


def test_the_installed_package_is_read_where_the_project_has_none() -> None:
    found = code.of_stage("train", reading(FILES | replaced("helpers", "graftline.digest")))
    assert "graftline.digest" in found.modules


def in_settings(body: str) -> str:
    files = FILES | replaced("from helpers import steps", "from graftline.settings.model import Train")
    files |= {"graftline/__init__.py": "", "graftline/settings/__init__.py": "", "graftline/settings/model.py": body}
    return code.of_stage("train", reading(files)).digest


SECTION = '''class Train:
    """How."""
    rate: float = 1.0
    """Per step."""

    def steps(self) -> int:
        return 4
'''


def test_a_section_of_the_settings_counts_by_its_methods_alone() -> None:
    field = SECTION.replace("    def", "    momentum: float = 0.9\n    '''Share that is kept.'''\n\n    def")
    check = SECTION + '\n    @field_validator("rate")\n    def check(cls, value):\n        return value\n'
    assert in_settings(SECTION) == in_settings(field) == in_settings(check)
    assert in_settings(SECTION) != in_settings(SECTION.replace("return 4", "return 5"))


def test_templates_that_a_module_names_count_and_what_they_include() -> None:
    files = FILES | replaced("    # Slowly.\n", '    page("report.html")\n')
    files |= {"tasks/templates/report.html": "{% include 'head.html' %}", "tasks/templates/head.html": "<title>"}
    first = code.of_stage("train", reading(files)).digest
    assert code.of_stage("train", reading(files | {"tasks/templates/head.html": "<h1>"})).digest != first


def test_the_report_s_template_is_part_of_packaging_and_the_evidence_of_no_stage() -> None:
    root = Path(__file__).resolve().parents[2]
    named = {stage: code.of_stage(stage, code.in_folder(root)).modules for stage in STAGES}
    assert "graftline/release/templates/report.html" in named["package"]
    assert "graftline/release/templates/page.css" in named["package"]
    assert not [stage for stage, modules in named.items() if any("evidence" in name for name in modules)]


def test_stages_before_init_know_no_quantizer() -> None:
    root = Path(__file__).resolve().parents[2]
    for stage in ("fetch", "validate"):
        names = code.of_stage(stage, code.in_folder(root)).modules
        assert not [name for name in names if name.startswith("graftline.weights.quant")]


def test_every_module_that_is_left_out_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    places = [root / name.replace(".", "/") for name in code.MACHINERY]
    assert not [place for place in places if not (place.with_suffix(".py").is_file() or place.is_dir())]


@pytest.mark.parametrize("line", ["import graftline", "from graftline import train_adapter"])
def test_a_stage_that_uses_the_public_names_runs_all_that_is_behind_them(line: str) -> None:
    files = FILES | replaced("from helpers import steps", f"{line}\nfrom helpers import steps")
    assert "graftline.train.loop" in code.of_stage("train", reading(files)).modules
    assert "graftline.train.loop" not in code.of_stage("train", reading(FILES)).modules


def test_modules_may_be_read_by_many_threads_at_once() -> None:
    sources = [f"x = {'(' * 30}{number}{')' * 30}\ny = {[0] * 300}\n".encode() for number in range(40)]

    def let_another_thread_go_on(*_: object) -> None:
        time.sleep(1e-4)

    # A tree's parts are made while the garbage collector may run code that lets go of Python's lock.
    threshold = gc.get_threshold()
    gc.callbacks.append(let_another_thread_go_on)
    gc.set_threshold(100)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = [made.digest for made in pool.map(code._meaning, sources, ["a"] * len(sources))]
    finally:
        gc.callbacks.remove(let_another_thread_go_on)
        gc.set_threshold(*threshold)
    code._meaning.cache_clear()
    assert found == [code._meaning(source, "a").digest for source in sources]
