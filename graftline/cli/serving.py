"""Commands that serve adapters, with our server, vLLM or other software, and make rows of what was served."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from graftline import settings
from graftline.cli.arguments import ChannelName, PipelineName, Unsigned, trust_of
from graftline.data.sources import default_cache
from graftline.errors import ConfigError
from graftline.logs import Reporter
from graftline.plain_text import count, one_line
from graftline.registry.keys import KEY_FILE
from graftline.serve import ADMIN_TOKENS_VARIABLE, TOKENS_VARIABLE

if TYPE_CHECKING:
    from graftline.registry.request_log import LogPlace
    from graftline.serve.served_base import Runtime
    from graftline.serve.server import FollowSettings

Bases = Annotated[list[str], typer.Option("--base", metavar="NAME=FOLDER", help="A model folder; may be repeated.")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="NAME=FOLDER", help="An adapter; may be repeated.")
]
Follow = Annotated[
    list[str] | None,
    typer.Option("--follow", metavar="PIPELINE[@CHANNEL]", help="Always serve what a channel holds; may be repeated."),
]
AdapterFolder = Annotated[
    Path | None,
    typer.Option(
        "--adapter-folder", metavar="FOLDER", help="Let administrators load adapters from this folder by request."
    ),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; anything but this machine requires a token.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535)]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="cpu|cuda", help="Default: cuda where ONNX Runtime and torch can use it."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="fp32|fp16|bf16|int4",
        help="Default: fp16 on cuda, fp32 on a cpu. bf16 needs cuda, int4 is lossy.",
    ),
]
PrintVllm = Annotated[
    Path | None,
    typer.Option(
        "--print-vllm",
        metavar="FOLDER",
        help="Do not serve: write a folder for vLLM and print its command, with what the channels hold now.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    example = "Example: graftline serve --base smollm2=runs/wordnet-category/init/base --follow wordnet-category"
    app.command("serve", epilog=example)(serve)


def serve(  # noqa: PLR0913  # each is an option of the command
    base: Bases,
    adapter: Adapters = None,
    follow: Follow = None,
    adapter_folder: AdapterFolder = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    print_vllm: PrintVllm = None,
    unsigned: Unsigned = False,
) -> None:
    """Serve bases and adapters with OpenAI's API. Bearer tokens come from GRAFTLINE_SERVE_TOKENS.

    Those of administrators, who may load adapters, come from GRAFTLINE_SERVE_ADMIN_TOKENS.
    """
    bases, adapters = [_pair(text) for text in base], [_pair(text) for text in adapter or ()]
    if adapter_folder is not None and not adapter_folder.is_dir():
        raise ConfigError(f"--adapter-folder {adapter_folder} was given; there is no such folder")
    store, channels = followed_channels(follow) if follow else ("", [])
    if print_vllm is not None:
        _print_vllm(print_vllm, bases, adapters, _following(store, channels, unsigned=unsigned))
        return

    # Imported here: torch and ONNX Runtime take seconds.
    from graftline.serve import server
    from graftline.serve.app import AccessRules

    tokens, admin_tokens = tokens_in(TOKENS_VARIABLE), tokens_in(ADMIN_TOKENS_VARIABLE)
    settings = server.ServeSettings(
        bases=tuple(bases),
        adapters=tuple(adapters),
        following=_following(store, channels, unsigned=unsigned),
        runtime=_runtime(device, precision),
        access=AccessRules(tokens=tokens, admin_tokens=admin_tokens, adapter_folder=adapter_folder),
    )
    server.serve(settings, host=host, port=port)


def _runtime(device: str | None, precision: str | None) -> "Runtime":
    """How to run bases; what is not given is chosen for this machine and printed."""
    from graftline.export.onnx_session import Precision
    from graftline.serve.served_base import Device, Runtime, best_device, check_device, default_precision

    on: Device = _one_of("--device", device, get_args(Device)) or best_device()
    check_device(on)
    by: Precision = _one_of("--precision", precision, get_args(Precision)) or default_precision(on)
    chosen = [f"--device {on}"] * (device is None) + [f"--precision {by}"] * (precision is None)
    if chosen:
        typer.echo(f"serving with {' '.join(chosen)} (chosen for this machine)", err=True)
    return Runtime(graphs=default_cache(Path.cwd()) / "graphs", device=on, precision=by)


def _one_of(option: str, given: str | None, known: tuple[Any, ...]) -> Any:
    if given is not None and given not in known:
        raise ConfigError(f"{option} {given} was given; expected {' or '.join(known)}")
    return given


def _following(store: str, channels: list[tuple[str, str]], *, unsigned: bool) -> "FollowSettings | None":
    from graftline.serve.follower import ChannelRef
    from graftline.serve.server import FollowSettings

    if not channels:
        return None
    root, loaded = Path.cwd(), settings.load()
    trust_of(loaded, unsigned=unsigned)  # refuses to start without keys, unless --unsigned was given
    return FollowSettings(
        store=store,
        channels=tuple(ChannelRef(pipeline, channel) for pipeline, channel in channels),
        folder=default_cache(root) / "served",
        keys=root / KEY_FILE,
        unsigned=unsigned,
        policies=loaded.channels,
        rollouts={name: one.rollout.judge for name, one in loaded.channels.items() if one.rollout},
        request_logs={name: log for name in loaded.channels if (log := loaded.request_log(name))},
        seen=default_cache(root) / "seen",
    )


def _print_vllm(
    out: Path, bases: list[tuple[str, Path]], adapters: list[tuple[str, Path]], following: "FollowSettings | None"
) -> None:
    from graftline.serve.server import fetch_followed
    from graftline.serve.vllm import write_vllm_folder

    if len(bases) != 1:
        raise ConfigError(f"{len(bases)} bases were given; vLLM serves one a process: name one, with a folder for each")
    if following is not None:
        adapters = [*adapters, *fetch_followed(following)]
    done = write_vllm_folder(out, bases[0], adapters)
    for change in done.changes:
        typer.echo(f"changed: {change}", err=True)
    if following is not None:
        typer.echo("vLLM follows no channel: after a promotion write a new folder and start it again", err=True)
    typer.echo(done.command)


def tokens_in(variable: str) -> tuple[str, ...]:
    """The tokens that an environment variable lists."""
    return tuple(token for text in os.environ.get(variable, "").split(",") if (token := text.strip()))


def _pair(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise ConfigError(f"{text!r} was given; expected NAME=FOLDER, such as smollm2=runs/demo/init/base")
    if not Path(folder).is_dir():
        raise ConfigError(f"{text!r} was given; there is no folder {folder}")
    return name, Path(folder)


def followed_channels(followed: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The release store of some pipelines, and the named or default channels."""
    loaded = settings.load()
    pairs = [(name, channel) for name, _, channel in (text.partition("@") for text in followed)]
    stores = {loaded.store_url(name) for name, _ in pairs}
    if len(stores) > 1:
        raise ConfigError(f"{', '.join(followed)} have {len(stores)} release stores; one server follows one store")
    named = [(name, channel or loaded.pipeline(name).release.channel) for name, channel in pairs]
    return stores.pop(), [(name, loaded.known_channel(channel)) for name, channel in named]


class Target(StrEnum):
    """Software that loads adapters."""

    VLLM = "vllm"
    PEFT = "peft"
    TRANSFORMERS = "transformers"
    ONNX = "onnx"
    GGUF = "gguf"


ExportedFolder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)]
Base = Annotated[Path, typer.Option("--base", metavar="FOLDER", help="The base that the adapter was trained on.")]
For = Annotated[Target, typer.Option("--target", help="The software to write it for.")]


def add_export_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    example = "Example: graftline export runs/demo/train/adapter out --base runs/demo/init/base --target vllm"
    app.command("export", epilog=example)(export)


def export(adapter: ExportedFolder, out: OutFolder, base: Base, target: For) -> None:
    """Write an adapter for other software. Prints what had to be changed and the command that loads it."""
    # Imported here: torch and transformers take seconds.
    from graftline.export import targets

    if target is Target.ONNX:
        _export_onnx(adapter, out, base)
        return
    if target is Target.GGUF:
        _export_gguf(adapter, out, base)
        return
    software = cast("targets.Target", target.value)
    done = targets.export_adapter(adapter, out, target=software, shape_of=targets.shapes_of(base))
    for change in done.changes:
        typer.echo(f"changed: {change}")
    typer.echo(f"{out}: {done.command}")


def _export_onnx(adapter: Path, out: Path, base: Path) -> None:
    from graftline.export.onnx_export import cached_graph, export_adapter

    graph = cached_graph(base, out, on_progress=Reporter("graph", "tensors"))
    file = out / "adapter.onnx_adapter"
    export_adapter(adapter, file, base=base, graph=graph)
    typer.echo(f"{file}: for the graph in {graph}, with RunOptions.add_active_adapter")


def _export_gguf(adapter: Path, out: Path, base: Path) -> None:
    from graftline.export.gguf_adapter import export_adapter

    file = out / "adapter.gguf"
    export_adapter(adapter, file, base=base)
    typer.echo(f"{file}: llama-server --model BASE.gguf --lora {file}")


FromLog = Annotated[bool, typer.Option("--from-log", help="From the request log of a channel, the only source so far.")]
ToReview = Annotated[
    Path | None, typer.Option("--review", metavar="CSV", help="Write answers into a new file for a person to mark.")
]
ReviewedFiles = Annotated[
    list[Path] | None, typer.Option("--reviewed", metavar="CSV", help="A marked file; may be repeated.")
]
Rated = Annotated[bool, typer.Option("--rated", help="Also take answers that users rated good.")]
RowsOut = Annotated[Path | None, typer.Option("--out", metavar="JSONL", help="A new file for the rows.")]
MostReviewed = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="Most answers in a file to mark.")]


def add_rows_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    example = "Example: graftline rows wordnet-category --from-log --review review.csv"
    app.command("rows", epilog=example)(rows)


def rows(  # noqa: PLR0913  # each is an option of the command
    pipeline: PipelineName,
    from_log: FromLog = False,
    channel_name: ChannelName = None,
    review: ToReview = None,
    reviewed: ReviewedFiles = None,
    rated: Rated = False,
    out: RowsOut = None,
    limit: MostReviewed = 200,
) -> None:
    """Make rows of requests that were reviewed. First --review writes answers to mark, then --reviewed reads them."""
    if not from_log:
        raise ConfigError("give --from-log; see `graftline rows --help`")
    if (review is None) == (out is None):
        raise ConfigError("give --review FILE to write answers to mark, or --out FILE to write rows, one of them")
    if out is not None and not (reviewed or rated):
        raise ConfigError("nothing would be a row: give --reviewed FILE, or --rated to take what users rated good")
    if review is not None and rated:
        raise ConfigError("--rated is for --out; --review shows what users rated first")
    if out is not None and out.suffix != ".jsonl":
        raise ConfigError(f"--out {out} was given; expected a name that ends in .jsonl")
    # Imported here: pyarrow takes a tenth of a second.
    from graftline.workflow import logged_rows

    loaded = settings.load()
    base, place = loaded.pipeline(pipeline).base, _log_place(loaded, pipeline, channel_name)
    reviews = logged_rows.read_reviews(reviewed or [])
    if review is not None:
        number = logged_rows.write_review(place, review, limit=limit, reviewed=reviews)
        typer.echo(f"{review}: {count(number, 'answer')}; write good or bad under verdict, or a better answer")
        return
    assert out is not None
    made = logged_rows.make_rows(place, reviews, base, rated=rated)
    logged_rows.write_logged(out, made)
    typer.echo(f"{out}: {count(len(made.rows), 'row')}")
    for why, number in made.left_out.items():
        if number:
            typer.echo(f"left out: {number}, {one_line(why)}")


def _log_place(loaded: settings.Config, pipeline: str, channel_name: str | None) -> "LogPlace":
    from graftline.registry.request_log import LogPlace
    from graftline.registry.store import open_store

    channel = loaded.known_channel(channel_name or loaded.pipeline(pipeline).release.channel)
    log = loaded.request_log(channel)
    if log is None:
        raise ConfigError(f"channels.{channel} of {loaded.path.name} has no `request_log`; nothing was kept there")
    return LogPlace(open_store(log.store), pipeline, channel, log.retention_days)
