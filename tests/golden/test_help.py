"""What users read before they do anything: every verb's help, the schema of pipelines.yaml, two pipelines' values."""

import json
import re
from pathlib import Path

import pytest

from tests.golden import product
from tests.golden.record import Golden

ROOT = Path(__file__).resolve().parents[2]
PIPELINES = ("wordnet-category", "wordnet-animal-or-plant")


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 columns, no colours, in the project's folder."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(ROOT)


def test_every_verb_has_the_recorded_help(golden: Golden) -> None:
    pages = [
        f"$ graftline {' '.join([*verb, '--help'])}\n{product.graftline(*verb, '--help')}" for verb in product.verbs()
    ]
    assert len(pages) > 15
    golden.text("help/graftline.txt", "\n".join(pages))


@pytest.mark.parametrize("module", product.COMMANDS)
def test_every_module_that_is_run_has_the_recorded_help(module: str, golden: Golden) -> None:
    golden.text(f"help/{module}.txt", product.help_of(module))


def test_the_schema_of_pipelines_yaml_is_the_recorded_one(golden: Golden) -> None:
    golden.text("config/schema.json", json.dumps(product.schema(), indent=1, ensure_ascii=False))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_shown_with_the_recorded_values(name: str, golden: Golden) -> None:
    shown = product.graftline("config", "show", name)
    # A comment more in pipelines.yaml moves every line: where a value comes from counts, not its line.
    golden.text(f"config/{name}.txt", re.sub(r"pipelines\.yaml:\d+", "pipelines.yaml:…", shown))
