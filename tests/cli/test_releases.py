"""Commands about releases, on a real file store with real signatures."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from graftline import settings
from graftline.digest import of_folder
from graftline.registry import heads
from graftline.registry.approval import collect
from graftline.registry.channel import ChannelChange, append, next_entry, read
from graftline.registry.file_store import FileStore
from graftline.registry.leases import Lease
from graftline.registry.policy import digest_of
from graftline.registry.releases import publish
from graftline.registry.seals import Evidence, seal
from graftline.registry.store import Store
from graftline.registry.trust import UNSIGNED
from graftline.release.manifest import Manifest, describe, write_manifest
from graftline.release.provenance import ProvenanceData, write_provenance
from graftline.release.signing import sign_folder
from tests.cli.conftest import Run
from tests.registry.entries import promotion_of
from tests.registry.people import NOW, People, target_of
from tests.release.packages import CREATED, LINEAGE, VERDICT, write_files
from tests.settings.documents import changed

Promote = Callable[[Manifest], None]


@pytest.fixture
def promote(store: Store, people: People) -> Promote:
    """Write a signed entry without the policy's checks: what is tested here only reads it."""

    def enter(manifest: Manifest) -> None:
        entry = next_entry(read(store, "demo", "production"), promotion_of(manifest, NOW))
        key, evidence = (
            people.private_key("pia"),
            Evidence(policy=digest_of(settings.load().channels["production"]), builder="bob"),
        )
        entry = seal(entry, keys=people.keys, private_key=key, now=NOW, evidence=evidence)
        append(store, entry)
        now = datetime.now(UTC)  # the commands' clock
        heads.sign(store, entry, keys=people.keys, private_key=key, now=now, valid=timedelta(days=1))

    return enter


def test_history_tells_who_promoted_what_and_why(
    project: Path, run: Run, store: Store, people: People, promote: Promote
) -> None:
    first = people.release(store, project / "a", "a")
    second = people.release(store, project / "b", "b")
    promote(first)
    promote(second)

    lines = run("history", "demo").out.splitlines()

    assert lines == [
        f"   1  2026-11-24 12:00:00Z  promote   {first.version}  ci: nightly",
        f"   2  2026-11-24 12:00:00Z  promote   {second.version}  ci: nightly",
    ]
    entries = json.loads(run("history", "demo", "--json").out)
    assert [entry["change"]["version"] for entry in entries] == [first.version, second.version]


@pytest.mark.usefixtures("project", "people")
def test_the_history_of_an_empty_channel_says_so(run: Run) -> None:
    assert run("history", "demo", "--channel", "staging").out == "demo: nothing was ever promoted to staging\n"


def test_an_edited_history_is_an_error(project: Path, run: Run, store: Store, people: People, promote: Promote) -> None:
    promote(people.release(store, project / "a", "a"))
    promote(people.release(store, project / "b", "b"))
    (entry,) = (project / "store" / "channels").rglob("0000000001.json")
    entry.write_text(entry.read_text().replace("nightly", "because"))

    ended = run("history", "demo")

    assert (ended.code, ended.out) == (2, "")
    assert "history was changed after the fact" in ended.err


def test_verify_reads_every_byte_and_the_signature(project: Path, run: Run, store: Store, people: People) -> None:
    manifest = people.release(store, project / "a")

    ended = run("verify", "demo", manifest.version)

    expected = f"{manifest.version}: 4 files, {manifest.num_bytes} bytes, as the manifest says; signed by bob\n"
    assert (ended.code, ended.out) == (0, expected)


READERS = ("history", "verify", "rollback", "pull", "page")


@pytest.mark.parametrize("command", READERS)
def test_without_keys_nothing_is_read_unless_that_is_said(
    project: Path, run: Run, store: Store, people: People, command: str
) -> None:
    made = [people.release(store, project / seed, seed, builder=None) for seed in "ab"]
    for manifest in made:
        change = ChannelChange(
            action="promote",
            version=manifest.version,
            release=manifest.digest,
            verdict=manifest.verdict,
            actor="ci",
            reason="nightly",
            time=NOW,
        )
        append(store, next_entry(read(store, "demo", "production"), change))
    version = made[0].version
    arguments = {"verify": [version], "rollback": ["--reason", "x", "--as", "ada"], "pull": [version, "got"]}
    words = ("demo", *arguments.get(command, []))
    (project / "keys.yaml").unlink()
    ended = run(command, *words)
    assert (ended.code, ended.out) == (2, "")
    assert "so no signature can be checked" in ended.err
    assert "--unsigned, or `unsigned: true` in keys.yaml" in ended.err
    (project / "keys.yaml").write_text("keys: []\n")  # nobody counts: not the same as not looking
    assert run(command, *words).code == (0 if command == "page" else 2)
    (project / "keys.yaml").write_text("keys: []\nunsigned: true\n")
    ended = run(command, *words)
    assert (ended.code, UNSIGNED in ended.err) == (0, True), ended.err
    if command == "page":
        assert UNSIGNED in (project / "registry.html").read_text(encoding="utf-8")
    if command == "verify":
        assert ended.out.endswith(f"no signature was checked; {UNSIGNED}\n")
    (project / "keys.yaml").write_text(people.text)
    ended = run(command, *words, "--unsigned")
    assert (ended.code, "--unsigned would ignore them" in ended.err) == (2, True)


def test_verify_names_the_key_that_signed_the_provenance(project: Path, run: Run, store: Store, people: People) -> None:
    folder = project / "a"
    write_files(folder)
    files, lineage = of_folder(folder), LINEAGE
    data = ProvenanceData(
        pipeline="demo", created=CREATED, files=files, lineage=lineage, base="b", rows="r", code=lineage.data_digest
    )
    write_provenance(folder, data, people.private_key("ada"))
    write_manifest(folder, describe(folder, pipeline="demo", created=CREATED, lineage=lineage, verdict=VERDICT))
    sign_folder(folder, people.private_key("bob"))

    ended = run("verify", "demo", publish(store, folder).version)

    assert ended.code == 0, ended.err
    assert ended.out.endswith("signed by bob\nprovenance.intoto.json: signed by ada\n")


def test_verify_refuses_a_signature_of_a_stranger(project: Path, run: Run, store: Store, people: People) -> None:
    manifest = people.release(store, project / "a", builder="mallory")

    ended = run("verify", "demo", manifest.version)

    assert ended.code == 2
    assert "the signature is of none whose key has the role 'builder'" in ended.err


def test_verify_names_a_file_that_was_changed(project: Path, run: Run, store: Store, people: People) -> None:
    manifest = people.release(store, project / "a")
    (file,) = (project / "store").rglob("adapter_model.safetensors")
    file.chmod(0o644)
    file.write_bytes(b"x" * file.stat().st_size)

    ended = run("verify", "demo", manifest.version)

    assert ended.code == 2
    assert "adapter_model.safetensors" in ended.err


def test_verify_looks_at_the_signature_in_the_store_and_not_at_a_copy(
    project: Path, run: Run, store: Store, people: People, promote: Promote
) -> None:
    manifest = people.release(store, project / "a")
    assert run("verify", "demo", manifest.version).code == 0
    store.delete(f"releases/demo/{manifest.version}/model.sig")

    ended = run("verify", "demo", manifest.version)

    assert ended.code == 2
    assert "has no model.sig" in ended.err
    assert "it was never signed, or the signature was lost" in ended.err


def test_diff_names_files_that_differ(project: Path, run: Run, store: Store, people: People) -> None:
    first, second = people.release(store, project / "a", "a"), people.release(store, project / "b", "b")

    lines = run("diff", "demo", first.version, second.version).out.splitlines()

    assert lines == ["~ README.md", "~ adapter/adapter_model.safetensors"]
    assert run("diff", "demo", first.version, first.version).out == "no difference\n"


def test_an_approval_is_signed_and_kept_in_the_store(project: Path, run: Run, store: Store, people: People) -> None:
    manifest = people.release(store, project / "a")

    ended = run("approve", "demo", manifest.version, "--key", str(people.private_key("eve")))

    assert ended.out == f"eve approves {manifest.version} for production\n"
    (approval,) = collect(store, target_of(manifest))
    assert approval.statement.approver == "eve"


def test_an_approval_with_a_key_that_nobody_listed_is_refused(
    project: Path, run: Run, store: Store, people: People
) -> None:
    manifest = people.release(store, project / "a")

    ended = run("approve", "demo", manifest.version, "--key", str(people.private_key("mallory")))

    assert ended.code == 2
    assert "the key mallory is not in the key file" in ended.err


def test_rollback_points_the_channel_back(
    project: Path, run: Run, store: Store, people: People, promote: Promote
) -> None:
    first, second = people.release(store, project / "a", "a"), people.release(store, project / "b", "b")
    promote(first)
    promote(second)

    ended = run("rollback", "demo", "--reason", "errors rose", "--as", "ada")

    assert ended.out == f"production of demo holds {first.version} again (entry 3)\n"
    assert ended.err.splitlines()[-2:] == [
        f"production of demo holds {second.version} (entry 2, promote at 2026-11-24 12:00:00 UTC by ci: nightly)",
        f"going back to {first.version} (entry 1, promote at 2026-11-24 12:00:00 UTC by ci: nightly)",
    ]
    head = read(store, "demo", "production").entries[-1].change
    assert (head.action, head.version, head.actor, head.reason) == ("rollback", first.version, "ada", "errors rose")


@pytest.mark.usefixtures("project", "people")
def test_there_is_nothing_to_roll_back_to_at_first(run: Run) -> None:
    ended = run("rollback", "demo", "--reason", "errors rose")

    assert ended.code == 2
    assert "channel 'production' of 'demo' is empty; there is nothing to go back to" in ended.err


def test_gc_prints_first_and_removes_only_when_told(
    project: Path, run: Run, store: Store, people: People, promote: Promote
) -> None:
    first, second = people.release(store, project / "a", "a"), people.release(store, project / "b", "b")
    promote(second)

    planned = run("gc", "demo", "--days", "0").out
    assert f"keep    {second.version}  entry 1 of production" in planned
    assert f"remove  {first.version}\nnothing was removed; add --yes to do it\n" in planned
    assert run("verify", "demo", first.version).code == 0

    assert f"removed {first.version}\n" in run("gc", "demo", "--days", "0", "--yes").out
    assert run("verify", "demo", first.version).code == 2
    assert run("verify", "demo", second.version).code == 0


def test_gc_names_what_a_killed_publisher_left(project: Path, run: Run, store: Store, people: People) -> None:
    manifest = people.release(store, project / "a")
    part = project / "store" / "releases" / "demo" / manifest.version / ".weights.bin.abcd1234.part"
    part.write_bytes(bytes(1000))

    assert (
        f"remove  unfinished releases/demo/{manifest.version}/weights.bin of " in run("gc", "demo", "--days", "0").out
    )
    assert part.exists()
    assert "removed unfinished releases/demo/" in run("gc", "demo", "--days", "0", "--yes").out
    assert not part.exists()


def test_pull_takes_an_empty_folder_and_says_what_stands_in_its_way(
    project: Path, run: Run, store: Store, people: People
) -> None:
    manifest = people.release(store, project / "a")
    (project / "empty").mkdir()
    (project / "file").touch()

    assert run("pull", "demo", manifest.version, "empty").code == 0
    ended = run("pull", "demo", manifest.version, "file/x")
    assert ended.code == 2
    assert "a file is where a folder should be" in ended.err


def test_pull_gets_a_verified_release(project: Path, run: Run, store: Store, people: People) -> None:
    manifest = people.release(store, project / "a")

    ended = run("pull", "demo", manifest.version, "got")

    assert ended.out == f"got: 4 files, {manifest.num_bytes} bytes, verified; signed by bob\n"
    assert (project / "got" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_page_shows_every_release(project: Path, run: Run, store: Store, people: People) -> None:
    manifest = people.release(store, project / "a")

    assert run("page", "demo", "page.html").out == "page.html is written\n"
    assert manifest.version in (project / "page.html").read_text()


def test_a_new_key_signs_and_is_never_replaced(project: Path, run: Run, store: Store, people: People) -> None:
    assert run("new-key", "zoe").code == 0
    public = "".join(f"    {line}\n" for line in (project / "zoe.pub").read_text().splitlines())
    (project / "keys.yaml").write_text(f"{people.text}- name: zoe\n  roles: [reviewer]\n  public_key: |\n{public}")
    manifest = people.release(store, project / "a")

    assert run("approve", "demo", manifest.version, "--key", "zoe").out.startswith("zoe approves ")
    again = run("new-key", "zoe")
    assert (again.code, "exists already" in again.err) == (2, True)


def test_a_second_rollback_says_what_the_first_one_did_and_goes_further_when_told(
    project: Path, run: Run, store: Store, people: People, promote: Promote
) -> None:
    a, b, c = (people.release(store, project / seed, seed) for seed in "abc")
    for manifest in (a, b, c):
        promote(manifest)
    assert run("rollback", "demo", "--reason", "errors rose", "--as", "ada").code == 0
    second = run("rollback", "demo", "--reason", "errors rose", "--as", "eve")
    assert (second.code, second.out) == (2, "")
    assert f"by ada (entry 4), from {c.version} to {b.version}: errors rose" in second.err
    held = run("rollback", "demo", "--to", b.version, "--reason", "errors rose")
    assert held.out == f"production of demo holds {b.version} already (entry 4); nothing was written\n"
    assert run("rollback", "demo", "--again", "--reason", "errors rose").out.startswith(
        f"production of demo holds {a.version} again"
    )
    back = run("rollback", "demo", "--to", c.version, "--reason", "it was not that")
    assert back.code == 0
    assert f"which was gone back from: {b.version} (entry 4, rollback at" in back.err


@pytest.mark.parametrize(
    "reason",
    [
        "bad\n   4  2026-11-26 05:00:00Z  promote   20261126T000000Z-ffffffffffff  ceo: approved",
        "\x1b[1A\x1b[2K   1  2026",
        "\u202edevorppa",
        "\u2028   4  2026",
        "\r   4  2026",
    ],
)
def test_a_reason_writes_no_line_and_no_escape_sequence_into_the_history(
    project: Path, run: Run, store: Store, people: People, promote: Promote, reason: str
) -> None:
    for seed in "ab":
        promote(people.release(store, project / seed, seed))
    assert run("rollback", "demo", "--as", f"ada{reason}", "--reason", reason).code == 0
    ended = run("history", "demo")
    assert len(ended.out.splitlines()) == 3
    assert all(letter.isprintable() or letter == "\n" for letter in ended.out)
    again = run("rollback", "demo", "--reason", "x")
    assert all(letter.isprintable() or letter == "\n" for letter in again.err)


@pytest.mark.parametrize("option", ["--reason", "--as"])
def test_bytes_that_are_not_utf_8_are_refused_without_a_traceback(
    project: Path, run: Run, store: Store, people: People, promote: Promote, option: str
) -> None:
    for seed in "ab":
        promote(people.release(store, project / seed, seed))
    given = {"--reason": "x", "--as": "ada", option: os.fsdecode(b"caf\xe9")}
    ended = run("rollback", "demo", *(word for pair in given.items() for word in pair))
    assert (ended.code, ended.out) == (2, "")
    assert f"error: {option} 'caf" in ended.err
    assert len(read(store, "demo", "production").entries) == 2


@pytest.mark.parametrize("command", ["approve", "history"])
def test_a_mistyped_channel_is_named_with_the_nearest(
    project: Path, run: Run, store: Store, people: People, command: str
) -> None:
    manifest = people.release(store, project / "a")
    words = [manifest.version, "--key", str(people.private_key("eve"))] if command == "approve" else []
    ended = run(command, "demo", *words, "--channel", "prodution")
    assert ended.code == 2
    assert "expected one of staging, production; did you mean 'production'?" in ended.err
    assert store.list("approvals") == []


@pytest.mark.parametrize("lost", ["the newest entry", "the whole store"])
@pytest.mark.parametrize("command", ["history", "verify", "rollback", "doctor", "gc"])
def test_a_history_that_went_back_ends_every_command_that_looks_at_it(
    project: Path, run: Run, store: Store, people: People, promote: Promote, lost: str, command: str
) -> None:
    made = [people.release(store, project / seed, seed) for seed in "ab"]
    for manifest in made:
        promote(manifest)
    assert run("history", "demo").code == 0  # this machine has seen two entries
    if lost == "the whole store":
        (project / "store").rename(project / "elsewhere")
    else:
        store.delete("channels/demo/production/0000000002.json")
    words = {"verify": ["demo", made[0].version], "rollback": ["demo", "--reason", "x"], "doctor": []}
    ended = run(command, *words.get(command, ["demo"]))
    if command == "doctor":
        assert ended.code == 1
        assert "missing channel demo@production" in ended.out
    else:
        assert ended.code == 2
    assert "entry 2 was there" in ended.out + ended.err


def test_an_approval_is_not_dated_by_a_clock_that_differs_from_the_store_s(
    project: Path, run: Run, store: Store, people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = people.release(store, project / "a")
    monkeypatch.setattr(FileStore, "now", lambda self: datetime.now(UTC) - timedelta(hours=2))
    ended = run("approve", "demo", manifest.version, "--key", str(people.private_key("eve")))
    assert ended.code == 2
    assert "this machine's clock says" in ended.err


def test_a_user_without_a_name_is_asked_for_one(
    project: Path, run: Run, store: Store, people: People, promote: Promote, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in "ab":
        promote(people.release(store, project / seed, seed))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 123456789)
    ended = run("rollback", "demo", "--reason", "x")
    assert ended.code == 2
    assert "say who does it with --as NAME" in ended.err


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_a_key_file_that_cannot_be_read_is_not_taken_for_none(
    project: Path, run: Run, store: Store, people: People, promote: Promote, kind: str
) -> None:
    made = [people.release(store, project / seed, seed) for seed in "ab"]
    for manifest in made:
        promote(manifest)
    (project / "keys.yaml").unlink()
    if kind == "folder":
        (project / "keys.yaml").mkdir()
    else:
        (project / "keys.yaml").symlink_to(project / "nothing")
    for arguments in (("rollback", "demo", "--reason", "x"), ("verify", "demo", made[0].version)):
        ended = run(*arguments)
        assert ended.code == 2
        assert "cannot read the key file" in ended.err
    assert len(read(store, "demo", "production").entries) == 2


def test_a_lease_writes_no_line_into_the_plan_of_gc(project: Path, run: Run, store: Store, people: People) -> None:
    manifest = people.release(store, project / "a")
    until = datetime.now(UTC) + timedelta(hours=1)
    lease = Lease(holder="web\nremoved v1\x1b[2K", version=manifest.version, until=until)
    store.put_bytes("leases/demo/web.json", lease.to_bytes())
    ended = run("gc", "demo", "--days", "0")
    assert ended.out == f"keep    {manifest.version}  served by web\\nremoved v1\\x1b[2K\n"


def test_a_page_of_a_store_that_is_not_mounted_says_what_was_lost(
    project: Path, run: Run, store: Store, people: People, promote: Promote
) -> None:
    promote(people.release(store, project / "a"))
    assert run("history", "demo").code == 0
    (project / "store").rename(project / "elsewhere")
    assert run("page", "demo", "page.html").code == 0
    assert "the history went back" in (project / "page.html").read_text(encoding="utf-8")


def test_refresh_states_what_is_newest_where_the_channel_was_seen_or_its_number_is_given(
    project: Path, run: Run, store: Store, people: People, promote: Promote
) -> None:
    promote(people.release(store, project / "a"))
    store.delete("heads/demo/production/newest.json")
    (project / "pipelines.yaml").write_bytes(changed(**{"channels.production.head_hours": 0.001}))
    refused = run("refresh", "demo")  # of entries that are hours old, and never seen here
    assert (refused.code, "what came after it may be held back" in refused.err) == (2, True)
    assert run("refresh", "demo", "--newest", "2").code == 2
    stated = run("refresh", "demo", "--newest", "1")
    assert stated.out.startswith("production of demo: entry 1 is its newest, says pia until "), stated.err
    assert run("refresh", "demo").code == 0
    by = run("refresh", "demo", "--key", str(people.private_key("bob")))
    assert (by.code, "it needs 'timestamp'" in by.err) == (2, True)
