"""Evaluate a pull request: what it changes, whether that is better, and a comment that says so.

1. Find the pipelines that the head changed since it left the base, by DVC's graph. None: nothing runs.
2. Bring each one's scores up to date at the merge base, then at the head, beside the checkout.
3. Judge the head's candidate by the base revision's gates against the base revision's candidate, and by its own
   against production.
4. Write a Markdown comment and the result as JSON. Exit code 0: pass; 1: fail; 2: an error; 3: inconclusive, or a
   person has to look, because something that decides was changed or there is nothing to compare with.

    python -m flows.evaluate_pr --base origin/main --head HEAD --out pull-request
"""

import sys
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from graftline.workflow import checkout, process
from graftline.workflow.comment import Answer
from graftline.workflow.process import begin, flow_command
from graftline.workflow.pull_request import EXIT_CODES, StageRunner, evaluate_revisions, parser


@flow(name="evaluate-pr", flow_run_name="evaluate-pr-{head}")
def evaluate_pr(base: str, head: str, out: Path, link: str | None = None) -> Answer:
    """Evaluate what ``head`` changes.

    Args:
        base: revision that the head is to be merged into, such as origin/main; their merge base is compared with.
        head: revision to evaluate: a branch (a plain name will do), a tag or a commit.
        out: folder for comment.md and result.json.
        link: address of the run, for the comment.
    """
    begin()
    root = checkout.project_root()
    checkout.deepen(root, base, head)
    runner = StageRunner(process.resolve, process.reproduce)
    answer = evaluate_revisions(root, base, head, out=out, runner=runner, link=link)
    comment = (out / "comment.md").read_text(encoding="utf-8")
    create_markdown_artifact(comment, key="pull-request", description="The comment on the pull request")
    return answer


def main() -> None:
    """Command line."""
    given = parser().parse_args()
    out: Path = given.out.absolute()
    with flow_command():
        answer = evaluate_pr(given.base, given.head, out, given.link)
    print((out / "comment.md").read_text(encoding="utf-8"))
    sys.exit(EXIT_CODES[answer])


if __name__ == "__main__":
    main()
