"""Commands that serve adapters: with our server, with vLLM, or as files for other software."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from graftline import settings
from graftline.data.sources import default_cache
from graftline.errors import ConfigError
from graftline.logs import Reporter
from graftline.registry.keys import KEY_FILE

if TYPE_CHECKING:
    from graftline.serve.served_base import Runtime
    from graftline.serve.server import FollowSettings

TOKENS_VARIABLE = "GRAFTLINE_SERVE_TOKENS"
ADMIN_TOKENS_VARIABLE = "GRAFTLINE_SERVE_ADMIN_TOKENS"

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
    typer.Option("--precision", metavar="fp32|fp16|int4", help="Default: fp16 on cuda, fp32 on a cpu. int4 is lossy."),
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
) -> None:
    """Serve bases and adapters with OpenAI's API. Bearer tokens come from GRAFTLINE_SERVE_TOKENS.

    Those of administrators, who may load adapters, come from GRAFTLINE_SERVE_ADMIN_TOKENS.
    """
    bases, adapters = [_pair(text) for text in base], [_pair(text) for text in adapter or ()]
    if adapter_folder is not None and not adapter_folder.is_dir():
        raise ConfigError(f"--adapter-folder {adapter_folder} was given; there is no such folder")
    store, channels = _channels(follow) if follow else ("", [])
    if print_vllm is not None:
        _print_vllm(print_vllm, bases, adapters, _following(store, channels))
        return

    # Imported here: torch and ONNX Runtime take seconds.
    from graftline.serve import server
    from graftline.serve.app import AccessRules

    tokens, admin_tokens = _tokens(TOKENS_VARIABLE), _tokens(ADMIN_TOKENS_VARIABLE)
    settings = server.ServeSettings(
        bases=tuple(bases),
        adapters=tuple(adapters),
        following=_following(store, channels),
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


def _following(store: str, channels: list[tuple[str, str]]) -> "FollowSettings | None":
    from graftline.serve.follower import ChannelRef
    from graftline.serve.server import FollowSettings

    if not channels:
        return None
    root = Path.cwd()
    return FollowSettings(
        store=store,
        channels=tuple(ChannelRef(pipeline, channel) for pipeline, channel in channels),
        folder=default_cache(root) / "served",
        keys=root / KEY_FILE,
        keys_may_be_absent=True,
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


def _tokens(variable: str) -> tuple[str, ...]:
    return tuple(token for text in os.environ.get(variable, "").split(",") if (token := text.strip()))


def _pair(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise ConfigError(f"{text!r} was given; expected NAME=FOLDER, such as smollm2=runs/demo/init/base")
    if not Path(folder).is_dir():
        raise ConfigError(f"{text!r} was given; there is no folder {folder}")
    return name, Path(folder)


def _channels(followed: list[str]) -> tuple[str, list[tuple[str, str]]]:
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
