"""The command line. It checks arguments and prints; the work is done by the library and, for stages, by ``tasks``.

torch, Prefect and DVC are not imported here, so that ``--help`` comes at once: a stage runs as
``python -m tasks.<stage> PIPELINE`` with the same interpreter, in the folder of pipelines.yaml.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from graftline import config
from graftline.address import parse
from graftline.digest import atomic_write
from graftline.errors import ConfigError, GraftlineError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

STAGES = {
    "fetch": ("fetch", "Download and verify the base and the rows."),
    "validate": ("validate", "Check the rows and split them into training and evaluation rows."),
    "init-base": ("init", "Convert and quantize the base."),
    "train": ("train", "Train the adapter; a killed training goes on where it was."),
    "evaluate": ("evaluate", "Score candidate, production and base on the same rows."),
    "gate": ("gate", "Judge the scores: pass, fail or inconclusive."),
    "merge": ("merge", "Fold the adapter into the base and compare the two."),
    "package": ("package", "Gather what a release holds, with a manifest."),
    "release": ("release", "Publish the package to the release store."),
}
"""Verb to the module in ``tasks`` and what it does, in the line's order."""

app = typer.Typer(
    help="Fine-tune a language model with adapters, prove that it is better, and release it.\n\n"
    "Start with `graftline init`, then `graftline config check`, then `graftline retrain PIPELINE`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
config_app = typer.Typer(help="Look at pipelines.yaml.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")

PipelineName = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A name from pipelines.yaml.", show_default=False)
]
Folder = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to write.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@config_app.command("check", epilog="Example: graftline config check")
def check() -> None:
    """Check pipelines.yaml, and that the files it names exist."""
    loaded = config.load()
    _check_files(loaded)
    num_pipelines, num_channels = len(loaded.names), len(loaded.channels)
    print(
        f"{loaded.path.name} is right: {num_pipelines} pipelines ({', '.join(loaded.names)}), {num_channels} channels"
    )


@config_app.command("show", epilog="Example: graftline config show wordnet-category")
def show(pipeline: PipelineName, as_json: AsJson = False) -> None:
    """Print every value of a pipeline and where it came from; secrets in addresses are masked."""
    settings = config.load().show(pipeline)
    if as_json:
        print(json.dumps([{"key": s.key, "value": s.value, "origin": s.origin} for s in settings], indent=2))
        return
    key_width = max(len(setting.key) for setting in settings)
    origin_width = max(len(setting.origin) for setting in settings)
    for setting in settings:
        value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value, ensure_ascii=False)
        print(f"{setting.key:<{key_width}}  {setting.origin:<{origin_width}}  {value}")


@config_app.command("schema", epilog="Example: graftline config schema > pipelines.schema.json")
def schema() -> None:
    """Print the JSON Schema of pipelines.yaml, for editors."""
    print(json.dumps(config.schema(), indent=2))


@app.command("init", epilog="Example: graftline init my-project")
def init(folder: Folder = Path()) -> None:
    """Write a commented pipelines.yaml to start from."""
    target = folder / config.DEFAULT_FILE
    if target.exists():
        raise ConfigError(f"{target} exists; remove it, or give another folder: graftline init FOLDER")
    with atomic_write(target) as out:
        out.write((Path(__file__).parent / "config" / "starter.yaml").read_bytes())
    print(f"{target} is written; edit it, then run: graftline config check")


@app.command("doctor", epilog="Example: graftline doctor")
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: what is missing, and what to do about it. Exit code 1 if something is."""
    from graftline.doctor import examine, render  # imports torch to ask for CUDA

    findings = examine(Path.cwd())
    print(json.dumps([finding.as_dict() for finding in findings], indent=2) if as_json else render(findings))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command("retrain", epilog="Example: graftline retrain wordnet-category")
def retrain(pipeline: PipelineName) -> None:
    """Run the whole line from data to release; stages that are up to date are skipped."""
    _run_module("flows.retrain", pipeline)


def _add_stage(verb: str, stage: str, purpose: str) -> None:
    @app.command(verb, help=purpose, epilog=f"Example: graftline {verb} wordnet-category")
    def run_stage(pipeline: PipelineName) -> None:
        _run_module(f"tasks.{stage}", pipeline)


for _verb, (_stage, _purpose) in STAGES.items():
    _add_stage(_verb, _stage, _purpose)


def _run_module(module: str, pipeline: str) -> None:
    """Run ``python -m module pipeline`` in the project's folder and end with its exit code."""
    loaded = config.load()
    loaded.pipeline(pipeline)
    file = loaded.root / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        raise ConfigError(f"{file} is missing; run in a graftline checkout, the folder with pipelines.yaml and tasks/")
    with subprocess.Popen([sys.executable, "-m", module, pipeline], cwd=loaded.root) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal sends the signal to the child too; it is left to end in order.
            process.wait()
            raise
    raise typer.Exit(code if code >= 0 else 128 - code)


def _check_files(loaded: config.Config) -> None:
    missing = []
    for name in loaded.names:
        pipeline = loaded.pipeline(name)
        sections: list[config.Base | config.Data | config.Forgetting] = [pipeline.base, pipeline.data]
        if pipeline.evaluate.forgetting:
            sections.append(pipeline.evaluate.forgetting)
        for section in sections:
            source = parse(section.source)
            if source.kind == "path" and not (loaded.root / source.name).exists():
                missing.append(f"{name}: source {source} does not exist")
            prepare = None if isinstance(section, config.Base) else section.prepare
            if prepare and not (loaded.root / prepare).is_file():
                missing.append(f"{name}: prepare {prepare} does not exist")
    if missing:
        paths = "\n  ".join(dict.fromkeys(missing))
        raise ConfigError(f"{loaded.path.name} names files that are missing; paths start in {loaded.root}\n  {paths}")


def main() -> None:
    """Entry point: errors that a user can act on become one line on stderr and exit code 2, never a traceback."""
    try:
        app(prog_name="graftline")
    except GraftlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
