"""Stage gate: is the candidate good enough? Paired on the same items, with the margins of pipelines.yaml.

It comes after the merge, so that gates may ask about the merged model too. Writes ``verdict.json`` and ``verdict.md``.
A verdict is data: a candidate that fails is no error of this stage, and the release stage refuses it.
"""

import json
from dataclasses import replace

from graftline.digest import write_json, write_text
from graftline.evaluate.gate_rules import GateRule
from graftline.evaluate.gates import judge
from graftline.evaluate.guards import parity_numbers
from graftline.evaluate.scores import read_scores
from graftline.evaluate.verdict import verdict_markdown, verdict_to_dict
from graftline.merge.parity import ParityReport
from tasks import stage
from tasks.stage import Context


def run(context: Context) -> None:
    """Judge the candidate."""
    scores = {path.stem: read_scores(path) for path in (context.folder("evaluate") / "scores").glob("*.jsonl")}
    candidate = scores.pop("candidate")
    candidate = replace(candidate, numbers={**candidate.numbers, **merged_numbers(context)})
    # Nothing is in production at first: the base stands in.
    references = {"production": scores["base"]} | scores
    rules = {name: GateRule(**gate.model_dump()) for name, gate in context.pipeline.gates.items()}
    verdict = judge(rules, candidate, references)
    out = context.folder("gate")
    write_json(out / "verdict.json", verdict_to_dict(verdict))
    write_text(out / "verdict.md", verdict_markdown(verdict))
    stage.logger.info("%s: %s", verdict.outcome, verdict.summary)


def merged_numbers(context: Context) -> dict[str, float]:
    """Merged against unmerged, and the merged model's size; nothing where none is made."""
    record = json.loads((context.folder("merge") / "parity.json").read_text(encoding="utf-8"))
    if not record["merged"]:
        return {}
    parity = ParityReport.from_json(record["parity"])
    return parity_numbers(parity) | {"merged_bytes": float(record["merge"]["num_bytes"])}


def main() -> None:
    """Command line."""
    stage.main("gate", run)


if __name__ == "__main__":
    main()
