"""Soak: promoters that race, stores that fail, processes that are killed. Nothing may be lost or doubled.

    python -m benchmarks.soak_store              # make soak: 32 promoters × 100 rounds, ≥ 500 faults, every kill step
    python -m benchmarks.soak_store --seed 7 --rounds 10 --promoters 8 --faults 50
    python -m benchmarks.soak_store --only kills --on moto    # one part on one store; the file keeps the others

The S3 servers are moto (repeats checksums without comparing them) and ministack (compares them), over HTTP; the faults
come from a proxy before them. Each run prints its seed. Writes ``benchmarks/results/soak_store.json``.
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
from datetime import UTC, datetime
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from botocore.httpsession import URLLib3Session

from graftline.digest import of_bytes, write_json
from graftline.errors import ConflictError, ReleaseError, StoreError
from graftline.registry import channel
from graftline.registry.channel import Change, Log
from graftline.registry.policy import Policy
from graftline.registry.promotion import Checks, Wish, promote
from graftline.registry.releases import fetch, list_versions, load_manifest, publish, verify
from graftline.registry.retry import Retry
from graftline.registry.s3_store import S3Store
from graftline.registry.store import Store, open_store
from graftline.release.manifest import read_manifest
from graftline.release.signing import sign_folder
from tests.registry.people import People
from tests.registry.proxy import TIMEOUT_SECONDS, Faults, fault_proxy
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, ministack_server, moto_server
from tests.release.packages import make_package

RESULTS = Path(__file__).parent / "results" / "soak_store.json"
PARTS = {
    "promoters": ["file", "moto", "ministack"],
    "faults": ["moto", "ministack"],
    "kills": ["file", "moto", "ministack"],
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
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", choices=PARTS, help="one part; the others' results stay")
    parser.add_argument("--on", choices=["file", "moto", "ministack"], help="one store; the others' results stay")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    os.environ |= CREDENTIALS
    report: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as work, moto_server() as moto, ministack_server() as ministack:
        servers = {"moto": moto, "ministack": ministack}
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


def change(actor: str, version: str = "v1") -> Change:
    """A change of a channel that only the actor tells from another."""
    now = datetime.now(UTC).replace(microsecond=0)
    release = of_bytes(version.encode())
    return Change(
        action="promote", version=version, release=release, verdict=None, actor=actor, reason="soak", time=now
    )


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
    wish = Wish(pipeline="demo", channel="production", version=manifest.version, actor="ci", reason="soak")
    checks = Checks(policy=Policy(), keys=people.keys, smoke=lambda _: None)
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
