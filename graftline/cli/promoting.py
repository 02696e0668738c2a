"""The command that puts a release into a channel, if everything that the channel's policy asks for is there."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from graftline import settings
from graftline.cli.arguments import (
    Actor,
    ChannelName,
    PipelineName,
    Reason,
    Version,
    acting,
    open_release_store,
)
from graftline.data.sources import default_cache
from graftline.digest import Digest
from graftline.errors import CheckpointError, PromotionError
from graftline.plain_text import check_text, one_line
from graftline.progress import Reporter
from graftline.registry.keys import KEY_FILE, KeyRing
from graftline.registry.promotion import Checks, Wish
from graftline.registry.promotion import promote as enter
from graftline.registry.releases import load_manifest

BaseFolder = Annotated[
    Path | None, typer.Option("--base", metavar="FOLDER", help="The base of the smoke run; by default found by digest.")
]


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    example = 'Example: graftline promote wordnet-category 20261124T061800Z-0123456789ab --reason "nightly"'
    app.command("promote", epilog=example)(promote)


def promote(
    pipeline: PipelineName,
    version: Version,
    reason: Reason,
    channel_name: ChannelName = None,
    actor: Actor = None,
    base: BaseFolder = None,
) -> None:
    """Put a release into a channel. Signature, digests, verdict, approvals and a smoke run come first."""
    loaded = settings.load()
    release = loaded.pipeline(pipeline).release
    channel = loaded.known_channel(channel_name or release.channel)
    actor, reason = acting(actor), check_text("--reason", reason)
    store, cache = open_release_store(loaded, pipeline), default_cache(loaded.root)
    against_production = any(gate.against == "production" for gate in loaded.pipeline(pipeline).gates.values())

    def smoke(folder: Path) -> None:
        # torch and ONNX Runtime: seconds to import, and only once everything else is right.
        from graftline.serve.base import Runtime
        from graftline.serve.smoke import check_release

        trained_on = load_manifest(store, pipeline, version).lineage.base_digest
        places = [base] if base else [loaded.root / "runs" / pipeline / "init" / "base", *(cache / "bases").glob("*")]
        check_release(folder, base=find_base(places, trained_on), runtime=Runtime(graphs=cache / "graphs"))

    checks = Checks(
        policy=loaded.channels[channel],
        keys=KeyRing.load(loaded.root / KEY_FILE),
        smoke=smoke,
        production=release.channel if against_production else None,
    )
    wish = Wish(pipeline=pipeline, channel=channel, version=version, actor=actor, reason=reason)
    folder = cache / "releases" / pipeline / version
    entry = enter(store, wish, checks, folder=folder, on_progress=Reporter("fetch", "bytes"))
    typer.echo(f"{channel} of {pipeline} holds {version} (entry {entry.number})")
    for line in entry.change.checks:
        typer.echo(f"  {one_line(line)}")


def find_base(places: list[Path], digest: Digest) -> Path:
    """The model folder of that digest.

    Raises:
        PromotionError: it is in none of the places.
    """
    from graftline.weights.identity import read_identity  # imports torch

    for folder in filter(Path.is_dir, places):
        with contextlib.suppress(CheckpointError):  # a folder in the cache that is damaged, or another kind of model
            if read_identity(folder).is_called(digest):
                return folder
    looked = ", ".join(str(folder) for folder in places)
    raise PromotionError(
        f"the smoke run needs the base {digest}, not found in {looked}; run the init stage, or give --base"
    )
