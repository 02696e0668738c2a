"""Stage gate: is the candidate good enough? Paired on the same items, with the margins of pipelines.yaml.

Writes ``verdict.json`` and ``verdict.md``. A verdict is data: a candidate that fails is no error of this stage, and the
release stage refuses it.
"""

from graftline.digest import write_json, write_text
from graftline.evaluate.gate_rules import GateRule
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import read_scores
from graftline.evaluate.verdict import verdict_markdown, verdict_to_dict
from tasks import stage
from tasks.stage import Context


def run(context: Context) -> None:
    """Judge the candidate."""
    scores = {path.stem: read_scores(path) for path in (context.folder("evaluate") / "scores").glob("*.jsonl")}
    candidate = scores.pop("candidate")
    # Nothing is in production at first: the base stands in.
    references = {"production": scores["base"]} | scores
    rules = {name: GateRule(**gate.model_dump()) for name, gate in context.pipeline.gates.items()}
    verdict = judge(rules, candidate, references)
    out = context.folder("gate")
    write_json(out / "verdict.json", verdict_to_dict(verdict))
    write_text(out / "verdict.md", verdict_markdown(verdict))
    stage.logger.info("%s: %s", verdict.outcome, verdict.summary)


def main() -> None:
    """Command line."""
    stage.main("gate", run)


if __name__ == "__main__":
    main()
