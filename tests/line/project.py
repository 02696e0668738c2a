"""A copy of this project in a folder of its own, as a user's checkout would be, with a smaller pipelines.yaml."""

import re
import subprocess
import sys
from pathlib import Path

import psutil

from studies.project import ROOT, copy_project, environment, read_yaml, write_yaml

__all__ = ["ROOT", "copy_project", "environment", "kill_during", "read_yaml", "retrain", "write_yaml"]


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
