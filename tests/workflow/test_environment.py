"""Stages run the code of the folder that they are started in, whatever this process inherited."""

import os
import sys
from pathlib import Path

import pytest

from graftline.workflow import stages
from tests.line.project import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout whose stage says whose code it is, and another one that is in the way."""
    for name in ("own", "other"):
        (tmp_path / name / "tasks").mkdir(parents=True)
        (tmp_path / name / "tasks" / "__init__.py").touch()
        (tmp_path / name / "tasks" / "say.py").write_text(f"import sys; print({name!r}, sys.flags.optimize)")
    return tmp_path / "own"


def say(tree: Path, *command: str) -> list[str]:
    lines: list[str] = []
    words = command or (sys.executable, "-m", "tasks.say")
    stages.run_command(words, stage="say", pipeline="pets", root=tree, on_line=lines.append)
    return lines


def test_a_stage_runs_the_code_of_its_folder_whatever_python_inherits(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tree.parent / "other"
    (other / "start.py").write_text("print('start')")
    (other / "sitecustomize.py").write_text("print('site')")
    for name, value in {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(other),
        "PYTHONSTARTUP": str(other / "start.py"),
        "PYTHONOPTIMIZE": "2",
        "PYTHONHOME": str(other),
        "PYTHONPLATLIBDIR": "nowhere",
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "VIRTUAL_ENV": str(other),
    }.items():
        monkeypatch.setenv(name, value)
    assert say(tree) == ["own 0"]


def test_the_python_of_a_stage_is_the_flow_s_though_a_shell_s_files_name_another(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tree.parent / "other"
    (other / "python").write_text("#!/bin/sh\necho another python\n")
    (other / "python").chmod(0o755)
    (other / "env").write_text(f"PATH={other}:$PATH\n")
    monkeypatch.setenv("PATH", os.pathsep.join([str(other), os.environ["PATH"]]))
    monkeypatch.setenv("BASH_ENV", str(other / "env"))
    monkeypatch.setenv("BASH_FUNC_python%%", "() { echo another function; }")
    assert say(tree, "bash", "-c", "python -m tasks.say") == ["own 0"]


def test_a_relative_cache_is_that_of_the_folder_that_the_flow_was_started_in(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.parent)
    monkeypatch.setenv("GRAFTLINE_CACHE", "shared/cache")
    assert say(tree, "sh", "-c", "echo $GRAFTLINE_CACHE") == [str(tree.parent / "shared" / "cache")]


@pytest.mark.parametrize("name", ["AWS_SHARED_CREDENTIALS_FILE", "SSL_CERT_FILE", "GIT_CONFIG_GLOBAL", "HF_HOME"])
def test_a_relative_file_is_that_of_the_folder_that_the_flow_was_started_in(
    tree: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tree.parent)
    monkeypatch.setenv(name, "team/file")
    assert say(tree, "printenv", name) == [str(tree.parent / "team" / "file")]
    monkeypatch.setenv(name, "")  # Set to nothing is a meaning of its own.
    assert say(tree, "sh", "-c", f'echo "<${name}>"') == ["<>"]


def test_hooks_are_off_for_whatever_git_a_stage_or_dvc_runs(tree: Path) -> None:
    assert say(tree, "git", "config", "core.hooksPath") == [os.devnull]


def test_a_stage_refuses_to_run_another_checkout_s_code(tmp_path: Path) -> None:
    (tmp_path / "graftline" / "workflow").mkdir(parents=True)
    (tmp_path / "graftline" / "workflow" / "stage.py").touch()
    command = (
        "env",
        f"PYTHONPATH={ROOT}",
        "PYTHONSAFEPATH=1",
        sys.executable,
        "-m",
        "graftline.workflow.resolve",
        "pets",
    )
    with pytest.raises(stages.StageFailedError, match=rf"exit code 2.*runs the code of {ROOT}, not that of {tmp_path}"):
        say(tmp_path, *command)
