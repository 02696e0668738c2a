"""Commands about the project: pipelines.yaml, a starter, and what this machine lacks."""

import json
from pathlib import Path
from typing import Annotated

import typer

from graftline import settings
from graftline.address import Source, parse
from graftline.cli.arguments import AsJson, PipelineName
from graftline.digest import write_text
from graftline.errors import ConfigError, SourceError
from graftline.words import count

Folder = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to write.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(help="Look at pipelines.yaml.", no_args_is_help=True, rich_markup_mode=None)
    group.command("check", epilog="Example: graftline config check")(check)
    group.command("show", epilog="Example: graftline config show wordnet-category")(show)
    group.command("schema", epilog="Example: graftline config schema > pipelines.schema.json")(schema)
    app.add_typer(group, name="config")
    app.command("init", epilog="Example: graftline init my-project")(init)
    app.command("doctor", epilog="Example: graftline doctor")(doctor)


def check() -> None:
    """Check pipelines.yaml. The files that it names must exist, too."""
    loaded = settings.load()
    missing = list(dict.fromkeys(_missing_files(loaded)))
    if missing:
        paths = "\n  ".join(missing)
        raise ConfigError(f"{loaded.path.name} names files that are missing; paths start in {loaded.root}\n  {paths}")
    pipelines, channels = count(len(loaded.names), "pipeline"), count(len(loaded.channels), "channel")
    names = ", ".join(loaded.names)
    typer.echo(f"{loaded.path.name} is right: {pipelines} ({names}), {channels}")


def show(pipeline: PipelineName, as_json: AsJson = False) -> None:
    """Print a pipeline's values. Each with the line it came from; secrets in addresses are masked."""
    shown = settings.load().show(pipeline)
    if as_json:
        typer.echo(json.dumps([{"key": s.key, "value": s.value, "origin": s.origin} for s in shown], indent=2))
        return
    key_width = max(len(setting.key) for setting in shown)
    origin_width = max(len(setting.origin) for setting in shown)
    for setting in shown:
        value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value, ensure_ascii=False)
        typer.echo(f"{setting.key:<{key_width}}  {setting.origin:<{origin_width}}  {value}")


def schema() -> None:
    """Print the JSON Schema of pipelines.yaml, for editors."""
    typer.echo(json.dumps(settings.schema(), indent=2))


def init(folder: Folder = Path()) -> None:
    """Write a commented pipelines.yaml to start from."""
    target = folder / settings.DEFAULT_FILE
    if target.exists():
        raise ConfigError(f"{target} exists; remove it, or give another folder: graftline init FOLDER")
    from graftline.cli.starter import starter  # reads the evidence: no other command needs it
    from graftline.plan.evidence import read_evidence

    write_text(target, starter(read_evidence()))
    typer.echo(f"{target} is written; edit it, then run: graftline config check")


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine. What is missing, and what to do about it; exit code 1 if something is."""
    from graftline.doctor import examine, render  # imports torch to ask for CUDA

    findings = examine(Path.cwd())
    typer.echo(json.dumps([finding.as_dict() for finding in findings], indent=2) if as_json else render(findings))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _is_there(source: Source, root: Path) -> bool:
    """Whether the fetch stage will find it: ``~`` is the home folder."""
    from graftline.data.sources.local import find

    try:
        find(source, root)
    except SourceError:
        return False
    return True


def _missing_files(loaded: settings.Config) -> list[str]:
    missing = []
    for name in loaded.names:
        pipeline = loaded.pipeline(name)
        sections: list[settings.Base | settings.Data | settings.Forgetting] = [pipeline.base, pipeline.data]
        if pipeline.evaluate.forgetting:
            sections.append(pipeline.evaluate.forgetting)
        for section in sections:
            source = parse(section.source)
            if source.kind == "path" and not _is_there(source, loaded.root):
                missing.append(f"{name}: source {source} does not exist")
            prepare = None if isinstance(section, settings.Base) else section.prepare
            if prepare and not (loaded.root / prepare).is_file():
                missing.append(f"{name}: prepare {prepare} does not exist")
        harness = pipeline.evaluate.harness
        if harness and harness.folder and not (loaded.root / harness.folder).is_dir():
            missing.append(f"{name}: harness folder {harness.folder} does not exist")
    return missing
