"""What a pipeline's line is made of, as one digest: if it is the same as last time, there is nothing to run.

Code and settings by DVC's graph of the commit (`graftline.workflow.changes`); what moves (new rows, what production
holds) by what `graftline.workflow.resolve` finds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftline.digest import of_json
from graftline.errors import GraftlineError
from graftline.settings import DEFAULT_FILE, narrowed, parse_config
from graftline.workflow.changes import read_graph
from graftline.workflow.git import git


def combine(code: str, resolved: Mapping[str, Any]) -> str:
    """Digest of what a pipeline depends on: of its code and settings (`of_code`), and of what moves.

    Empty where the former is: no commit holds them, and DVC has to decide.
    """
    return str(of_json({"code": code, "resolved": resolved})) if code else ""


def of_code(root: Path, pipelines: list[str]) -> dict[str, str]:
    """Digest of each pipeline's code and settings, for the cost of reading the graph once.

    Empty if no commit holds them.

    Raises:
        GraftlineError: dvc.yaml or pipelines.yaml cannot be read.
    """
    if not _is_committed(root):
        return dict.fromkeys(pipelines, "")
    graph = read_graph(root, _narrowed(root, git(root, "rev-parse", "HEAD").strip(), pipelines))
    digests = {}
    for pipeline in pipelines:
        stages = {name: [stage.inputs, sorted(stage.needs)] for name, stage in graph[pipeline].items()}
        digests[pipeline] = str(of_json(stages))
    return digests


def _is_committed(root: Path) -> bool:
    try:
        return not git(root, "status", "--porcelain", "--untracked-files=no").strip()
    except (GraftlineError, FileNotFoundError):
        return False  # No repository, or no git.


def _narrowed(root: Path, commit: str, pipelines: list[str]) -> str:
    """A commit like the given one whose pipelines.yaml has only these pipelines; on no branch, git removes it in time.

    DVC reads the stages of every pipeline that is there: for one of a thousand that would take minutes.
    """
    data = git(root, "show", f"{commit}:{DEFAULT_FILE}").encode()
    if set(parse_config(data, Path(DEFAULT_FILE)).names) == set(pipelines):
        return commit
    blob = git(root, "hash-object", "-w", "--stdin", stdin=narrowed(data, pipelines, DEFAULT_FILE)).strip()
    entries = git(root, "ls-tree", commit).splitlines()
    tree = [f"100644 blob {blob}\t{DEFAULT_FILE}" if line.endswith(f"\t{DEFAULT_FILE}") else line for line in entries]
    made = git(root, "mktree", stdin="\n".join(tree) + "\n").strip()
    author = ["-c", "user.name=graftline", "-c", "user.email=graftline@invalid"]
    return git(root, *author, "commit-tree", made, "-m", "narrowed").strip()
