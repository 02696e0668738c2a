"""What a project is made of: the content of each file that `graftline init` writes.

Most are this repository's own, with a few words changed (`graftline.scaffold.copied`): in the wheel they lie in
``project/`` beside this file, in a checkout of graftline where they are used. The others are templates.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template

from graftline.errors import GraftlineError
from graftline.extras import install_command
from graftline.plan.evidence import read_evidence
from graftline.scaffold import copied
from graftline.scaffold.rows import as_json_lines
from graftline.scaffold.starter import starter
from graftline.workflow.graph import render

PIPELINE = "my-task"
"""The pipeline of the starter."""

_HERE = Path(__file__).parent
_TEMPLATES = {
    ".gitignore": "gitignore",
    "README.md": "README.md",
    "infra/docker/Dockerfile": "Dockerfile",
    "keys.yaml": "keys.yaml",
    "pyproject.toml": "project.toml",
}


@dataclass(frozen=True)
class Names:
    """What differs from one project to the next."""

    project: str
    pipelines: tuple[str, ...] = (PIPELINE,)
    """In the order of pipelines.yaml."""
    example: str = PIPELINE
    """A pipeline's name, for examples in help and comments."""
    set_up: str = "python -m venv .venv && .venv/bin/pip install ."
    """The command with which CI makes the environment in ``.venv``."""
    pins: str = "pyproject.toml"
    """The file that says which packages: CI's cache of packages goes by it."""


THIS_REPOSITORY = Names(
    "graftline",
    pipelines=("wordnet-category", "wordnet-animal-or-plant"),
    example="wordnet-category",
    set_up="make setup",
    pins="constraints.txt",
)
"""graftline's own repository, whose files are copied."""


def contents(names: Names) -> dict[str, bytes]:
    """Every file of a project by its path, with forward slashes, sorted.

    Raises:
        GraftlineError: this installation of graftline came without them.
    """
    texts = shared(names)
    values = {"project": names.project, "pipeline": names.example, "version": version("graftline")}
    for path, template in _TEMPLATES.items():
        text = (_HERE / "templates" / template).read_text(encoding="utf-8")
        texts[path] = Template(text).substitute(values)
    texts |= {"pipelines.yaml": starter(read_evidence()), "rows.jsonl": as_json_lines()}
    return {path: texts[path].encode("utf-8") for path in sorted(texts)}


def shared(names: Names) -> dict[str, str]:
    """The files that graftline's own repository has in the same words.

    Raises:
        GraftlineError: this installation of graftline came without them.
    """
    root = _HERE / "project"
    root = root if root.is_dir() else _HERE.parents[1]
    try:
        paths = copied.paths(root)
    except FileNotFoundError as error:
        raise GraftlineError(f"{error}; install graftline from its wheel: {install_command('all')}") from error
    texts = {path: _renamed((root / path).read_text(encoding="utf-8"), path, names) for path in paths}
    return texts | {"dvc.yaml": render(names.pipelines)}


def _renamed(text: str, path: str, names: Names) -> str:
    """A file of graftline's repository in the words of another project."""
    this = THIS_REPOSITORY
    changes = {this.example: names.example}
    if path == "prefect.yaml":
        changes[f"\nname: {this.project}\n"] = f"\nname: {names.project}\n"
    if path.startswith((".github/", "infra/ci/")):
        changes |= {this.set_up: names.set_up, this.pins: names.pins}
    for before, after in changes.items():
        text = text.replace(before, after)
    return text
