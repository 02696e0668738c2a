"""Commands about releases and channels: promote, roll back, approve, inspect, verify and clean up."""

import contextlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from graftline import settings
from graftline.cli.arguments import (
    Actor,
    AsJson,
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
from graftline.logs import Reporter
from graftline.plain_text import check_text, count, one_line
from graftline.registry import approval, channel, cleanup, promotion, releases
from graftline.registry.cleanup import named_in_project
from graftline.registry.keys import KEY_FILE, KeyRing
from graftline.registry.policy import checked_now
from graftline.registry.promotion import PastEntry, PromotionChecks, PromotionRequest
from graftline.registry.promotion import promote as enter
from graftline.registry.releases import load_manifest
from graftline.registry.store import Store
from graftline.release.signing import create_key

PrivateKey = Annotated[Path, typer.Option("--key", metavar="FILE", help="The approver's private key.")]
BackTo = Annotated[
    str | None,
    typer.Option("--to", metavar="VERSION", help="By default the newest release that was not rolled back."),
]
Again = Annotated[
    bool, typer.Option("--again", help="Go back further even if another rollback was made within the hour.")
]
Other = Annotated[str, typer.Argument(metavar="OTHER", help="The release to compare with.", show_default=False)]
Target = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Where to write; created if missing.", show_default=False)
]
PageFile = Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write.")]
Entries = Annotated[
    int, typer.Option("--keep", metavar="N", min=1, help="How many of each channel's newest entries to keep.")
]
Days = Annotated[int, typer.Option("--days", metavar="N", min=0, help="Releases younger than this many days are kept.")]
Really = Annotated[bool, typer.Option("--yes", help="Really remove; without it only the plan is printed.")]


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
    """Print a channel's history: who promoted what, when and why. Every entry is verified."""
    loaded, store, own_channel = _open(pipeline)
    if channel_name:
        # A channel that pipelines.yaml no longer declares still has a history.
        loaded.known_channel(channel_name, tuple(channel.names(store, pipeline)))
    log = channel.read(store, pipeline, channel_name or own_channel)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in log.entries], indent=2))
        return
    if not log.entries:
        typer.echo(f"{pipeline}: nothing was ever promoted to {log.channel}")
    for entry in log.entries:
        change = entry.change
        what = f"{change.action:<8}  {change.version}  {change.actor}: {change.reason}"
        typer.echo(f"{entry.number:>4}  {change.time:%Y-%m-%d %H:%M:%S}Z  {one_line(what)}")


def verify(pipeline: PipelineName, version: Version) -> None:
    """Verify a release in the store, byte by byte. With a keys.yaml its signature is checked too."""
    loaded, store, _ = _open(pipeline)
    for name in channel.names(store, pipeline):
        channel.head(store, pipeline, name)  # a release means little in a store whose channels went back
    manifest = releases.verify(store, pipeline, version, on_progress=Reporter("verify", "bytes"))
    keys = _keys(loaded.root)
    signed = _signed_by(releases.signer(store, manifest, keys, now=datetime.now(UTC)) if keys else None)
    typer.echo(
        f"{version}: {count(len(manifest.files), 'file')}, {manifest.num_bytes} bytes, as the manifest says; {signed}"
    )


def diff(pipeline: PipelineName, version: Version, other: Other) -> None:
    """Compare the files, origin and verdict of two releases."""
    from graftline.registry.overview import diff as compare  # it writes pages too, see `page`

    _, store, _ = _open(pipeline)
    found = compare(*(releases.load_manifest(store, pipeline, one) for one in (version, other)))
    marked = (("-", found.removed), ("+", found.added), ("~", found.changed))
    lines = [f"{mark} {path}" for mark, paths in marked for path in paths]
    lines += [f"{name}: {before} -> {after}" for name, (before, after) in found.origin.items()]
    typer.echo("\n".join(map(one_line, lines)) or "no difference")


def approve(pipeline: PipelineName, version: Version, key: PrivateKey, channel_name: ChannelName = None) -> None:
    """Approve a release with a signature. The channel's policy says whose approvals count."""
    loaded, store, own_channel = _open(pipeline)
    to_channel = loaded.known_channel(channel_name or own_channel)
    release = releases.load_manifest(store, pipeline, version).digest
    target = approval.ApprovalTarget(pipeline, to_channel, version, release)
    keys = KeyRing.load(loaded.root / KEY_FILE)
    signed = approval.approve(store, target, keys=keys, private_key=key.expanduser(), now=checked_now(store))
    typer.echo(f"{signed.statement.approver} approves {version} for {target.channel}")


def rollback(
    pipeline: PipelineName,
    reason: Reason,
    to: BackTo = None,
    channel_name: ChannelName = None,
    actor: Actor = None,
    again: Again = False,
) -> None:
    """Return a channel to an earlier release. Nothing is uploaded or removed."""
    loaded, store, own_channel = _open(pipeline)
    announced: list[PastEntry] = []

    def announce(head: channel.Entry, past: PastEntry) -> None:
        announced.append(past)
        typer.echo(f"{head.channel} of {pipeline} holds {_in_words(head)}", err=True)
        typer.echo(f"going back to {_in_words(past.entry)}", err=True)
        if past.left_by:
            typer.echo(f"  which was gone back from: {_in_words(past.left_by)}", err=True)

    entry = promotion.rollback(
        store,
        pipeline=pipeline,
        to_channel=channel_name or own_channel,
        version=to,
        actor=acting(actor),
        reason=check_text("--reason", reason),
        how=promotion.Rollback(keys=_keys(loaded.root), again=again, announce=announce),
    )
    state = f"again (entry {entry.number})" if announced else f"already (entry {entry.number}); nothing was written"
    typer.echo(f"{entry.channel} of {pipeline} holds {entry.change.version} {state}")


def gc(pipeline: PipelineName, keep: Entries = 10, days: Days = 7, really: Really = False) -> None:
    """Remove old, unused releases. Also what killed writers left behind."""
    project, store, _ = _open(pipeline)
    named = named_in_project(project.root, pipeline, project.pipeline(pipeline).evaluate.references)
    rules, now = cleanup.RetentionRules(keep, timedelta(days=days), named), datetime.now(UTC)
    plan = cleanup.plan_cleanup(store, pipeline, rules=rules, now=now)
    for version, reason in plan.keep.items():
        typer.echo(one_line(f"keep    {version}  {reason}"))
    removed = cleanup.clean_up(store, plan, rules=rules, now=now) if really else ()
    for version in plan.remove:
        typer.echo(f"{'removed' if version in removed else 'remove':<8}{version}")
    for one in plan.unfinished:
        what = f"unfinished {one.key} of {one.modified:%Y-%m-%d %H:%M} UTC, {one.num_bytes} bytes"
        typer.echo(f"{'removed' if one.handle in removed else 'remove':<8}{what}")
    if (plan.remove or plan.unfinished) and not really:
        typer.echo("nothing was removed; add --yes to do it")


def pull(pipeline: PipelineName, version: Version, folder: Target) -> None:
    """Download a release into a folder and verify it. With a keys.yaml its signature is checked too."""
    loaded, store, _ = _open(pipeline)
    manifest = releases.fetch(store, pipeline, version, folder, on_progress=Reporter("pull", "bytes"))
    keys = _keys(loaded.root)
    signed = _signed_by(keys.verify_release(folder, now=datetime.now(UTC)) if keys else None)
    typer.echo(f"{folder}: {count(len(manifest.files), 'file')}, {manifest.num_bytes} bytes, verified; {signed}")


def page(pipeline: PipelineName, file: PageFile = Path("registry.html")) -> None:
    """Write an HTML page of the store. Every release, and what each channel held when."""
    from graftline.registry.overview import overview  # jinja2 and pyarrow, which it needs, cost half a second
    from graftline.release.pages.registry_page import write_registry

    loaded, store, _ = _open(pipeline)
    write_registry(file, overview(store, keys=_keys(loaded.root), now=datetime.now(UTC)))
    typer.echo(f"{file} is written")


def new_key(file: Path) -> None:
    """Make a key pair. FILE stays with the person who signs, FILE.pub goes into keys.yaml."""
    public = create_key(file.expanduser())
    typer.echo(f"{file} is the private key, keep it to yourself; list {public} in {KEY_FILE} by pull request")


def _open(pipeline: str) -> tuple[settings.Config, Store, str]:
    """The project, and a pipeline's store and channel."""
    loaded = settings.load()
    return loaded, open_release_store(loaded, pipeline), loaded.pipeline(pipeline).release.channel


def _keys(root: Path) -> KeyRing | None:
    """Whose signatures count; None if there is no key file (a folder or a dangling link is an error)."""
    return KeyRing.load(root / KEY_FILE) if os.path.lexists(root / KEY_FILE) else None


def _in_words(entry: channel.Entry) -> str:
    change = entry.change
    when = f"{change.action} at {change.time:%Y-%m-%d %H:%M:%S} UTC by {change.actor}: {change.reason}"
    return one_line(f"{change.version} (entry {entry.number}, {when})")


def _signed_by(builder: str | None) -> str:
    return f"signed by {builder}" if builder else f"signature not checked: no {KEY_FILE} here"


BaseFolder = Annotated[
    Path | None,
    typer.Option("--base", metavar="FOLDER", help="The base for the smoke run; by default it is found by its digest."),
]


def add_promote_to(app: typer.Typer) -> None:
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
    """Promote a release to a channel. Signature, digests, verdict, approvals and a smoke run are checked first."""
    loaded = settings.load()
    release = loaded.pipeline(pipeline).release
    channel = loaded.known_channel(channel_name or release.channel)
    actor, reason = acting(actor), check_text("--reason", reason)
    store, cache = open_release_store(loaded, pipeline), default_cache(loaded.root)
    against_production = any(gate.against == "production" for gate in loaded.pipeline(pipeline).gates.values())

    def smoke(folder: Path) -> None:
        # Imported here, after all other checks: torch and ONNX Runtime take seconds.
        from graftline.serve.served_base import Runtime
        from graftline.serve.smoke import check_release

        trained_on = load_manifest(store, pipeline, version).lineage.base_digest
        places = [base] if base else [loaded.root / "runs" / pipeline / "init" / "base", *(cache / "bases").glob("*")]
        check_release(folder, base=find_base(places, trained_on), runtime=Runtime(graphs=cache / "graphs"))

    checks = PromotionChecks(
        policy=loaded.channels[channel],
        keys=KeyRing.load(loaded.root / KEY_FILE),
        smoke=smoke,
        production=release.channel if against_production else None,
    )
    wish = PromotionRequest(pipeline=pipeline, channel=channel, version=version, actor=actor, reason=reason)
    folder = cache / "releases" / pipeline / version
    entry = enter(store, wish, checks, folder=folder, on_progress=Reporter("fetch", "bytes"))
    typer.echo(f"{channel} of {pipeline} holds {version} (entry {entry.number})")
    for line in entry.change.checks:
        typer.echo(f"  {one_line(line)}")


def find_base(places: list[Path], digest: Digest) -> Path:
    """The model folder with this digest; PromotionError if it is in none of the places."""
    from graftline.weights.identity import read_identity  # imports torch

    for folder in filter(Path.is_dir, places):
        with contextlib.suppress(CheckpointError):  # a damaged folder in the cache, or another kind of model
            if read_identity(folder).is_called(digest):
                return folder
    looked = ", ".join(str(folder) for folder in places)
    raise PromotionError(
        f"the smoke run needs the base {digest}, not found in {looked}; run the init stage, or give --base"
    )
