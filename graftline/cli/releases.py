"""Commands about releases and channels: what is in production, since when, by whom, and back again."""

import getpass
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from graftline import config
from graftline.cli.arguments import KEY_FILE, AsJson, ChannelName, PipelineName, Version
from graftline.progress import Reporter
from graftline.registry import approval, channel, cleanup, promotion, releases
from graftline.registry.diff import diff as compare
from graftline.registry.keys import KeyRing
from graftline.registry.store import Store, open_store
from graftline.sources import default_cache

Actor = Annotated[str | None, typer.Option("--as", metavar="NAME", help="Who does it; by default the user's name.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, in a sentence for people.")]
PrivateKey = Annotated[Path, typer.Option("--key", metavar="FILE", help="The approver's private key.")]
BackTo = Annotated[str | None, typer.Option("--to", metavar="VERSION", help="By default the release before this one.")]
Other = Annotated[str, typer.Argument(metavar="OTHER", help="The release to compare with.", show_default=False)]
Entries = Annotated[int, typer.Option("--keep", metavar="N", min=1, help="Newest entries of each channel to keep.")]
Days = Annotated[int, typer.Option("--days", metavar="N", min=0, help="Younger releases stay, whatever names them.")]
Really = Annotated[bool, typer.Option("--yes", help="Remove; without it the plan is only printed.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    example = "Example: graftline {} wordnet-category{}"
    version = "20261124T061800Z-0123456789ab"
    app.command("history", epilog=example.format("history", ""))(history)
    app.command("verify", epilog=example.format("verify", f" {version}"))(verify)
    app.command("diff", epilog=example.format("diff", f" {version} 20261125T061800Z-ba9876543210"))(diff)
    app.command("approve", epilog=example.format("approve", f" {version} --key ~/.graftline/ada"))(approve)
    app.command("rollback", epilog=example.format("rollback", ' --reason "errors rose"'))(rollback)
    app.command("gc", epilog=example.format("gc", " --keep 10 --yes"))(gc)


def history(pipeline: PipelineName, channel_name: ChannelName = None, as_json: AsJson = False) -> None:
    """Print who put which release into a channel, when and why; every entry is verified."""
    store, own_channel, _ = _open(pipeline)
    log = channel.read(store, pipeline, channel_name or own_channel)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in log.entries], indent=2))
        return
    if not log.entries:
        typer.echo(f"{pipeline}: nothing was ever promoted to {log.channel}")
    for entry in log.entries:
        change = entry.change
        who = f"{change.actor}: {change.reason}"
        typer.echo(f"{entry.number:>4}  {change.time:%Y-%m-%d %H:%M:%S}Z  {change.action:<8}  {change.version}  {who}")


def verify(pipeline: PipelineName, version: Version) -> None:
    """Read every byte of a release in the store; with a keys.yaml, check its signature too."""
    store, _, root = _open(pipeline)
    report = Reporter("verify", "bytes")
    manifest = releases.verify(store, pipeline, version, on_progress=report)
    signed = f"signature not checked: no {KEY_FILE} here"
    if (root / KEY_FILE).is_file():
        folder = default_cache(root) / "releases" / pipeline / version
        releases.fetch(store, pipeline, version, folder, on_progress=report)
        builder = KeyRing.load(root / KEY_FILE).verify_release(folder, now=datetime.now(UTC))
        signed = f"signed by {builder}"
    typer.echo(f"{version}: {len(manifest.files)} files, {manifest.num_bytes} bytes, as the manifest says; {signed}")


def diff(pipeline: PipelineName, version: Version, other: Other) -> None:
    """Compare two releases: files, origin and verdict."""
    store, _, _ = _open(pipeline)
    found = compare(*(releases.load_manifest(store, pipeline, one) for one in (version, other)))
    marked = (("-", found.removed), ("+", found.added), ("~", found.changed))
    lines = [f"{mark} {path}" for mark, paths in marked for path in paths]
    lines += [f"{name}: {before} -> {after}" for name, (before, after) in found.origin.items()]
    typer.echo("\n".join(lines) or "no difference")


def approve(pipeline: PipelineName, version: Version, key: PrivateKey, channel_name: ChannelName = None) -> None:
    """Sign that a release may enter a channel; the signature counts as the channel's policy says."""
    store, own_channel, root = _open(pipeline)
    release = releases.load_manifest(store, pipeline, version).digest
    target = approval.Target(pipeline, channel_name or own_channel, version, release)
    keys = KeyRing.load(root / KEY_FILE)
    signed = approval.approve(store, target, keys=keys, private_key=key.expanduser(), now=datetime.now(UTC))
    typer.echo(f"{signed.statement.approver} approves {version} for {target.channel}")


def rollback(
    pipeline: PipelineName, reason: Reason, to: BackTo = None, channel_name: ChannelName = None, actor: Actor = None
) -> None:
    """Point a channel back at a release that it held before; nothing is uploaded or removed."""
    store, own_channel, _ = _open(pipeline)
    entry = promotion.rollback(
        store,
        pipeline=pipeline,
        to_channel=channel_name or own_channel,
        version=to,
        actor=actor or getpass.getuser(),
        reason=reason,
    )
    typer.echo(f"{entry.channel} of {pipeline} holds {entry.change.version} again (entry {entry.number})")


def gc(pipeline: PipelineName, keep: Entries = 10, days: Days = 7, really: Really = False) -> None:
    """Remove releases that no channel names, nobody serves and that are old; first print which."""
    store, _, _ = _open(pipeline)
    rules, now = cleanup.Rules(keep, timedelta(days=days)), datetime.now(UTC)
    plan = cleanup.plan_cleanup(store, pipeline, rules=rules, now=now)
    for version, reason in plan.keep.items():
        typer.echo(f"keep    {version}  {reason}")
    removed = cleanup.clean_up(store, plan, rules=rules, now=now) if really else ()
    for version in plan.remove:
        typer.echo(f"{'removed' if version in removed else 'remove':<8}{version}")
    if plan.remove and not really:
        typer.echo("nothing was removed; add --yes to do it")


def _open(pipeline: str) -> tuple[Store, str, Path]:
    """Store and channel of a pipeline, and the project's folder."""
    loaded = config.load()
    return open_store(loaded.store_url(pipeline)), loaded.pipeline(pipeline).release.channel, loaded.root
