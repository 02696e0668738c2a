"""Evaluate a pull request: what it changes, whether that is better, and a comment that says so.

1. Find the pipelines that the head changed since it left the base, by DVC's graph. None: nothing runs.
2. Bring each one's scores up to date at the merge base, then at the head, beside the checkout.
3. Judge the head's candidate by the base revision's gates against the base revision's candidate, and by its own
   against production.
4. Write a Markdown comment and the result as JSON. Exit code 0: pass; 1: fail; 2: an error; 3: inconclusive, or a
   person has to look, because something that decides was changed or there is nothing to compare with.

    python -m flows.evaluate_pr --base origin/main --head HEAD --out pull-request
"""

import argparse
import sys
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.retrain import reproduce, resolve
from graftline.settings import DEFAULT_FILE
from graftline.workflow import checkout
from graftline.workflow.command import explained_errors
from graftline.workflow.comment import Answer
from graftline.workflow.git import git
from graftline.workflow.pull_request import Runner, evaluate_revisions

EXIT_CODES: dict[Answer, int] = {"pass": 0, "fail": 1, "inconclusive": 3, "needs a look": 3}
"""2 is an error. A server shows 3 as a neutral check."""


@flow(name="evaluate-pr", flow_run_name="evaluate-pr-{head}")
def evaluate_pr(base: str, head: str, out: Path, link: str | None = None) -> Answer:
    """Evaluate what ``head`` changes.

    Args:
        base: revision that the head is to be merged into, such as origin/main; their merge base is compared with.
        head: revision to look at: a branch (a plain name will do), a tag or a commit.
        out: folder for comment.md and result.json.
        link: address of the run, for the comment.
    """
    root = _project_root()
    checkout.deepen(root, base, head)
    runner = Runner(resolve, reproduce)
    outcome = evaluate_revisions(root, base, head, out=out, runner=runner, link=link)
    comment = (out / "comment.md").read_text(encoding="utf-8")
    create_markdown_artifact(comment, key="pull-request", description="What the pull request is told")
    return outcome


def _project_root() -> Path:
    """The current folder, or its repository's root: aliases and people start commands in folders of a project."""
    here = Path.cwd()
    return here if (here / DEFAULT_FILE).is_file() else Path(git(here, "rev-parse", "--show-toplevel").strip())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.evaluate_pr",
        description="Evaluate what a pull request changes.",
        epilog="exit codes: 0 pass, 1 fail, 2 error, 3 inconclusive or for a person to look at. "
        "Example: python -m flows.evaluate_pr --base origin/main --head HEAD --out pull-request",
    )
    parser.add_argument("--base", required=True, help="revision to merge into; the merge base is compared with")
    parser.add_argument("--head", default="HEAD", help="revision to look at (default HEAD)")
    parser.add_argument("--out", type=Path, default=Path("pull-request"), help="folder for comment.md and result.json")
    parser.add_argument("--link", help="address of the run, for the comment")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    with explained_errors():
        outcome = evaluate_pr(arguments.base, arguments.head, out, arguments.link)
    print((out / "comment.md").read_text(encoding="utf-8"))
    sys.exit(EXIT_CODES[outcome])


if __name__ == "__main__":
    main()
