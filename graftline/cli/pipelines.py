"""Commands about the project: a new one, its pipelines.yaml, and what this machine lacks."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftline import settings
from graftline.address import Source, parse
from graftline.cli.arguments import AsJson, PipelineName
from graftline.errors import ConfigError, SourceError
from graftline.words import count

if TYPE_CHECKING:
    from graftline.scaffold.project import Difference

Project = Annotated[
    Path,
    typer.Argument(metavar="NAME", help="A new folder, or one to fill; by default this one.", show_default=False),
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Write nothing: say which files graftline writes otherwise by now; code 1 if any."),
]
Update = Annotated[
    bool, typer.Option("--update", help="Write those of them that nobody has changed; code 1 if others are left.")
]


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


def init(name: Project = Path(), check_only: Check = False, update: Update = False) -> None:
    """Make a project. Its pipeline runs at once; what exists is never overwritten."""
    # Reads the evidence and the files: no other command needs it.
    from graftline.scaffold import project
    from graftline.scaffold.files import PIPELINE

    if check_only and update:
        raise ConfigError("give --check or --update, not both: --check writes nothing")
    if update:
        _tell(project.update(name), "left to you; compare them with those of a new project: graftline init FOLDER")
        return
    if check_only:
        _tell(project.compare(name), "`graftline init --update` takes over what is new and what nobody has changed")
        return
    num_files = project.make(name)
    steps = [] if name.resolve() == Path.cwd() else [(f"cd {shlex.quote(str(name))}", "")]
    steps += [
        ("graftline config check", "is pipelines.yaml right? It is the file to edit"),
        (f"graftline retrain {PIPELINE}", "the whole line, on rows that were made by code; minutes on a CPU"),
        ("git add . && git commit", "from then on graftline knows what a pull request changes"),
    ]
    width = max(len(command) for command, _ in steps)
    lines = [f"  {command:<{width}}  {about}".rstrip() for command, about in steps]
    typer.echo("\n".join([f"{name.resolve()} is a project now: {num_files} files, git and DVC", "", *lines]))


def _tell(differences: "Sequence[Difference]", advice: str) -> None:
    """Name files with what is to be said of each; exit code 1 if there are any."""
    from graftline.scaffold.project import MEANINGS

    if not differences:
        typer.echo("every file is as this version of graftline writes it, or yours to change")
        return
    width = max(len(difference.path) for difference in differences)
    for difference in differences:
        typer.echo(f"{difference.path:<{width}}  {MEANINGS[difference.state]}")
    typer.echo(advice)
    raise typer.Exit(1)


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
