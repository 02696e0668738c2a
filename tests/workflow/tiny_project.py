"""A scratch repository with this project, a tiny base and rows that a few steps learn: a stage takes seconds."""

import json
import random
from pathlib import Path
from typing import Any

from studies.project import ROOT, commit, copy_project, git, read_yaml, write_yaml
from tests.tiny import make_tiny_llama

__all__ = ["PIPELINE", "change", "commit", "git", "make_repository", "make_rows", "tiny_settings"]
PIPELINE = "pets"
WORDS = {"cat": ["purrs", "meows", "climbs"], "dog": ["barks", "fetches", "digs"]}


def make_repository(folder: Path) -> Path:
    """The project at its first commit, on the branch ``main``."""
    copy_project(folder, {}, "wordnet-animal-or-plant")
    make_tiny_llama(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(400)))
    write_yaml(folder, {"pipelines": {PIPELINE: tiny_settings()}, "channels": {"production": {}}})
    (folder / "keys.yaml").write_text("keys: []\nunsigned: true\n", encoding="utf-8")
    # The base is part of the repository here, so that the worktree has it too.
    (folder / ".gitignore").write_text((ROOT / ".gitignore").read_text() + "/pull-request/\n")
    git(folder, "branch", "-M", "main")
    commit(folder, "tiny pipeline")
    return folder


def tiny_settings() -> dict[str, Any]:
    """One pipeline of pipelines.yaml."""
    return {
        "base": {"source": "path:base", "dtype": "float32", "template": "none"},
        "data": {
            "source": "path:rows.jsonl",
            "evaluation_rows": 120,
            "max_tokens": 64,
            "labels": ["cat", "dog"],
        },
        "quantize": {"method": "none"},
        "adapter": {"method": "lora", "rank": 4, "alpha": 8},
        "train": {"steps": 8, "batch_size": 16, "learning_rate": 0.01, "threads": 1, "checkpoint_every": 50},
        "evaluate": {"metric": "accuracy"},
        "gates": {
            "accuracy": {
                "metric": "accuracy",
                "direction": "higher",
                "test": "non-inferiority",
                "margin": 0.1,
                "against": "production",
            }
        },
        # Eight steps do not teach a random model to end its answers.
        "guards": {"stops": "off"},
        "package": {"merged": True, "dtype": "float32"},
        "release": {"store": "store", "channel": "production"},
    }


def make_rows(count: int) -> list[dict[str, str]]:
    """Rows whose label follows from one word; no two prompts are alike."""
    draw = random.Random(0)
    rows = []
    for index in range(count):
        label = ("cat", "dog")[index % 2]
        noise = " ".join(draw.choice("abcdefghijklmnopqrstuvwxyz") * 2 for _ in range(6))
        rows.append({"prompt": f"{noise} {draw.choice(WORDS[label])}:", "completion": f" {label}"})
    return rows


def change(folder: Path, section: str, **values: Any) -> None:
    """Other values in a section of the pipeline."""
    document = read_yaml(folder)
    document["pipelines"][PIPELINE][section] |= values
    write_yaml(folder, document)
