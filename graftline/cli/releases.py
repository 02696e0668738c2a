"""Commands about releases and channels: promote, roll back, approve, inspect, verify and clean up."""

import contextlib
import json
from datetime import UTC, datetime, timedelta
from functools import partial
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
    SigningKey,
    Unsigned,
    Version,
    acting,
    open_release_store,
    signing_key,
    trust_of,
)
from graftline.cli.telling import tell_receivers
from graftline.data.sources import default_cache
from graftline.digest import Digest
from graftline.errors import CheckpointError, PromotionError, UntrustedError
from graftline.logs import Reporter
from graftline.plain_text import check_text, count, one_line
from graftline.registry import approval, channel, cleanup, heads, promotion, releases
from graftline.registry.cleanup import named_in_project
from graftline.registry.keys import BUILDER, KEY_FILE, KeyRing
from graftline.registry.policy import PromotionFacts, checked_now
from graftline.registry.promotion import PastEntry, PromotionChecks, PromotionRequest, ReserveJudge
from graftline.registry.promotion import promote as enter
from graftline.registry.releases import load_manifest
from graftline.registry.store import Store
from graftline.registry.trust import UNSIGNED, EntryJudge, Trust, trust_in
from graftline.release.provenance import PROVENANCE_NAME, signed_with
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
Newest = Annotated[
    int | None,
    typer.Option("--newest", metavar="N", min=1, help="The newest entry's number, where this machine never saw one."),
]
Really = Annotated[bool, typer.Option("--yes", help="Really remove; without it only the plan is printed.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    example = "Example: graftline {} wordnet-category{}"
    version = "20261124T061800Z-0123456789ab"
    app.command("history", epilog=example.format("history", ""))(history)
    app.command("verify", epilog=example.format("verify", f" {version}"))(verify)
    app.command("diff", epilog=example.format("diff", f" {version} 20261125T061800Z-ba9876543210"))(diff)
    app.command("approve", epilog=example.format("approve", f" {version} --key ~/.graftline/ada"))(approve)
    app.command("refresh", epilog=example.format("refresh", ""))(refresh)
    app.command("rollback", epilog=example.format("rollback", ' --reason "errors rose"'))(rollback)
    app.command("pull", epilog=example.format("pull", f" {version} release"))(pull)
    app.command("page", epilog=example.format("page", " registry.html"))(page)
    app.command("new-key", epilog="Example: graftline new-key ~/.graftline/ada")(new_key)
    app.command("gc", epilog=example.format("gc", " --keep 10 --yes"))(gc)


def history(
    pipeline: PipelineName, channel_name: ChannelName = None, as_json: AsJson = False, unsigned: Unsigned = False
) -> None:
    """Print a channel's history: who promoted what, when and why. Every entry is verified."""
    loaded, store, own_channel = _open(pipeline)
    if channel_name:
        # A channel that pipelines.yaml no longer declares still has a history.
        loaded.known_channel(channel_name, tuple(channel.names(store, pipeline)))
    trust = trust_of(loaded, unsigned=unsigned)
    name = channel_name or own_channel
    judge = EntryJudge(store, pipeline, trust, now=datetime.now(UTC)) if trust else None
    log = channel.read(store, pipeline, name)
    problems = judge.problems(log) if judge else (None,) * len(log.entries)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in log.entries], indent=2))
    elif not log.entries:
        typer.echo(f"{pipeline}: nothing was ever promoted to {log.channel}")
    for entry, problem in zip(log.entries, problems, strict=True):
        change = entry.change
        what = f"{change.action:<8}  {change.holds}  {change.actor}: {change.reason}"
        if not as_json:
            typer.echo(f"{entry.number:>4}  {change.time:%Y-%m-%d %H:%M:%S}Z  {one_line(what)}")
            for check in change.checks:
                if check.startswith("reserve: ") or (change.anchor and check.startswith("anchor: ")):
                    typer.echo(f"      {one_line(check)}")
            if entry.seal is None and judge and not problem:
                typer.echo("      not signed: from before entries were; a later one, or keys.yaml, vouches for it")
        if problem:
            typer.echo(f"      does not count: it {one_line(problem)}", err=as_json)
    if found := [entry.number for entry, problem in zip(log.entries, problems, strict=True) if problem]:
        raise UntrustedError(f"entries that do not count: {', '.join(map(str, found))}; see above")
    if judge:
        judge.read(name)


def verify(pipeline: PipelineName, version: Version, unsigned: Unsigned = False) -> None:
    """Verify a release in the store: every byte, and its signature by the keys in keys.yaml."""
    loaded, store, _ = _open(pipeline)
    keys = _keys(loaded, unsigned=unsigned)
    for name in channel.names(store, pipeline):
        channel.head(store, pipeline, name)  # a release means little in a store whose channels went back
    manifest = releases.verify(store, pipeline, version, on_progress=Reporter("verify", "bytes"))
    signed = _signed_by(releases.signer(store, manifest, keys, now=datetime.now(UTC)) if keys else None)
    typer.echo(
        f"{version}: {count(len(manifest.files), 'file')}, {manifest.num_bytes} bytes, as the manifest says; {signed}"
    )
    if keys and any(entry.path == PROVENANCE_NAME for entry in manifest.files):
        data = store.get(releases.release_key(pipeline, version, PROVENANCE_NAME)) or b""
        signer = signed_with(data, {own: key.ecdsa for own, key in keys.keys.items() if BUILDER in key.roles})
        by = f"by {signer}" if signer else f"with a key that {KEY_FILE} does not list"
        typer.echo(f"{PROVENANCE_NAME}: signed {by}")


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


def rollback(  # noqa: PLR0913  # each is an option of the command
    pipeline: PipelineName,
    reason: Reason,
    to: BackTo = None,
    channel_name: ChannelName = None,
    actor: Actor = None,
    again: Again = False,
    key: SigningKey = None,
    unsigned: Unsigned = False,
) -> None:
    """Return a channel to an earlier release. Nothing is uploaded or removed."""
    loaded, store, own_channel = _open(pipeline)
    trust = trust_of(loaded, unsigned=unsigned)
    announced: list[PastEntry] = []

    def announce(head: channel.Entry, past: PastEntry) -> None:
        announced.append(past)
        typer.echo(f"{head.channel} of {pipeline} holds {_in_words(head)}", err=True)
        to_incumbent = past.entry is head  # a rollout ends
        typer.echo(f"going back to {past.entry.change.version if to_incumbent else _in_words(past.entry)}", err=True)
        if past.left_by:
            typer.echo(f"  which was gone back from: {_in_words(past.left_by)}", err=True)

    entry = promotion.rollback(
        store,
        pipeline=pipeline,
        to_channel=channel_name or own_channel,
        version=to,
        actor=acting(actor),
        reason=check_text("--reason", reason),
        how=promotion.Rollback(
            keys=trust.keys if trust else None,
            trust=trust,
            key=signing_key(key) if trust else None,
            again=again,
            announce=announce,
        ),
    )
    state = f"again (entry {entry.number})" if announced else f"already (entry {entry.number}); nothing was written"
    typer.echo(f"{entry.channel} of {pipeline} holds {entry.change.version} {state}")
    tell_receivers(loaded, store, pipeline, entry.channel, trust)


def refresh(
    pipeline: PipelineName, channel_name: ChannelName = None, key: SigningKey = None, newest: Newest = None
) -> None:
    """Sign a statement that a channel's newest entry is still its newest. Run it every night."""
    loaded, store, own_channel = _open(pipeline)
    name, now = loaded.known_channel(channel_name or own_channel), datetime.now(UTC)
    ring = KeyRing.load(loaded.root / KEY_FILE)
    judge = EntryJudge(store, pipeline, Trust(keys=ring, policies=loaded.channels), now=now)
    entry = judge.read(name, newest=newest).log.head
    if entry is None:
        typer.echo(f"{pipeline}: nothing was ever promoted to {name}")
        return
    valid = timedelta(hours=loaded.channels[name].head_hours)
    head = heads.sign(store, entry, keys=ring, private_key=signing_key(key), now=now, valid=valid).statement
    typer.echo(f"{name} of {pipeline}: entry {entry.number} is its newest, says {head.signer} until {head.expires}")


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


def pull(pipeline: PipelineName, version: Version, folder: Target, unsigned: Unsigned = False) -> None:
    """Download a release into a folder and verify it: every byte, and its signature by the keys in keys.yaml."""
    loaded, store, _ = _open(pipeline)
    keys = _keys(loaded, unsigned=unsigned)
    manifest = releases.fetch(store, pipeline, version, folder, on_progress=Reporter("pull", "bytes"))
    signed = _signed_by(keys.verify_release(folder, now=datetime.now(UTC)) if keys else None)
    typer.echo(f"{folder}: {count(len(manifest.files), 'file')}, {manifest.num_bytes} bytes, verified; {signed}")


def page(pipeline: PipelineName, file: PageFile = Path("registry.html"), unsigned: Unsigned = False) -> None:
    """Write an HTML page of the store. Every release, and what each channel held when."""
    from graftline.registry.overview import overview  # jinja2 and pyarrow, which it needs, cost half a second
    from graftline.release.pages.registry_page import write_registry

    loaded, store, _ = _open(pipeline)
    trust = trust_of(loaded, unsigned=unsigned)
    write_registry(file, overview(store, keys=trust.keys if trust else None, trust=trust, now=datetime.now(UTC)))
    typer.echo(f"{file} is written")


def new_key(file: Path) -> None:
    """Make a key pair. FILE stays with the person who signs, FILE.pub goes into keys.yaml."""
    public = create_key(file.expanduser())
    typer.echo(f"{file} is the private key, keep it to yourself; list {public} in {KEY_FILE} by pull request")


def _open(pipeline: str) -> tuple[settings.Config, Store, str]:
    """The project, and a pipeline's store and channel."""
    loaded = settings.load()
    return loaded, open_release_store(loaded, pipeline), loaded.pipeline(pipeline).release.channel


def _keys(loaded: settings.Config, *, unsigned: bool) -> KeyRing | None:
    """Whose signatures count; None if the user said that nothing is to be checked."""
    trust = trust_of(loaded, unsigned=unsigned)
    return trust.keys if trust else None


def _in_words(entry: channel.Entry) -> str:
    change = entry.change
    when = f"{change.action} at {change.time:%Y-%m-%d %H:%M:%S} UTC by {change.actor}: {change.reason}"
    return one_line(f"{change.holds} (entry {entry.number}, {when})")


def _signed_by(builder: str | None) -> str:
    return f"signed by {builder}" if builder else f"no signature was checked; {UNSIGNED}"


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
    key: SigningKey = None,
) -> None:
    """Promote a release to a channel. Signature, digests, verdict, approvals and a smoke run are checked first."""
    loaded = settings.load()
    release = loaded.pipeline(pipeline).release
    channel = loaded.known_channel(channel_name or release.channel)
    actor, reason = acting(actor), check_text("--reason", reason)
    store, cache = open_release_store(loaded, pipeline), default_cache(loaded.root)
    gates = loaded.pipeline(pipeline).gates.values()
    against_production = any(gate.against == "production" for gate in gates)

    places = [base] if base else []
    places += [loaded.root / "runs" / pipeline / "init" / "base", *(cache / "bases").glob("*")]

    def smoke(folder: Path) -> None:
        # Imported here, after all other checks: torch and ONNX Runtime take seconds.
        from graftline.export.targets import require_vllm
        from graftline.serve.served_base import Runtime
        from graftline.serve.smoke import check_release

        if loaded.channels[channel].served_by == "vllm":
            require_vllm(folder, channel)
        trained_on = load_manifest(store, pipeline, version).lineage.base_digest
        asked = places[:1] if base else places
        check_release(folder, base=find_base(asked, trained_on), runtime=Runtime(graphs=cache / "graphs"))

    def look(folder: Path, case: PromotionFacts) -> ReserveJudge:
        # Imported here: torch takes seconds.
        from graftline.workflow.reserve import prepare_look
        from graftline.workflow.workspace import Workspace

        at = Workspace(loaded.root, pipeline)
        return prepare_look(loaded.pipeline(pipeline), at, folder, case, find_base=partial(find_base, places))

    ring = KeyRing.load(loaded.root / KEY_FILE)
    checks = PromotionChecks(
        policy=loaded.channels[channel],
        keys=ring,
        trust=Trust(keys=ring, policies=loaded.channels),
        key=signing_key(key),
        smoke=smoke,
        reserve=look,
        production=release.channel if against_production else None,
        anchored=channel == release.channel and loaded.is_anchored(pipeline),
    )
    wish = PromotionRequest(pipeline=pipeline, channel=channel, version=version, actor=actor, reason=reason)
    folder = cache / "releases" / pipeline / version
    entry = enter(store, wish, checks, folder=folder, on_progress=Reporter("fetch", "bytes"))
    typer.echo(f"{channel} of {pipeline} holds {entry.change.holds} (entry {entry.number})")
    for line in entry.change.checks:
        typer.echo(f"  {one_line(line)}")
    tell_receivers(loaded, store, pipeline, channel, trust_in(ring, loaded.channels))


def find_base(places: list[Path], digest: Digest) -> Path:
    """The model folder with this digest; PromotionError if it is in none of the places."""
    from graftline.weights.identity import read_identity  # imports torch

    for folder in filter(Path.is_dir, places):
        with contextlib.suppress(CheckpointError):  # a damaged folder in the cache, or another kind of model
            if read_identity(folder).is_called(digest):
                return folder
    looked = ", ".join(str(folder) for folder in places)
    raise PromotionError(
        f"the promotion needs the base {digest}, not found in {looked}; run the init stage, or give --base"
    )
