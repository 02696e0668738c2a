"""The verbs of the line. A stage runs as ``python -m tasks.<stage> PIPELINE`` in the folder of pipelines.yaml.

The library does not import ``tasks``; a process of its own also frees all memory at its end.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from graftline import limits, settings
from graftline.cli.arguments import AsJson, PipelineName
from graftline.errors import ConfigError
from graftline.workflow.environment import for_flows

STAGES = {
    "fetch": ("fetch", "Download and verify the base and the rows."),
    "validate": ("validate", "Check the rows. They must suit the template, and nothing may leak."),
    "init-base": ("init", "Convert and quantize the base."),
    "train": ("train", "Train the adapter. A killed training goes on where it was."),
    "evaluate": ("evaluate", "Score candidate, production and base. All on the same rows."),
    "gate": ("gate", "Judge the scores. The verdict is pass, fail or inconclusive."),
    "merge": ("merge", "Fold the adapter into the base. The two are compared."),
    "package": ("package", "Gather what a release holds. A manifest names every file."),
    "release": ("release", "Publish the package to the release store."),
}
"""Verb to the module in ``tasks`` and what it does, in the line's order."""

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The base's config.json, before anything was fetched.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("retrain", epilog="Example: graftline retrain wordnet-category")(retrain)
    for verb, (stage, purpose) in STAGES.items():
        _add_stage(app, verb, stage, purpose)
    app.command("plan", epilog="Example: graftline plan wordnet-category --config config.json")(plan)
    app.command("recommend", epilog="Example: graftline recommend wordnet-category --memory 4 --minutes 30")(recommend)


def retrain(pipeline: PipelineName) -> None:
    """Run the whole line. Stages that are up to date are skipped."""
    _run_module("flows.retrain", pipeline)


def plan(
    pipeline: Annotated[str | None, typer.Argument(help="A name from pipelines.yaml.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Say of every pipeline which stages would run again, and why.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Say what a training will take. Coverage, rows, memory, time, who can serve it; nothing is spent or written."""
    if every == (pipeline is not None):
        raise ConfigError("give a pipeline's name, or --all; see `graftline plan --help`")
    if pipeline is None:
        if config_file:
            raise ConfigError("--config is about one pipeline; leave out --all and give its name")
        _run("graftline.workflow.upcoming", settings.load().root, *_about(None, as_json))
        return
    _run_module("graftline.workflow.plan", pipeline, *_about(config_file, as_json))


def recommend(
    pipeline: PipelineName,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Memory for training; by default what is free here now.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Time for training; by default there is no limit.")
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Say what to train: method, rank, bits, learning rate. By evidence and your budget; code 1 if nothing fits."""
    budget = [f"--{name}={value!r}" for name, value in (("memory", memory), ("minutes", minutes)) if value is not None]
    _run_module("graftline.workflow.recommend", pipeline, *budget, *_about(config_file, as_json))


def _about(config_file: Path | None, as_json: bool) -> list[str]:
    """Options that plan and recommend share."""
    return [*(["--config", str(config_file.absolute())] if config_file else []), *(["--json"] if as_json else [])]


def _add_stage(app: typer.Typer, verb: str, stage: str, purpose: str) -> None:
    @app.command(verb, help=purpose, epilog=f"Example: graftline {verb} wordnet-category")
    def run_stage(pipeline: PipelineName) -> None:
        _run_module(f"tasks.{stage}", pipeline)


def _run_module(module: str, pipeline: str, *options: str) -> None:
    """Run a module with a pipeline's name and options in the project's folder and end with its exit code."""
    loaded = settings.load()
    loaded.pipeline(pipeline)
    file = loaded.root / f"{module.replace('.', '/')}.py"
    if not module.startswith("graftline.") and not file.is_file():
        raise ConfigError(
            f"{file} is missing; run in a project, which has it beside pipelines.yaml: `graftline init NAME` makes one"
        )
    _run(module, loaded.root, pipeline, *options)


def _run(module: str, root: Path, *arguments: str) -> None:
    """Run a module with arguments in ``root`` and end with its exit code."""
    # Prefect reads its settings when it is imported, before a flow could say anything.
    defaults = for_flows(root) if module.startswith("flows.") else {}
    # flows and tasks are found in this folder alone.
    environment = defaults | os.environ | {"PYTHONSAFEPATH": ""}
    command = [sys.executable, "-m", "graftline.program", module, *arguments]
    kills_before = limits.memory_kills()
    with subprocess.Popen(command, cwd=root, env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal sends the signal to the child too; it is left to end in order.
            process.wait()
            raise
    if code == -signal.SIGKILL:
        typer.echo(f"error: {module} was ended by SIGKILL: {limits.why_killed(kills_before)}", err=True)
    raise typer.Exit(code if code >= 0 else 128 - code)
