"""Trainings of a sweep's cells side by side in one process, before the cells' own stages run.

    python -m graftline.workflow.side_by_side PIPELINE --most N CHECKOUT…

Each checkout is at the point where the train stage would be next. Its training runs here as that stage would run it,
beside others on the same base (`graftline.train.together`), and leaves its checkpoints where the stage looks for them.
The stage then finds its training finished, and writes its files. So DVC knows nothing of this, a cell has what it would
have alone, and one that fails or is killed here goes on in its stage, which says why.
"""

import argparse
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from graftline import logs, settings
from graftline.digest import write_json
from graftline.errors import PreemptedError
from graftline.limits import usable_cores
from graftline.plain_text import count
from graftline.program import guarded
from graftline.train.devices import resolve_device
from graftline.train.together import train_together
from graftline.weights import kept_base
from graftline.weights.identity import read_identity
from graftline.workflow import stage
from graftline.workflow.pinned_base import trained_base
from graftline.workflow.sweep_cells import SIDE_BY_SIDE
from graftline.workflow.training import train_pipeline
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline.side_by_side")


def why_alone(pipeline: settings.Pipeline) -> str | None:
    """Why a pipeline's training cannot run beside others, or gains nothing; None if it may."""
    train, adapter = pipeline.train, pipeline.adapter
    reasons = {
        "its base is not quantized, so there is nothing to share": pipeline.quantize.method == "none",
        "its processes are started apart": train.processes > 1 or train.engine == "ray",
        "it runs on a GPU": resolve_device(train.device) != "cpu",
        "its blocks are compiled": train.compile == "always",
        "it changes the base's own weights": adapter.method == "full" or adapter.bias != "none",
        "it keeps no checkpoint (train.checkpoint_every: 0)": train.checkpoint_every == 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def groups(places: Sequence[Workspace], *, most: int) -> Iterator[list[Workspace]]:
    """Those that can be trained side by side: at most ``most``, on one base, with as many threads. Logs the others."""
    alike: dict[tuple[str, int | None], list[Workspace]] = {}
    for at in places:
        pipeline = _pipeline(at)
        if reason := why_alone(pipeline):
            logger.info("%s is trained alone: %s", at.root.name, reason)
            continue
        base = read_identity(trained_base(pipeline.base, at))
        alike.setdefault((str(base.digest), pipeline.train.threads), []).append(at)
    for found in alike.values():
        for first in range(0, len(found), most):
            group = found[first : first + most]
            if len(group) > 1:
                yield group
            else:
                logger.info("%s is trained alone: no other one is left that fits it", group[0].root.name)


def train_group(group: Sequence[Workspace]) -> None:
    """Train pipelines side by side, and write what it cost beside each one's checkpoints.

    Raises:
        PreemptedError: this process was asked to end; every training kept its last step.
    """
    names = ", ".join(at.root.name for at in group)
    logger.info("%s side by side: %s", count(len(group), "training"), names)
    torch.set_num_threads(_pipeline(group[0]).train.threads or usable_cores())
    started = time.monotonic()
    raised = train_together([partial(_train, at) for at in group])
    seconds = round(time.monotonic() - started, 1)
    for at, error in zip(group, raised, strict=True):
        if error is None:
            cost = {"cells": len(group), "seconds": seconds, "peak_rss_mb": stage.peak_rss_mb()}
            write_json(at.runs / SIDE_BY_SIDE, cost)
        else:
            logger.warning("%s is left to its stage: %s", at.root.name, str(error) or type(error).__name__)
    for error in raised:
        if isinstance(error, PreemptedError):
            raise error


def _train(at: Workspace) -> None:
    """The training of the train stage; its files are the stage's to write."""
    out = at.runs / ".work" / "side-by-side"
    rows, encoded = at.folder("fetch") / "train.jsonl", at.folder("validate") / "encoded" / "training"
    train_pipeline(_pipeline(at), at, rows=rows, encoded=encoded, out=out)
    shutil.rmtree(out)


def _pipeline(at: Workspace) -> settings.Pipeline:
    return settings.load(at.root / settings.DEFAULT_FILE).pipeline(at.name)


def main() -> None:
    """Command line, for `graftline.workflow.sweeping`."""
    parser = argparse.ArgumentParser(description="Train the pipelines of several checkouts side by side.")
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("checkouts", nargs="+", type=Path, help="folders whose next stage is the training")
    parser.add_argument("--most", type=int, required=True, help="trainings at a time")
    parser.add_argument("--until", type=float, default=float("inf"), help="start none later, in seconds since 1970")
    given = parser.parse_args()
    with guarded():
        stage.check_code()
        logs.configure("train", about={"pipeline": given.pipeline, "stage": "train"})
        logging.getLogger("graftline").setLevel(logging.INFO)
        kept = kept_base.keep_bases()
        places = [Workspace(folder.resolve(), given.pipeline) for folder in given.checkouts]
        for group in groups(places, most=given.most):
            if time.time() < given.until:
                train_group(group)
                kept.check()


if __name__ == "__main__":
    main()
