"""Commands that tell others about releases: webhooks, git tags, and the Hugging Face Hub."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from graftline import settings
from graftline.cli.arguments import ChannelName, PipelineName, Unsigned, Version, open_release_store, trust_of
from graftline.data.sources import default_cache
from graftline.logs import Reporter
from graftline.plain_text import count, one_line
from graftline.registry import releases
from graftline.registry.binding import check_binding
from graftline.registry.store import Store
from graftline.registry.trust import Trust, judged_head
from graftline.release.manifest import Manifest

AnyPipeline = Annotated[
    str | None, typer.Argument(metavar="[PIPELINE]", help="A name from pipelines.yaml; all of them when left out.")
]
Repository = Annotated[
    str, typer.Option("--hub", metavar="ORG/NAME", help="Repository on the hub; made if missing, and private then.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Verify the release and say what would be sent, send nothing.")]
AnyChannel = Annotated[str | None, typer.Option("--channel", metavar="NAME", help="A channel; by default all.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("tell", epilog="Example: graftline tell wordnet-category --channel production")(tell)
    version = "20261124T061800Z-0123456789ab"
    example = f"Example: graftline publish wordnet-category {version} --hub example-org/wordnet-category --dry-run"
    app.command("publish", epilog=example)(publish)
    app.command("tag", epilog="Example: graftline tag wordnet-category --channel production")(tag)


def tell(pipeline: AnyPipeline = None, channel_name: AnyChannel = None, unsigned: Unsigned = False) -> None:
    """Send webhooks the promotions and rollbacks that they have not got yet. Exit code 1 if one did not take them."""
    loaded = settings.load()
    channels = [loaded.known_channel(channel_name)] if channel_name else list(loaded.channels)
    wanted = [name for name in channels if loaded.channels[name].webhooks]
    pipelines = [pipeline] if pipeline else list(loaded.names)
    trust = trust_of(loaded, unsigned=unsigned) if wanted else None
    all_told = True
    for each in pipelines:
        store = open_release_store(loaded, each)
        for name in wanted:
            all_told = tell_receivers(loaded, store, each, name, trust) and all_told
    if not wanted:
        typer.echo(f"no webhooks: {', '.join(channels)} of {loaded.path.name} have none")
    raise typer.Exit(0 if all_told else 1)


def tell_receivers(loaded: settings.Config, store: Store, pipeline: str, channel: str, trust: Trust | None) -> bool:
    """Tell a channel's webhooks what they have not got yet; returns whether they all took it.

    Whatever is in the channel stays there: problems are lines on stderr, never errors.
    """
    webhooks = loaded.channels[channel].webhooks if channel in loaded.channels else ()
    if not webhooks:
        return True
    from graftline.registry.webhooks import Teller  # httpx, which it needs, costs a tenth of a second

    done = Teller(store=store, pipeline=pipeline, trust=trust).tell(channel, webhooks)
    for line in done.told:
        typer.echo(one_line(line))
    for line in done.problems:
        typer.echo(f"warning: {one_line(line)}", err=True)
    return not done.problems


def publish(
    pipeline: PipelineName, version: Version, hub: Repository, dry_run: DryRun = False, unsigned: Unsigned = False
) -> None:
    """Put a verified release on the Hugging Face Hub. The model card is its README, its version a tag there."""
    from graftline.registry.hub import check_repository, publish_to_hub  # its client costs a second

    loaded = settings.load()
    loaded.pipeline(pipeline)
    check_repository(hub)
    trust = trust_of(loaded, unsigned=unsigned)
    manifest, folder = _verified(loaded, pipeline, version, trust)
    held = f"{version} of {pipeline} ({count(len(manifest.files), 'file')}, {manifest.num_bytes} bytes)"
    if dry_run:
        for entry in manifest.files:
            typer.echo(f"{entry.num_bytes:>14}  {one_line(entry.path)}")
        typer.echo(f"{held} would be the content of {hub}, under the tag {version}; nothing was sent")
        return
    done = publish_to_hub(folder, manifest, hub)
    state = "is on the hub" if done.is_new else "was on the hub already"
    private = "; the repository is new, and private until you change that on its page" if done.was_created else ""
    typer.echo(f"{held} {state}: {done.repository} at {done.commit[:12]}, tag {version}{private}")


def tag(pipeline: PipelineName, channel_name: ChannelName = None, unsigned: Unsigned = False) -> None:
    """Tag in git what a channel holds, as DVC's registry (GTO) names it. Tags are made here and pushed by you."""
    from graftline.workflow.gto_tags import write_tags  # with it comes all that a run needs

    loaded = settings.load()
    channel = loaded.known_channel(channel_name or loaded.pipeline(pipeline).release.channel)
    trust = trust_of(loaded, unsigned=unsigned)
    entry, _ = judged_head(open_release_store(loaded, pipeline), pipeline, channel, trust)
    if entry is None:
        typer.echo(f"{pipeline}: nothing was ever promoted to {channel}")
        return
    _, folder = _verified(loaded, pipeline, entry.change.version, None)  # the entry vouches for what it holds
    done = write_tags(loaded.root, entry, folder)
    state = f"new: {', '.join(done.made)}; push them with `git push --tags`" if done.made else "they were there already"
    typer.echo(f"{entry.change.version} is {done.version}, {done.stage} at {done.commit[:12]}; {state}")


def _verified(loaded: settings.Config, pipeline: str, version: str, trust: Trust | None) -> tuple[Manifest, Path]:
    """A release's manifest and the folder with it, verified; its signature too, where there is trust."""
    store, folder = open_release_store(loaded, pipeline), default_cache(loaded.root) / "releases" / pipeline / version
    manifest = releases.fetch(store, pipeline, version, folder, on_progress=Reporter("fetch", "bytes"))
    check_binding(manifest, lambda path: (folder / path).read_bytes())
    if trust:
        trust.keys.verify_release(folder, now=datetime.now(UTC))
    return manifest, folder
