"""A copy of this project in a folder of its own, as a user's checkout would be, with a smaller pipelines.yaml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]


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
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=folder, check=True)
    subprocess.run(
        ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "project"],
        cwd=folder,
        check=True,
    )
    return folder


def read_yaml(folder: Path) -> Any:
    return YAML(typ="safe").load((folder / "pipelines.yaml").read_text())


def write_yaml(folder: Path, document: Any) -> None:
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    with (folder / "pipelines.yaml").open("w") as stream:
        yaml.dump(document, stream)


def environment(folder: Path, cache: Path) -> dict[str, str]:
    """A run's environment: code of the copy, caches of the test session, nothing in the home folder."""
    (cache / "prefect").mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "PYTHONPATH": str(folder),
        "GRAFTLINE_CACHE": str(cache),
        "PREFECT_HOME": str(cache / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
    }


def kill_during(folder: Path, cache: Path, pipeline: str, moment: str) -> str:
    """Start the flow and kill it and everything under it, as a power cut would, once its log holds ``moment``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.retrain", pipeline],
        cwd=folder,
        env=environment(folder, cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    log = ""
    for line in process.stdout:
        log += line
        if re.search(moment, line):
            break
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.wait()
    process.stdout.close()
    return log


def retrain(folder: Path, cache: Path, pipeline: str) -> subprocess.CompletedProcess[str]:
    """Run the flow as `make demo` does."""
    return subprocess.run(
        [sys.executable, "-m", "flows.retrain", pipeline],
        cwd=folder,
        env=environment(folder, cache),
        capture_output=True,
        text=True,
        timeout=1500,
    )
