"""Write dvc.yaml for the pipelines of pipelines.yaml: ``python docs/make_graph.py``, part of ``make docs``."""

from pathlib import Path

from graftline.digest import write_text
from graftline.settings import load
from graftline.workflow.graph import render

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    write_text(ROOT / "dvc.yaml", render(load(ROOT / "pipelines.yaml").names))
