"""Stage gate: is the candidate good enough? Paired on the same items, with the margins of pipelines.yaml.

It comes after the merge, so that gates may ask about the merged model too. Writes ``verdict.json`` and ``verdict.md``.
A verdict is data: a candidate that fails is no error of this stage, and the release stage refuses it.
"""

from graftline.digest import write_json, write_text
from graftline.evaluate.verdict import verdict_markdown, verdict_to_dict
from graftline.workflow import scored, stage
from graftline.workflow.judging import judge_scores, judged_files
from graftline.workflow.stage import Context


def run(context: Context) -> None:
    """Judge the candidate."""
    verdict = judge_scores(context, scored.read_all(context))
    out = context.folder("gate")
    write_json(out / "verdict.json", verdict_to_dict(verdict) | {"judged": judged_files(context)})
    write_text(out / "verdict.md", verdict_markdown(verdict))
    stage.logger.info("%s: %s", verdict.outcome, verdict.summary)


def main() -> None:
    """Command line."""
    stage.main("gate", run)


if __name__ == "__main__":
    main()
