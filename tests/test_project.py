"""pipelines.yaml is right, the files that it names are there, and dvc.yaml is the graph of its pipelines."""

import subprocess
import sys
from pathlib import Path

from graftline.settings import load
from graftline.workflow.graph import render

ROOT = Path(__file__).resolve().parents[1]


def test_pipelines_yaml_is_right() -> None:
    command = [sys.executable, "-m", "graftline.cli", "config", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_dvc_yaml_is_the_graph_of_these_pipelines() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert text == render(load(ROOT / "pipelines.yaml").names), "run: python -m graftline.workflow.graph"
