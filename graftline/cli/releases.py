"""Commands about releases and channels: what is in production, since when, by whom, and back again."""

import getpass
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from graftline import config
from graftline.cli.arguments import KEY_FILE, Actor, AsJson, ChannelName, PipelineName, Reason, Version
from graftline.progress import Reporter
from graftline.registry import approval, channel, cleanup, promotion, releases
from graftline.registry.diff import diff as compare
from graftline.registry.keys import KeyRing
from graftline.registry.overview import overview
from graftline.registry.store import Store, open_store
from graftline.release.key_files import create_key

PrivateKey = Annotated[Path, typer.Option("--key", metavar="FILE", help="The approver's private key.")]
BackTo = Annotated[str | None, typer.Option("--to", metavar="VERSION", help="By default the release before this one.")]
Other = Annotated[str, typer.Argument(metavar="OTHER", help="The release to compare with.", show_default=False)]
Target = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; made when missing.", show_default=False)]
PageFile = Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write.")]
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
    app.command("pull", epilog=example.format("pull", f" {version} release"))(pull)
    app.command("page", epilog=example.format("page", " registry.html"))(page)
    app.command("new-key", epilog="Example: graftline new-key ~/.graftline/ada")(new_key)
    app.command("gc", epilog=example.format("gc", " --keep 10 --yes"))(gc)


def history(pipeline: PipelineName, channel_name: ChannelName = None, as_json: AsJson = False) -> None:
    """Print a channel's history. Who put what there, when and why; every entry is verified."""
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
    """Check a release in the store. Every byte is read; with a keys.yaml, its signature is checked too."""
    store, _, root = _open(pipeline)
    report = Reporter("verify", "bytes")
    manifest = releases.verify(store, pipeline, version, on_progress=report)
    signed = f"signature not checked: no {KEY_FILE} here"
    if (root / KEY_FILE).is_file():
        keys = KeyRing.load(root / KEY_FILE)
        signed = f"signed by {releases.signer(store, manifest, keys, now=datetime.now(UTC))}"
    typer.echo(f"{version}: {len(manifest.files)} files, {manifest.num_bytes} bytes, as the manifest says; {signed}")


def diff(pipeline: PipelineName, version: Version, other: Other) -> None:
    """Compare two releases. Files, origin and verdict."""
    store, _, _ = _open(pipeline)
    found = compare(*(releases.load_manifest(store, pipeline, one) for one in (version, other)))
    marked = (("-", found.removed), ("+", found.added), ("~", found.changed))
    lines = [f"{mark} {path}" for mark, paths in marked for path in paths]
    lines += [f"{name}: {before} -> {after}" for name, (before, after) in found.origin.items()]
    typer.echo("\n".join(lines) or "no difference")


def approve(pipeline: PipelineName, version: Version, key: PrivateKey, channel_name: ChannelName = None) -> None:
    """Approve a release. The signature counts as the channel's policy says."""
    store, own_channel, root = _open(pipeline)
    release = releases.load_manifest(store, pipeline, version).digest
    target = approval.Target(pipeline, channel_name or own_channel, version, release)
    keys = KeyRing.load(root / KEY_FILE)
    signed = approval.approve(store, target, keys=keys, private_key=key.expanduser(), now=datetime.now(UTC))
    typer.echo(f"{signed.statement.approver} approves {version} for {target.channel}")


def rollback(
    pipeline: PipelineName, reason: Reason, to: BackTo = None, channel_name: ChannelName = None, actor: Actor = None
) -> None:
    """Point a channel back. It must have held that release before; nothing is uploaded or removed."""
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
    """Remove releases nobody needs. Old ones that no channel names and nobody uses, and what killed writers left."""
    store, _, _ = _open(pipeline)
    rules, now = cleanup.Rules(keep, timedelta(days=days)), datetime.now(UTC)
    plan = cleanup.plan_cleanup(store, pipeline, rules=rules, now=now)
    for version, reason in plan.keep.items():
        typer.echo(f"keep    {version}  {reason}")
    removed = cleanup.clean_up(store, plan, rules=rules, now=now) if really else ()
    for version in plan.remove:
        typer.echo(f"{'removed' if version in removed else 'remove':<8}{version}")
    for one in plan.unfinished:
        what = f"unfinished {one.key} of {one.modified:%Y-%m-%d %H:%M} UTC, {one.num_bytes} bytes"
        typer.echo(f"{'removed' if one.handle in removed else 'remove':<8}{what}")
    if (plan.remove or plan.unfinished) and not really:
        typer.echo("nothing was removed; add --yes to do it")


def pull(pipeline: PipelineName, version: Version, folder: Target) -> None:
    """Get a release into a folder. It is verified as it arrives; with a keys.yaml, its signature too."""
    store, _, root = _open(pipeline)
    manifest = releases.fetch(store, pipeline, version, folder, on_progress=Reporter("pull", "bytes"))
    typer.echo(f"{folder}: {len(manifest.files)} files, {manifest.num_bytes} bytes, verified; {_signer(root, folder)}")


def page(pipeline: PipelineName, file: PageFile = Path("registry.html")) -> None:
    """Write a page about the store. Every release, and what each channel held when."""
    from graftline.release.registry_page import write_registry  # jinja2 costs 0.2 s

    store, _, root = _open(pipeline)
    keys = KeyRing.load(root / KEY_FILE) if (root / KEY_FILE).is_file() else None
    write_registry(file, overview(store, keys=keys, now=datetime.now(UTC)))
    typer.echo(f"{file} is written")


def new_key(file: Path) -> None:
    """Make a key pair. FILE is for whoever signs, FILE.pub for keys.yaml."""
    public = create_key(file.expanduser())
    typer.echo(f"{file} is the private key, keep it to yourself; list {public} in {KEY_FILE} by pull request")


def _open(pipeline: str) -> tuple[Store, str, Path]:
    """Store and channel of a pipeline, and the project's folder."""
    loaded = config.load()
    return open_store(loaded.store_url(pipeline)), loaded.pipeline(pipeline).release.channel, loaded.root


def _signer(root: Path, folder: Path) -> str:
    """Who signed the release in a folder, in words.

    Raises:
        ReleaseError: there is a key file, and none of its builders did.
    """
    if not (root / KEY_FILE).is_file():
        return f"signature not checked: no {KEY_FILE} here"
    return f"signed by {KeyRing.load(root / KEY_FILE).verify_release(folder, now=datetime.now(UTC))}"
