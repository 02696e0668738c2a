"""Soak: promoters that race, stores that fail, processes that are killed. Nothing may be lost or doubled.

    python -m tests.registry.soak              # make soak: 32 promoters × 100 rounds, ≥ 500 faults, every kill step
    python -m tests.registry.soak --seed 7 --rounds 10 --promoters 8 --faults 50
    python -m tests.registry.soak --only kills --on moto    # one part on one store; the file keeps the others
    python -m tests.registry.soak --only mix                # promoters, publishers, rollbacks and cleaners at once
    python -m tests.registry.soak --only caches             # 50 processes × 20 rounds fetch into one cache folder

The S3 servers are moto (repeats checksums without comparing them) and ministack (compares them), over HTTP; the faults
come from a proxy before them. Each run prints its seed. Writes ``studies/results/soak_store.json``.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from botocore.httpsession import URLLib3Session

from graftline.digest import of_bytes, write_json
from graftline.errors import ConflictError, ReleaseError, StoreError
from graftline.registry import channel
from graftline.registry.channel import ChannelChange, Log
from graftline.registry.cleanup import RetentionRules, clean_up, plan_cleanup
from graftline.registry.leases import holding
from graftline.registry.promotion import PromotionChecks, PromotionRequest, promote
from graftline.registry.releases import fetch, list_versions, load_manifest, publish, verify, verify_stored
from graftline.registry.s3_store import S3Store
from graftline.registry.store import Store, open_store
from graftline.release.manifest import read_manifest
from graftline.release.signing import sign_folder
from graftline.retry import Retry
from graftline.settings import Channel
from tests.registry.people import People
from tests.registry.proxy import TIMEOUT_SECONDS, Faults, fault_proxy
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, ministack_server, moto_server
from tests.release.packages import make_package

RESULTS = Path(__file__).resolve().parents[2] / "studies" / "results" / "soak_store.json"
PARTS = {
    "promoters": ["file", "moto", "ministack"],
    "faults": ["moto", "ministack"],
    "kills": ["file", "moto", "ministack"],
    "mix": ["file", "moto", "ministack"],
    "caches": ["file"],
}
"""Parts, and the stores that each runs on: faults are those of a network, so there are none on files."""
_PATIENCE_SECONDS = 3600
"""How long a process waits for the others: a machine that is busy with something else is no fault."""
_FORK = multiprocessing.get_context("fork")  # 32 processes share one import


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--promoters", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--faults", type=int, default=500, help="at least as many, on each server")
    parser.add_argument("--fetchers", type=int, default=50, help="processes that fetch at once")
    parser.add_argument("--fetches", type=int, default=20, help="rounds of them")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", choices=PARTS, help="one part; the others' results stay")
    parser.add_argument("--on", choices=["file", "moto", "ministack"], help="one store; the others' results stay")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    os.environ |= CREDENTIALS
    report: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as running:
        starts = {"moto": moto_server, "ministack": ministack_server}
        wanted = [name for name in starts if args.on in (None, name)]
        servers = {name: running.enter_context(starts[name]()) for name in wanted}
        for endpoint in servers.values():
            make_bucket(endpoint)
        for part in [args.only] if args.only else PARTS:
            for name in [args.on] if args.on else PARTS[part]:
                result = run_part(part, name, args, servers, Path(work))
                report.setdefault(part, {})[name] = {"date": datetime.now(UTC).isoformat(timespec="minutes"), **result}
                write_json(args.out, report)
                print(part, name, json.dumps(result), flush=True)


def run_part(part: str, name: str, args: argparse.Namespace, servers: dict[str, str], work: Path) -> dict[str, Any]:
    """Run one part on one kind of store."""
    with pointing_at(servers[name]) if name in servers else contextlib.nullcontext():
        url = f"s3://{BUCKET}/{part}" if name in servers else f"{work}/{part}"
        if part == "promoters":
            return race(url, args.promoters, args.rounds)
        if part == "kills":
            return kill_everywhere(work / f"kills-{name}", url)
        if part == "mix":
            return mix(url, args.promoters, args.rounds, args.seed)
        if part == "caches":
            return fetch_at_once(url, work / "caches", num_processes=args.fetchers, num_rounds=args.fetches)
    return publish_under_faults(servers[name], work / name, num_faults=args.faults, seed=args.seed)


@contextlib.contextmanager
def pointing_at(endpoint: str) -> Iterator[None]:
    """S3 stores opened inside use this server."""
    before = os.environ.get("AWS_ENDPOINT_URL_S3")
    os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
    try:
        yield
    finally:
        if before is None:
            del os.environ["AWS_ENDPOINT_URL_S3"]
        else:
            os.environ["AWS_ENDPOINT_URL_S3"] = before


# --- promoters ---------------------------------------------------------------------------------------------------


def race(url: str, num_promoters: int, num_rounds: int) -> dict[str, Any]:
    """Let processes read one head, wait for each other, and append: each round one must win and all others be told.

    Raises:
        AssertionError: a round with none or several winners, or a history that does not verify or is not theirs.
    """
    started = time.monotonic()
    barrier, answers = _FORK.Barrier(num_promoters), _FORK.Queue()
    processes = [
        _FORK.Process(target=_promoter, args=(url, number, num_rounds, barrier, answers), daemon=True)
        for number in range(num_promoters)
    ]
    for process in processes:
        process.start()
    wins: Counter[int] = Counter()
    conflicts: Counter[int] = Counter()
    winners: dict[int, str] = {}
    for _ in range(num_promoters * num_rounds):
        round_number, actor, outcome = answers.get(timeout=_PATIENCE_SECONDS)
        assert outcome in {"won", "conflict"}, outcome
        (wins if outcome == "won" else conflicts)[round_number] += 1
        if outcome == "won":
            winners[round_number] = actor
    for process in processes:
        process.join(timeout=60)
    log = channel.read(open_store(url), "demo", "production")
    assert all(wins[n] == 1 and conflicts[n] == num_promoters - 1 for n in range(num_rounds)), (wins, conflicts)
    assert [entry.change.actor for entry in log.entries] == [winners[n] for n in range(num_rounds)]
    return {
        "promoters": num_promoters,
        "rounds": num_rounds,
        "entries": len(log.entries),
        "wins": wins.total(),
        "conflicts_told": conflicts.total(),
        "seconds": round(time.monotonic() - started, 1),
    }


def _promoter(url: str, number: int, num_rounds: int, barrier: Barrier, answers: Any) -> None:
    store, actor = open_store(url), f"promoter-{number}"
    for round_number in range(num_rounds):
        head = channel.head(store, "demo", "production")
        barrier.wait(_PATIENCE_SECONDS)
        try:
            channel.append(store, channel.next_entry(Log("demo", "production", (head,) if head else ()), change(actor)))
            outcome = "won"
        except ConflictError:
            outcome = "conflict"
        except StoreError as error:
            outcome = repr(error)
        answers.put((round_number, actor, outcome))
        barrier.wait(_PATIENCE_SECONDS)


def change(actor: str, version: str = "v1") -> ChannelChange:
    """A change of a channel that only the actor tells from another."""
    now = datetime.now(UTC).replace(microsecond=0)
    release = of_bytes(version.encode())
    return ChannelChange(
        action="promote", version=version, release=release, verdict=None, actor=actor, reason="soak", time=now
    )


# --- mix ---------------------------------------------------------------------------------------------------------


def mix(url: str, num_promoters: int, num_rounds: int, seed: int) -> dict[str, Any]:
    """Promoters, and among them publishers, people who roll back and cleaners, each for so many rounds, unsynchronized.

    Every release is made once and published again and again, so that cleaners always find some that nobody names.

    Raises:
        AssertionError: a channel names what is not whole, an entry that was reported written is not there, a release
            that was reported published is neither there nor removed by a cleaner, or somebody ended in another error
            than "somebody else was first" or "it is gone".
    """
    started, answers = time.monotonic(), _FORK.Queue()
    few = num_promoters // 8 + 1
    roles = [*["publish"] * 2 * few, *["rollback"] * few, *["gc"] * few, *["promote"] * num_promoters]
    with tempfile.TemporaryDirectory() as work:
        packages = [Path(work) / str(number) for number in range(12)]
        for number, package in enumerate(packages):
            make_package(package, str(number))
        processes = [
            _FORK.Process(target=_act, args=(url, role, packages, num_rounds, f"{seed}-{n}", answers), daemon=True)
            for n, role in enumerate(roles)
        ]
        for process in processes:
            process.start()
        counts: Counter[str] = Counter()
        entered: list[tuple[str, str]] = []
        for _ in range(len(roles) * num_rounds):
            role, outcome, entry = answers.get(timeout=_PATIENCE_SECONDS)
            assert outcome in {"done", "conflict", "gone", "nothing"}, (role, outcome)
            counts[f"{role} {outcome}"] += 1
            entered += [entry] if entry else []
        for process in processes:
            process.join(timeout=60)
    store = open_store(url)
    log = channel.read(store, "demo", "production")
    assert sorted(entered) == sorted((entry.change.actor, entry.nonce) for entry in log.entries)
    for version in {entry.change.version for entry in log.entries[-1:]} | set(list_versions(store, "demo")):
        verify(store, "demo", version)
    assert store.list("leases") == []
    return {
        "processes": len(roles),
        "rounds": num_rounds,
        "seed": seed,
        **dict(sorted(counts.items())),
        "entries": len(log.entries),
        "seconds": round(time.monotonic() - started, 1),
    }


def _act(url: str, role: str, packages: list[Path], num_rounds: int, seed: str, answers: Any) -> None:
    """What one process does: ``num_rounds`` times its role."""
    store, chance, actor = open_store(url), random.Random(seed), f"{role}-{seed}"
    for _ in range(num_rounds):
        entry, outcome = None, "done"
        try:
            if role == "publish":
                publish(store, chance.choice(packages))
            elif role == "gc":
                rules, later = (
                    RetentionRules(newest_entries=1, min_age=timedelta(0)),
                    datetime.now(UTC) + timedelta(days=1),
                )
                plan = plan_cleanup(store, "demo", rules=rules, now=later)
                outcome = "done" if clean_up(store, plan, rules=rules, now=later) else "nothing"
            elif version := _choose(store, role, chance):
                entry = _enter(store, version, actor)
            else:
                outcome = "nothing"
                time.sleep(0.05)  # until somebody has published
        except ConflictError:
            outcome = "conflict"
        except ReleaseError as error:
            outcome = "gone" if "has no release" in str(error) or "is damaged: missing" in str(error) else repr(error)
        except Exception as error:  # noqa: BLE001 - told to whoever runs the soak
            outcome = repr(error)
        answers.put((role, outcome, entry and (actor, entry.nonce)))


def _choose(store: Store, role: str, chance: random.Random) -> str | None:
    """A release to promote, or one that the channel held before."""
    if role == "promote":
        versions = list_versions(store, "demo")
    else:
        versions = [entry.change.version for entry in channel.newest(store, "demo", "production", 5)]
    return chance.choice(versions) if versions else None


def _enter(store: Store, version: str, actor: str) -> channel.Entry:
    """What promotion and rollback do once a policy is met: hold, look at the store's bytes, write the entry, let go."""
    with holding(store, "demo", version, doing="promote") as claim:
        head = channel.head(store, "demo", "production")
        manifest = verify_stored(store, "demo", version, None, now=datetime.now(UTC))
        new = change(actor, version).model_copy(update={"release": manifest.digest})
        entry = channel.next_entry(Log("demo", "production", (head,) if head else ()), new)
        claim.check()
        channel.append(store, entry)
    return entry


def fetch_at_once(url: str, work: Path, *, num_processes: int, num_rounds: int) -> dict[str, Any]:
    """Let processes fetch one release into one cache folder at the same time, a fresh one each round; none may fail.

    Raises:
        AssertionError: one failed, or a cache folder cannot be used afterwards.
    """
    started = time.monotonic()
    store, together, answers = open_store(url), _FORK.Barrier(num_processes), _FORK.Queue()
    make_package(work / "package")
    version = publish(store, work / "package").version
    arguments = (url, version, work / "cache", num_rounds, together, answers)
    processes = [_FORK.Process(target=_fetcher, args=arguments, daemon=True) for _ in range(num_processes)]
    for process in processes:
        process.start()
    told = Counter(answers.get(timeout=_PATIENCE_SECONDS) for _ in range(num_processes * num_rounds))
    for process in processes:
        process.join(timeout=60)
    assert told == {"": num_processes * num_rounds}, told
    for number in range(num_rounds):
        fetch(store, "demo", version, work / "cache" / str(number) / version)
    return {
        "processes": num_processes,
        "rounds": num_rounds,
        "failed": 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def _fetcher(url: str, version: str, cache: Path, num_rounds: int, together: Barrier, answers: Any) -> None:
    store = open_store(url)
    for number in range(num_rounds):
        together.wait(_PATIENCE_SECONDS)
        try:
            fetch(store, "demo", version, cache / str(number) / version)
            answers.put("")
        except Exception as error:  # noqa: BLE001 - told to whoever runs the soak
            answers.put(repr(error))


# --- faults ------------------------------------------------------------------------------------------------------


def publish_under_faults(
    endpoint: str, work: Path, *, num_faults: int, seed: int, rate: float = 0.12
) -> dict[str, Any]:
    """Publish, promote and fetch through a proxy that fails, until ``num_faults`` were injected; check on the server.

    Raises:
        AssertionError: a release that was reported done and is not whole, a manifest whose files are not there, a
            fetched file with other bytes, or a broken or doubled history.
    """
    started, faults = time.monotonic(), Faults(seed=seed, rate=rate)
    retry = Retry(attempts=8, base_seconds=0.01, cap_seconds=0.2)
    counts: Counter[str] = Counter()
    prefix = f"faults-{seed}"
    with pointing_at(endpoint):
        direct = S3Store(BUCKET, prefix)
    entered: list[str] = []
    with fault_proxy(endpoint, faults) as address, pointing_at(address):
        shaky = S3Store(BUCKET, prefix, retry=retry, timeout_seconds=TIMEOUT_SECONDS)
        while faults.counts.total() < num_faults:
            counts["publishes"] += 1
            _publish_once(direct, shaky, work / str(counts["publishes"]), str(counts["publishes"]), counts, entered)
    log = channel.read(direct, "demo", "production")
    versions = [entry.change.version for entry in log.entries]
    assert len(set(versions)) == len(versions), "an entry was written twice"
    assert set(entered) <= set(versions), "an entry that was reported written is not there"
    return {
        "seed": seed,
        "faults": faults.counts.total(),
        "by_kind": dict(sorted(faults.counts.items())),
        **counts,
        "entries": len(versions),
        "seconds": round(time.monotonic() - started, 1),
    }


def _publish_once(direct: Store, shaky: Store, work: Path, seed: str, counts: Counter[str], entered: list[str]) -> None:
    manifest = make_package(work / "package", seed)
    try:
        publish(shaky, work / "package")
        assert verify(direct, "demo", manifest.version) == manifest
        counts["published"] += 1
    except StoreError:
        counts["gave_up"] += 1
        _check_absent_or_whole(direct, manifest.version, counts)
    publish(direct, work / "package")
    try:
        fetch(shaky, "demo", manifest.version, work / "fetched")
        counts["fetched"] += 1
    except StoreError:
        assert not (work / "fetched").exists()
        counts["fetch_gave_up"] += 1
    try:
        log = channel.read(shaky, "demo", "production")
        channel.append(shaky, channel.next_entry(log, change("soak", manifest.version)))
        entered.append(manifest.version)
    except ConflictError as error:
        raise AssertionError("nobody else is promoting") from error
    except StoreError:
        counts["append_gave_up"] += 1
    shutil.rmtree(work)


def _check_absent_or_whole(direct: Store, version: str, counts: Counter[str]) -> None:
    """After a publish that gave up: there is no manifest that can be read, or all of its files are there."""
    try:
        load_manifest(direct, "demo", version)
    except (ReleaseError, StoreError):
        return
    verify(direct, "demo", version)
    counts["gave_up_after_all_was_there"] += 1


# --- kills -------------------------------------------------------------------------------------------------------


def kill_everywhere(work: Path, url: str) -> dict[str, Any]:
    """Kill a process that publishes, then one that promotes, at each of its steps; then run it again.

    A step is a call that writes to the file system, and, on S3, a request: before it is sent, and after it was
    answered but before the answer is seen. ``url`` names a fresh store.

    Raises:
        AssertionError: something half is visible after a kill, or the next run does not finish it.
    """
    work.mkdir(parents=True)
    started, people = time.monotonic(), People(work)
    make_package(work / "package")
    sign_folder(work / "package", people.private_key("bob"))
    return {
        "publish_steps": _kill_at_every_step(partial(_publish_killed, work / "package", f"{url}/publish")),
        "promote_steps": _kill_at_every_step(partial(_promote_killed, work, people, f"{url}/promote")),
        "seconds": round(time.monotonic() - started, 1),
    }


def _kill_at_every_step(attempt: Callable[[int], bool]) -> int:
    """Run attempts killed at step 1, 2, … until one is through before its step comes; returns how many were killed."""
    step = 1
    while attempt(step):
        step += 1
    return step - 1


def _publish_killed(package: Path, url: str, step: int) -> bool:
    store = open_store(f"{url}-{step}")
    killed = _run_killed_at(step, lambda: publish(open_store(f"{url}-{step}"), package))
    manifest = read_manifest(package)
    if manifest.version in list_versions(store, "demo"):
        assert verify(store, "demo", manifest.version) == manifest
    publish(store, package)
    assert verify(store, "demo", manifest.version) == manifest
    return killed


def _promote_killed(work: Path, people: People, url: str, step: int) -> bool:
    store, folder = open_store(f"{url}-{step}"), work / f"fetched-{abs(hash(url))}-{step}"
    manifest = publish(store, work / "package")
    wish = PromotionRequest(pipeline="demo", channel="production", version=manifest.version, actor="ci", reason="soak")
    checks = PromotionChecks(policy=Channel(), keys=people.keys, smoke=lambda _: None)
    killed = _run_killed_at(step, lambda: promote(open_store(f"{url}-{step}"), wish, checks, folder=folder))
    before = channel.read(store, "demo", "production").entries
    entry = promote(store, wish, checks, folder=folder)
    assert channel.read(store, "demo", "production").entries == (entry,)
    assert before in {(), (entry,)}
    return killed


def _run_killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a process that kills itself (-9) at its ``step``-th step; returns whether it came so far."""
    process = _FORK.Process(target=_count_steps_and_die, args=(step, work))
    process.start()
    process.join(timeout=120)
    assert process.exitcode in {0, -9}, process.exitcode
    return process.exitcode == -9


def _count_steps_and_die(step: int, work: Callable[[], object]) -> None:
    left = step

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)

    def counted(original: Any, *, after: bool = False) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            result = original(*args, **kwargs)
            if after:
                count()
            return result

        return call

    for name in ("link", "replace", "fsync", "unlink", "mkdir", "chmod"):
        setattr(os, name, counted(getattr(os, name)))
    URLLib3Session.send = counted(URLLib3Session.send, after=True)
    work()


if __name__ == "__main__":
    main()
