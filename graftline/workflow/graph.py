"""The dvc.yaml that graftline writes: nine stages for every pipeline of pipelines.yaml.

No stage names a file of code. Each depends on two values of ``runs/<pipeline>/resolved.json``, which is written before
a run: ``code.<stage>``, a digest of its code (`graftline.workflow.code`), and ``settings.<stage>``, the settings that
it uses (`graftline.workflow.stage_settings`).

    python -m graftline.workflow.graph      in the project's folder, after a pipeline was added, renamed or removed
"""

from collections.abc import Iterable
from pathlib import Path

from graftline import settings
from graftline.digest import write_text

_HEAD = """\
# The artefact graph, written by graftline: one stage a step of the line, once for every pipeline of pipelines.yaml.
#   dvc repro train@PIPELINE              bring one stage and what it needs up to date
#   dvc dag                               look at the graph
#   dvc metrics diff, dvc plots show      compare runs
# `params` are values of resolved.json, which `python -m graftline.workflow.resolve PIPELINE` writes before each run:
# the settings that a stage takes, a digest of the code that it executes, and what moved (rows, what production holds).
vars:
  - pipelines.yaml

# `dvc artifacts get REPOSITORY NAME` fetches a package; one line for every pipeline, because DVC has no foreach here.
artifacts:
"""

_STAGES = """
stages:
  fetch:
    foreach: ${pipelines}
    do:
      desc: the pinned base as a model folder in the cache, the rows split into training and evaluation
      cmd: python -m tasks.fetch ${key}
      params: [{"runs/${key}/resolved.json": [code.fetch, settings.fetch, sources]}]
      outs: ["runs/${key}/fetch"]

  validate:
    foreach: ${pipelines}
    do:
      desc: the rows against the declared expectations, the template, leakage; a failing check stops the line
      cmd: python -m tasks.validate ${key}
      params: [{"runs/${key}/resolved.json": [code.validate, settings.validate]}]
      deps: ["runs/${key}/fetch"]
      outs: ["runs/${key}/validate"]

  init:
    foreach: ${pipelines}
    do:
      desc: the base quantized as the pipeline says, with the first values of the adapter where the method has some
      cmd: python -m tasks.init ${key}
      params: [{"runs/${key}/resolved.json": [code.init, settings.init]}]
      deps: ["runs/${key}/fetch/base.json"]
      outs: ["runs/${key}/init"]

  train:
    foreach: ${pipelines}
    do:
      desc: the adapter, trained; checkpoints lie under runs/<pipeline>/.work so that a killed run goes on
      cmd: python -m tasks.train ${key}
      params: [{"runs/${key}/resolved.json": [code.train, settings.train]}]
      deps:
        ["runs/${key}/fetch/train.jsonl", "runs/${key}/validate/report.json",
          "runs/${key}/validate/encoded/training", "runs/${key}/init"]
      outs: ["runs/${key}/train/adapter", "runs/${key}/train/memory.json", "runs/${key}/train/stage.json"]
      metrics: ["runs/${key}/train/metrics.json": {cache: false}]
      plots: ["runs/${key}/train/history.json": {x: step, y: loss}]

  evaluate:
    foreach: ${pipelines}
    do:
      desc: every held-out item scored for candidate, base and what production holds
      cmd: python -m tasks.evaluate ${key}
      params: [{"runs/${key}/resolved.json": [code.evaluate, settings.evaluate, champion, harness]}]
      deps: ["runs/${key}/fetch", "runs/${key}/init", "runs/${key}/train/adapter", "runs/${key}/train/history.json"]
      outs: ["runs/${key}/evaluate/scores", "runs/${key}/evaluate/stage.json"]
      metrics: ["runs/${key}/evaluate/metrics.json": {cache: false}]

  merge:
    foreach: ${pipelines}
    do:
      desc: the adapter folded into its base tensor by tensor, and proof that both answer alike
      cmd: python -m tasks.merge ${key}
      params: [{"runs/${key}/resolved.json": [code.merge, settings.merge]}]
      deps: ["runs/${key}/fetch", "runs/${key}/init", "runs/${key}/train/adapter"]
      outs: ["runs/${key}/merge"]

  gate:
    foreach: ${pipelines}
    do:
      desc: the verdict, paired on the same items
      cmd: python -m tasks.gate ${key}
      params: [{"runs/${key}/resolved.json": [code.gate, settings.gate]}]
      deps:
        ["runs/${key}/fetch", "runs/${key}/validate/report.json", "runs/${key}/init", "runs/${key}/train/adapter",
          "runs/${key}/evaluate/scores", "runs/${key}/merge/parity.json"]
      outs: ["runs/${key}/gate"]

  package:
    foreach: ${pipelines}
    do:
      desc: one folder with all that a release needs, its model card, its report and its manifest
      cmd: python -m tasks.package ${key}
      params: [{"runs/${key}/resolved.json": [code.package, settings.package]}]
      deps:
        ["runs/${key}/fetch", "runs/${key}/validate", "runs/${key}/init", "runs/${key}/train/adapter",
          "runs/${key}/train/history.json", "runs/${key}/train/memory.json", "runs/${key}/evaluate",
          "runs/${key}/merge", "runs/${key}/gate"]
      outs: ["runs/${key}/package"]

  release:
    foreach: ${pipelines}
    do:
      desc: the package in the release store, every file verified there, the manifest last
      cmd: python -m tasks.release ${key}
      params: [{"runs/${key}/resolved.json": [code.release, settings.release]}]
      deps: ["runs/${key}/package"]
      outs: ["runs/${key}/release"]
"""


def render(pipelines: Iterable[str]) -> str:
    """The file for pipelines of these names."""
    lines = [f"  {name}: {{ path: runs/{name}/package, type: model }}\n" for name in pipelines]
    return "".join([_HEAD, *lines, _STAGES])


def main() -> None:
    """Write dvc.yaml for the pipelines of this folder's pipelines.yaml."""
    write_text(Path("dvc.yaml"), render(settings.load().names))


if __name__ == "__main__":
    main()
