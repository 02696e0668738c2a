"""The command that serves bases and adapters over HTTP."""

import os
from pathlib import Path
from typing import Annotated

import typer

from graftline import config
from graftline.cli.arguments import KEY_FILE
from graftline.errors import ConfigError
from graftline.sources import default_cache

TOKENS_VARIABLE = "GRAFTLINE_SERVE_TOKENS"

Bases = Annotated[list[str], typer.Option("--base", metavar="NAME=FOLDER", help="A model folder; may be repeated.")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="NAME=FOLDER", help="An adapter; may be repeated.")
]
Follow = Annotated[
    list[str] | None,
    typer.Option("--follow", metavar="PIPELINE", help="Serve what this pipeline's channel holds, always."),
]
Host = Annotated[str, typer.Option("--host", help="Beyond this machine a token is required.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535)]


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    example = "Example: graftline serve --base smollm2=runs/wordnet-category/init/base --follow wordnet-category"
    app.command("serve", epilog=example)(serve)


def serve(
    base: Bases, adapter: Adapters = None, follow: Follow = None, host: Host = "127.0.0.1", port: Port = 8000
) -> None:
    """Serve bases and adapters. The API is OpenAI's; bearer tokens come from GRAFTLINE_SERVE_TOKENS."""
    bases, adapters = [_pair(text) for text in base], [_pair(text) for text in adapter or ()]
    store, channels = _channels(follow) if follow else ("", [])

    # torch and ONNX Runtime: seconds to import.
    from graftline.serving import server
    from graftline.serving.app import Access
    from graftline.serving.base import Runtime
    from graftline.serving.follower import Followed

    root = Path.cwd()
    following = server.Following(
        store=store,
        channels=tuple(Followed(pipeline, channel) for pipeline, channel in channels),
        folder=default_cache(root) / "served",
        keys=root / KEY_FILE if (root / KEY_FILE).is_file() else None,
    )
    settings = server.ServeSettings(
        bases=tuple(bases),
        adapters=tuple(adapters),
        following=following if channels else None,
        runtime=Runtime(graphs=default_cache(root) / "graphs"),
        access=Access(tokens=tuple(filter(None, os.environ.get(TOKENS_VARIABLE, "").split(",")))),
    )
    server.serve(settings, host=host, port=port)


def _pair(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise ConfigError(f"{text!r} was given; expected NAME=FOLDER, such as smollm2=runs/demo/init/base")
    if not Path(folder).is_dir():
        raise ConfigError(f"{text!r} was given; there is no folder {folder}")
    return name, Path(folder)


def _channels(pipelines: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The release store of some pipelines, and the channel of each."""
    loaded = config.load()
    stores = {loaded.store_url(name) for name in pipelines}
    if len(stores) > 1:
        raise ConfigError(f"{', '.join(pipelines)} have {len(stores)} release stores; one server follows one store")
    return stores.pop(), [(name, loaded.pipeline(name).release.channel) for name in pipelines]
