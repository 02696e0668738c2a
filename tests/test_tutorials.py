"""docs/tutorials: the files on each page make a project, and its commands run there, on a tiny base."""

import importlib
import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from graftline import settings
from graftline.evaluate.metrics import summarize
from graftline.evaluate.scores import read_scores
from graftline.workflow.workspace import Workspace
from tests.data.chat_templates import QWEN3
from tests.tiny import make_tiny_llama

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted((DOCS / "tutorials").glob("*.md")), DOCS / "classify.md"]
FURTHER = {"extraction", "reasoning"}
"""Run by `make test-all` alone."""
STAGES = ("fetch", "validate", "init", "train", "evaluate", "merge", "gate")
"""Of `graftline retrain`, until the verdict: a package needs nothing that these pages say."""
MEASURED = {
    "classification": {"accuracy"},
    "classify": {"accuracy", "macro_f1", "class_nll"},
    "extraction": {"field_f1", "json_valid", "honest"},
    "reasoning": {"final", "stop_rate"},
    "tools": {"f1", "nll"},
}


def make_project(page: str, folder: Path) -> None:
    """The page's files, and the base that it takes for granted."""
    make_tiny_llama(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = QWEN3
    tokenizer.save_pretrained(folder / "base")
    for name, content in re.findall(r"```\w+\n# (\S+)\n(.*?)```", page, re.DOTALL):
        (folder / name).write_text(content, encoding="utf-8")


def run(command: str, folder: Path) -> None:
    """A command in this process; each stage as DVC would start it, without the outputs of the time before."""
    _, verb, name, *options = command.split("#")[0].split()
    pipeline, at = settings.load(folder / "pipelines.yaml").pipeline(name), Workspace(folder, name)
    todo = STAGES if verb == "retrain" else (verb,)
    importlib.import_module("graftline.workflow.resolve").run(pipeline, at)
    for stage in todo:
        module = "graftline.workflow.profiling" if options == ["--profile"] else f"tasks.{stage}"
        importlib.import_module(module).run(pipeline, at)


def test_every_page_is_tried_and_listed() -> None:
    assert sorted(page.stem for page in PAGES) == sorted(MEASURED)
    nav = (Path(__file__).parents[1] / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(page.relative_to(DOCS).as_posix() in nav for page in PAGES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.long] * (page.stem in FURTHER)) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_the_commands_of_a_page_run_on_its_files(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    make_project(text, tmp_path)
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for command in commands.strip().splitlines():
        run(command, tmp_path)
    (runs,) = (tmp_path / "runs").iterdir()
    scores = read_scores(runs / "evaluate" / "scores" / "candidate.jsonl")
    assert summarize(scores).keys() >= MEASURED[page.stem]
    verdict = json.loads((runs / "gate" / "verdict.json").read_text(encoding="utf-8"))
    asked = [gate for gate in verdict["gates"] if gate["guard"] is None]
    assert not [gate["reason"] for gate in asked if gate["reason"].startswith("could not run")]
    assert ("slices" in verdict) == (page.stem == "classification")
    assert (tmp_path / "checks").is_dir() == ("--profile" in commands)
    report = json.loads((runs / "validate" / "report.json").read_text(encoding="utf-8"))
    assert any(learned for _, learned in report["sample_parts"])
