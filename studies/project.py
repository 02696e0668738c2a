"""Scratch repositories: a copy of this project, and a project of many pipelines whose stages do nothing."""

import os
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]


def copy_project(folder: Path, change: dict[str, Any], pipeline: str) -> Path:
    """Copy what git tracks (and new files that it does not ignore), keep one pipeline and apply ``change`` to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "studies/", "docs/")) and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    document = read_yaml(folder)
    document["pipelines"] = {pipeline: document["pipelines"][pipeline]}
    for key, value in change.items():
        section, name = key.split(".")
        document["pipelines"][pipeline][section][name] = value
    write_yaml(folder, document)
    git(folder, "init", "-q")
    commit(folder, "project")
    return folder


def read_yaml(folder: Path) -> Any:
    """The project's pipelines.yaml."""
    return YAML(typ="safe").load((folder / "pipelines.yaml").read_text(encoding="utf-8"))


def write_yaml(folder: Path, document: Any) -> None:
    """Write it."""
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    with (folder / "pipelines.yaml").open("w", encoding="utf-8") as stream:
        yaml.dump(document, stream)


def environment(folder: Path, cache: Path) -> dict[str, str]:
    """A run's environment: code of the copy, the given caches, nothing in the home folder."""
    (cache / "prefect").mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "PYTHONPATH": str(folder),
        "GRAFTLINE_CACHE": str(cache),
        "PREFECT_HOME": str(cache / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
    }


def commit(folder: Path, message: str) -> str:
    """Commit everything; the commit's id."""
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "HEAD")


def git(folder: Path, *arguments: str) -> str:
    """Run git."""
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


SETTINGS: dict[str, Any] = {
    "base": {"source": "path:rows.jsonl", "template": "none"},
    "data": {"source": "path:rows.jsonl", "evaluation_rows": 200, "max_tokens": 64, "labels": ["cat", "dog"]},
    "quantize": {"method": "none"},
    "adapter": {"method": "lora"},
    "train": {"steps": 8, "batch_size": 16, "learning_rate": 0.01},
    "evaluate": {"metric": "accuracy"},
    "gates": {
        "better": {"metric": "accuracy", "direction": "higher", "test": "superiority", "margin": 0.0, "against": "base"}
    },
    "package": {"merged": True},
    "release": {"store": "store", "channel": "production"},
}
STAGES = ("fetch", "validate", "init", "train", "evaluate", "gate", "merge", "package", "release")
STAGE = """\
import pathlib, sys
pathlib.Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
pathlib.Path(sys.argv[2], "done").write_text(sys.argv[1])
"""


def make_many(folder: Path, num_pipelines: int) -> Path:
    """A repository of so many pipelines of nine stages, resolved."""
    (folder / "tasks").mkdir(parents=True)
    for name, text in (("__init__", ""), ("work", STAGE), ("resolve", "")):
        (folder / "tasks" / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"prompt": "barks:", "completion": " dog"}\n', encoding="utf-8")
    (folder / ".gitignore").write_text("/runs/\n", encoding="utf-8")
    pipelines = {f"pipeline-{number:04d}": deepcopy(SETTINGS) for number in range(num_pipelines)}
    write_yaml(folder, {"pipelines": pipelines, "channels": {"production": {}}})
    (folder / "dvc.yaml").write_text(_graph(), encoding="utf-8")
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n", encoding="utf-8")
    (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n", encoding="utf-8")
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "many")
    for name in pipelines:
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "resolved.json").write_text('{"sources": {}, "champion": null}', encoding="utf-8")
    return folder


def _graph() -> str:
    lines = ["vars:", "- pipelines.yaml", "stages:"]
    for number, stage in enumerate(STAGES):
        section = stage if stage in SETTINGS else "data"
        before = [f"runs/${{key}}/{STAGES[number - 1]}"] if number else ["rows.jsonl"]
        lines += [f"  {stage}:", "    foreach: ${pipelines}", "    do:"]
        lines += [f"      cmd: python -m tasks.work {stage} runs/${{key}}/{stage}"]
        lines += ["      params:", "      - pipelines.yaml:", f"        - pipelines.${{key}}.{section}"]
        lines += ["      deps:", *(f"      - {need}" for need in [*before, "tasks/work.py"])]
        lines += ["      outs:", f"      - runs/${{key}}/{stage}"]
    return "\n".join(lines) + "\n"
