"""Arguments that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from graftline import settings
from graftline.data.sources import default_cache
from graftline.errors import ConfigError
from graftline.plain_text import check_text
from graftline.program import user_name
from graftline.registry.store import Store, open_store
from graftline.registry.trust import CHANNEL_KEY, UNSIGNED, Trust, open_trust

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
Unsigned = Annotated[
    bool,
    typer.Option("--unsigned", help="Check no signature: for a store that only you can write to, without a keys.yaml."),
]
SigningKey = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help=f"The private key that signs it; by default that of {CHANNEL_KEY}."),
]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, in a sentence.")]


def open_release_store(loaded: settings.Config, pipeline: str) -> Store:
    """A pipeline's release store; what this machine has seen of its channels is kept in the project's cache."""
    return open_store(loaded.store_url(pipeline), seen=default_cache(loaded.root) / "seen")


def trust_of(loaded: settings.Config, *, unsigned: bool) -> Trust | None:
    """Keys and policies of the project; None, and a line on stderr, if the user said that nothing is to be checked."""
    trust = open_trust(loaded.root, loaded.channels, unsigned=unsigned)
    if trust is None:
        typer.echo(f"warning: {UNSIGNED}", err=True)
    return trust


def signing_key(given: Path | None) -> Path:
    """The private key to sign an entry with; ConfigError if none is named."""
    named = given or os.environ.get(CHANNEL_KEY)
    if not named:
        raise ConfigError(
            f"this has to be signed: name a private key with --key FILE or {CHANNEL_KEY}, whose public half has the "
            "role for it in keys.yaml (docs/security.md)"
        )
    return Path(named).expanduser()


def acting(actor: str | None) -> str:
    """The given name, or the user's; ConfigError if there is neither, or it is not UTF-8."""
    actor = actor if actor is not None else user_name()
    if actor is None:
        raise ConfigError(f"user {os.getuid()} has no name here; say who does it with --as NAME")
    return check_text("--as", actor)
