"""The command ``graftline recommend``, which writes nothing.

Base and rows are found as for ``graftline plan``.

    graftline recommend wordnet-category
    graftline recommend wordnet-category --memory 4 --minutes 30
"""

import argparse
import json
import sys
from pathlib import Path

from graftline import settings
from graftline.plan.advice import PipelineAdvice, advise
from graftline.plan.recommend import Budget
from graftline.workflow import stage
from graftline.workflow.plan import base_config, look_at_rows
from graftline.workflow.workspace import Workspace


def make(
    pipeline: settings.Pipeline, at: Workspace, *, budget: Budget, config_file: Path | None = None
) -> PipelineAdvice:
    """Recommend an adapter within a budget, with ``config_file`` (a config.json) in place of the fetched base if given.

    Raises:
        ConfigError: nothing was fetched and no ``config_file`` is given, or it cannot be read.
        DataError, TrainError: any training would fail with this error, or the evidence cannot be read.
    """
    config = base_config(pipeline.base, at, config_file)
    if config_file:
        return advise(at.name, pipeline, config, None, budget=budget)
    return advise(at.name, pipeline, config, look_at_rows(pipeline, at).encoded, budget=budget)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m graftline.workflow.recommend", description="Recommend what to train for a pipeline."
    )
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("--memory", type=float, metavar="GB", help="10^9 bytes; by default what is free now")
    parser.add_argument("--minutes", type=float, metavar="M", help="by default no limit")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json in place of the fetched base")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    args = parser.parse_args()

    def show(pipeline: settings.Pipeline, at: Workspace) -> None:
        memory_bytes = None if args.memory is None else 1e9 * args.memory
        seconds = None if args.minutes is None else 60 * args.minutes
        budget = Budget(memory_bytes=memory_bytes, seconds=seconds)
        made = make(pipeline, at, budget=budget, config_file=args.config)
        print(json.dumps(made.document(), ensure_ascii=False, indent=2) if args.json else made.text())
        if made.made.choice is None:
            sys.exit(1)

    stage.run_guarded("recommend", args.pipeline, show, measure=False)


if __name__ == "__main__":
    main()
