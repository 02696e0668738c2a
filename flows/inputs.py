"""What a pipeline's line is made of, as one digest: if it is the same as last time, there is nothing to run.

Code and settings by DVC's graph of the commit (flows.changes); what moves (new rows, what production holds) by
``resolved.json``, which `tasks.resolve` writes.
"""

import json
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from flows.changes import read_graph
from flows.git import git
from graftline.config import DEFAULT_FILE
from graftline.digest import of_json
from graftline.errors import GraftlineError


def of_pipeline(root: Path, pipeline: str) -> str:
    """Digest of what the pipeline depends on now; empty if no commit holds it, and DVC has to decide."""
    return of_pipelines(root, [pipeline])[pipeline]


def of_pipelines(root: Path, pipelines: list[str]) -> dict[str, str]:
    """The same for many, for the cost of reading the graph once.

    Raises:
        GraftlineError: dvc.yaml or pipelines.yaml cannot be read.
    """
    if not _is_committed(root):
        return dict.fromkeys(pipelines, "")
    graph = read_graph(root, _narrowed(root, git(root, "rev-parse", "HEAD").strip(), pipelines))
    digests = {}
    for pipeline in pipelines:
        stages = {name: [stage.inputs, sorted(stage.needs)] for name, stage in graph[pipeline].items()}
        resolved = json.loads((root / "runs" / pipeline / "resolved.json").read_text())
        digests[pipeline] = str(of_json({"stages": stages, "resolved": resolved}))
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
    document = YAML(typ="safe").load(git(root, "show", f"{commit}:{DEFAULT_FILE}"))
    if document["pipelines"].keys() == set(pipelines):
        return commit
    document["pipelines"] = {name: document["pipelines"][name] for name in pipelines}
    stream = StringIO()
    YAML(typ="safe").dump(document, stream)
    blob = git(root, "hash-object", "-w", "--stdin", stdin=stream.getvalue()).strip()
    entries = git(root, "ls-tree", commit).splitlines()
    tree = [f"100644 blob {blob}\t{DEFAULT_FILE}" if line.endswith(f"\t{DEFAULT_FILE}") else line for line in entries]
    made = git(root, "mktree", stdin="\n".join(tree) + "\n").strip()
    author = ["-c", "user.name=graftline", "-c", "user.email=graftline@invalid"]
    return git(root, *author, "commit-tree", made, "-m", "narrowed").strip()
