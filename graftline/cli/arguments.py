"""Arguments that several commands share."""

import os
from typing import Annotated

import typer

from graftline import settings
from graftline.data.sources import default_cache
from graftline.errors import ConfigError
from graftline.plain_text import check_text
from graftline.program import user_name
from graftline.registry.store import Store, open_store

PipelineName = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A name from pipelines.yaml.", show_default=False)
]
Version = Annotated[
    str, typer.Argument(metavar="VERSION", help="A release, as `history` shows it.", show_default=False)
]
ChannelName = Annotated[
    str | None, typer.Option("--channel", metavar="NAME", help="A channel; by default the pipeline's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Actor = Annotated[
    str | None, typer.Option("--actor", "--as", metavar="NAME", help="Who is doing this; the user's name by default.")
]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, in a sentence.")]


def open_release_store(loaded: settings.Config, pipeline: str) -> Store:
    """A pipeline's release store; what this machine has seen of its channels is kept in the project's cache."""
    return open_store(loaded.store_url(pipeline), seen=default_cache(loaded.root) / "seen")


def acting(actor: str | None) -> str:
    """The given name, or the user's; ConfigError if there is neither, or it is not UTF-8."""
    actor = actor if actor is not None else user_name()
    if actor is None:
        raise ConfigError(f"user {os.getuid()} has no name here; say who does it with --as NAME")
    return check_text("--as", actor)
