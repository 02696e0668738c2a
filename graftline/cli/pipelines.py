"""Commands about the project: pipelines.yaml, a new project, the doctor, and the stages of the line."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftline import limits, settings
from graftline.address import parse
from graftline.cli.arguments import AsJson, PipelineName
from graftline.errors import ConfigError, SourceError
from graftline.plain_text import count
from graftline.workflow.environment import for_flows

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
    group = typer.Typer(help="Check and show pipelines.yaml.", no_args_is_help=True, rich_markup_mode=None)
    group.command("check", epilog="Example: graftline config check")(check)
    group.command("show", epilog="Example: graftline config show wordnet-category")(show)
    group.command("schema", epilog="Example: graftline config schema > pipelines.schema.json")(schema)
    app.add_typer(group, name="config")
    app.command("init", epilog="Example: graftline init my-project")(init)
    app.command("doctor", epilog="Example: graftline doctor")(doctor)


def check() -> None:
    """Check pipelines.yaml. The files that it names must exist too."""
    loaded = settings.load()
    missing = list(dict.fromkeys(_missing_files(loaded)))
    if missing:
        paths = "\n  ".join(missing)
        raise ConfigError(f"{loaded.path.name} names files that are missing; paths start in {loaded.root}\n  {paths}")
    for name in loaded.names:
        _check_base(loaded, loaded.pipeline(name))
    pipelines, channels = count(len(loaded.names), "pipeline"), count(len(loaded.channels), "channel")
    names = ", ".join(loaded.names)
    typer.echo(f"{loaded.path.name} is right: {pipelines} ({names}), {channels}")


def show(pipeline: PipelineName, as_json: AsJson = False) -> None:
    """Print a pipeline's values and the lines they come from. Secrets in addresses are masked."""
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
    # Imported here because it reads the evidence and the project's files.
    from graftline.scaffold import project
    from graftline.scaffold.files import PIPELINE

    if check_only and update:
        raise ConfigError("give --check or --update, not both: --check writes nothing")
    if update:
        _report(project.update(name), "left to you; compare them with those of a new project: graftline init FOLDER")
        return
    if check_only:
        _report(project.compare(name), "`graftline init --update` takes over what is new and what nobody has changed")
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


def _report(differences: "Sequence[Difference]", advice: str) -> None:
    """List files that differ; exit code 1 if there are any."""
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
    """Check this machine for what is missing, and say what to do. Exit code 1 if something is missing."""
    from graftline.doctor import examine, render  # imports torch to ask for CUDA

    findings = examine(Path.cwd())
    typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else render(findings))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _missing_source(
    section: settings.Base | settings.RowSource | settings.EvaluationRows | settings.Forgetting, root: Path
) -> str | None:
    """What the fetch stage would not find; None where it will."""
    from graftline.data.sources.cache import place_of
    from graftline.data.sources.files import is_wild
    from graftline.workflow.pinned_sources import files_of

    source = parse(section.source)
    if source.kind != "path":
        return None
    try:
        if not (is_wild(source.name) or place_of(source, root).exists()):
            return f"source {source} does not exist"
        if isinstance(section, settings.RowSource | settings.EvaluationRows):
            files_of(section, root)
    except SourceError as error:
        return str(error)
    return None


def _check_base(loaded: settings.Config, pipeline: settings.Pipeline) -> None:
    """Refuse a base in a local folder that ``served_by`` cannot serve, or whose experts the settings are not for.

    Others are checked once they are fetched. Raises ConfigError, AdapterError or CheckpointError.
    """
    source, channel = parse(pipeline.base.source), loaded.channels[pipeline.release.channel]
    if source.kind != "path":
        return
    from graftline.data.sources.cache import place_of

    folder, is_served = place_of(source, loaded.root), bool(pipeline.base.served_by or channel.served_by)
    names_experts = pipeline.adapter.experts != "each"
    if not folder.is_dir() or not (is_served or names_experts or _may_have_experts(folder)):
        return
    from graftline.plan.experts import check_experts
    from graftline.plan.served import check_served
    from graftline.weights.model_folder import read_config

    config = read_config(folder)
    check_experts(pipeline, config)
    check_served(pipeline, config, channel=channel)


def _may_have_experts(folder: Path) -> bool:
    """Whether config.json speaks of experts: torch, whose import takes seconds, is needed only for those."""
    file = folder / "config.json"
    return file.is_file() and b"expert" in file.read_bytes()


def _missing_files(loaded: settings.Config) -> list[str]:
    missing = []
    for name in loaded.names:
        pipeline = loaded.pipeline(name)
        for section in (pipeline.base, *pipeline.read_sections):
            if reason := _missing_source(section, loaded.root):
                missing.append(f"{name}: {reason}")
            prepare = None if isinstance(section, settings.Base) else section.prepare
            if prepare and not (loaded.root / prepare).is_file():
                missing.append(f"{name}: prepare {prepare} does not exist")
        missing += [
            f"{name}: {path} does not exist" for path in pipeline.read_files if not (loaded.root / path).is_file()
        ]
        harness = pipeline.evaluate.harness
        if harness and harness.folder and not (loaded.root / harness.folder).is_dir():
            missing.append(f"{name}: harness folder {harness.folder} does not exist")
    return missing


# A stage runs as ``python -m tasks.<stage> PIPELINE`` in the folder of pipelines.yaml: the library does not import
# ``tasks``, and the process frees its memory at the end.

STAGES = {
    "fetch": ("fetch", "Download and verify the base and the rows."),
    "validate": ("validate", "Check the rows: format, template, duplicates, leakage."),
    "init-base": ("init", "Convert and quantize the base."),
    "train": ("train", "Train the adapter. A killed training resumes from its last checkpoint."),
    "evaluate": ("evaluate", "Score candidate, production and base on the same rows."),
    "gate": ("gate", "Judge the scores. The verdict is pass, fail or inconclusive."),
    "merge": ("merge", "Fold the adapter into the base. The merged model is compared with the unmerged one."),
    "package": ("package", "Gather the files of a release. A manifest lists every one of them."),
    "release": ("release", "Publish the package to the release store."),
}
"""Command to the module in ``tasks`` and its help, in the line's order."""

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The base's config.json, if it has not been fetched yet."),
]


def add_stages_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("retrain", epilog="Example: graftline retrain wordnet-category")(retrain)
    for verb, (stage, purpose) in STAGES.items():
        (_add_validate if verb == "validate" else _add_stage)(app, verb, stage, purpose)
    app.command("manifest", epilog="Example: graftline manifest wordnet-category rayjob --nodes 2")(manifest)
    app.command("encode-rows", epilog="Example: graftline encode-rows chat s3://rows/chat/ s3://rows/encoded/")(
        encode_rows
    )
    app.command("compress", epilog="Example: graftline compress wordnet-category w4a16 served/w4a16")(compress)
    app.command("plan", epilog="Example: graftline plan wordnet-category --config config.json")(plan)
    app.command("recommend", epilog="Example: graftline recommend wordnet-category --memory 4 --minutes 30")(recommend)


def retrain(pipeline: PipelineName) -> None:
    """Run the whole pipeline. Stages that are up to date are skipped."""
    _run_module("flows.retrain", pipeline)


def plan(
    pipeline: Annotated[str | None, typer.Argument(help="A name from pipelines.yaml.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="For every pipeline: which stages would run again, and why.")
    ] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Plan a training: rows, memory, time. Also what can serve the adapter; nothing is trained or written."""
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
        float | None, typer.Option(metavar="GB", help="Memory for training; by default what is free now.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(metavar="M", help="Time for training; unlimited by default.")] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Recommend a method, rank, bits and learning rate. From evidence, for your budget; exit code 1 if nothing fits."""
    budget = [f"--{name}={value!r}" for name, value in (("memory", memory), ("minutes", minutes)) if value is not None]
    _run_module("graftline.workflow.recommend", pipeline, *budget, *_about(config_file, as_json))


def manifest(
    pipeline: PipelineName,
    kind: Annotated[str, typer.Argument(help="rayjob (KubeRay) or trainjob (Kubeflow).")],
    nodes: Annotated[int, typer.Option(metavar="N", help="Nodes; train.processes are shared out over them.")],
    image: Annotated[str | None, typer.Option(help="The image, made by infra/docker.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each node, such as 256Gi.")] = None,
    claim: Annotated[str | None, typer.Option(help="A persistent volume claim that all nodes mount.")] = None,
    folder: Annotated[str | None, typer.Option(help="The project's folder in the claim.")] = None,
) -> None:
    """Print the Kubernetes manifest of a training on several nodes. Nothing is applied."""
    given = {"image": image, "memory": memory, "claim": claim, "folder": folder}
    options = [part for name, value in given.items() if value is not None for part in (f"--{name}", value)]
    _run_module("graftline.workflow.manifests", pipeline, kind, f"--nodes={nodes}", *options)


def encode_rows(
    pipeline: PipelineName,
    source: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix of parquet files.")],
    out: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix for the two sides.")],
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; by default RAY_ADDRESS, or one is started here.")
    ] = None,
) -> None:
    """Prepare rows that outgrow a machine. A Ray Data job finds duplicates, splits and encodes."""
    # The module runs in the project's folder; the user may be in another one.
    places = [place if "://" in place else str(Path(place).absolute()) for place in (source, out)]
    _run_module("graftline.workflow.many_rows", pipeline, *places, *([f"--address={address}"] if address else []))


_LAYOUTS = "fp8 or w4a16 for vLLM; gguf-f16, gguf-q8_0 or gguf-q4_k_m for llama.cpp."
Layout = Annotated[str, typer.Argument(metavar="LAYOUT", help=_LAYOUTS, show_default=False)]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)]


def compress(pipeline: PipelineName, layout: Layout, out: NewFolder) -> None:
    """Write the last run's merged model for vLLM or llama.cpp. Code 1 if its answers or the gates forbid it."""
    _run_module("graftline.workflow.formats", pipeline, layout, str(out.absolute()))


def _about(config_file: Path | None, as_json: bool) -> list[str]:
    """The options that plan and recommend share."""
    return [*(["--config", str(config_file.absolute())] if config_file else []), *(["--json"] if as_json else [])]


def _add_stage(app: typer.Typer, verb: str, stage: str, purpose: str) -> None:
    @app.command(verb, help=purpose, epilog=f"Example: graftline {verb} wordnet-category")
    def run_stage(pipeline: PipelineName) -> None:
        _run_module(f"tasks.{stage}", pipeline)


def _add_validate(app: typer.Typer, verb: str, stage: str, purpose: str) -> None:
    @app.command(verb, help=purpose, epilog=f"Example: graftline {verb} wordnet-category --profile")
    def run_stage(
        pipeline: PipelineName,
        profile: Annotated[
            bool, typer.Option("--profile", help="First write a suite of Great Expectations from the rows as they are.")
        ] = False,
    ) -> None:
        _run_module("graftline.workflow.profiling" if profile else f"tasks.{stage}", pipeline)


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
    # Prefect reads its settings on import, before a flow can set any.
    defaults = for_flows(root) if module.startswith("flows.") else {}
    # flows and tasks are imported from this folder.
    environment = defaults | os.environ | {"PYTHONSAFEPATH": ""}
    command = [sys.executable, "-m", "graftline.program", module, *arguments]
    kills_before = limits.memory_kills()
    with subprocess.Popen(command, cwd=root, env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal sends the signal to the child too, which ends by itself.
            process.wait()
            raise
    if code == -signal.SIGKILL:
        typer.echo(f"error: {module} was ended by SIGKILL: {limits.why_killed(kills_before)}", err=True)
    raise typer.Exit(code if code >= 0 else 128 - code)
