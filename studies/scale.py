"""Scale: what a store of 10,000 releases, a channel of 10,000 entries and a graph of 1,000 pipelines cost.

Synthetic: releases of three small files, entries as promotions write them, pipelines whose stages do nothing. Each
operation is timed at growing sizes, in CPU seconds; ``growth`` is the exponent b of seconds ~ size^b between the two
largest, so 1 is linear and 2 is quadratic. For stores the requests are counted too that S3 would get: a listing is one
per 1,000 keys.
"""

import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from graftline.digest import of_bytes
from graftline.registry import channel
from graftline.registry.cleanup import RetentionRules, clean_up, plan_cleanup
from graftline.registry.file_store import FileStore
from graftline.registry.log_checkpoints import keep, recall
from graftline.registry.overview import overview
from graftline.registry.releases import list_versions, release_key
from graftline.release.manifest import FileEntry, GateVerdict, Manifest
from graftline.release.pages.registry_page import render_registry
from graftline.workflow.checkout import narrow
from graftline.workflow.inputs import of_code
from studies.harness import Json, Setting
from studies.project import git, make_many
from studies.storage import stand_in_lineage

START = datetime(2026, 1, 1, tzinfo=UTC)
KEYS_A_PAGE = 1_000
"""Of S3's listing."""
Row = dict[str, Any]
Rows = list[Row]


def _growth(rows: Rows) -> dict[str, float]:
    """Exponent of each operation between its two largest sizes."""
    growth = {}
    for operation in dict.fromkeys(row["operation"] for row in rows):
        measured = sorted((r["size"], r["seconds"]) for r in rows if r["operation"] == operation)
        if len(measured) > 1:
            (one, first), (two, second) = measured[-2:]
            growth[operation] = round(math.log(max(second, 1e-5) / max(first, 1e-5)) / math.log(two / one), 2)
    return growth


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for: others share the machine."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _timed(
    operation: str,
    size: int,
    work: Callable[[], object],
    *,
    store: "CountedStore | None" = None,
    clock: Callable[[], float] = _cpu_seconds,
) -> Row:
    """Seconds of one operation, and the requests that it sent to ``store``."""
    before, started = store.requests if store else 0, clock()
    work()
    row: Row = {"operation": operation, "size": size, "seconds": round(clock() - started, 5)}
    if store:
        row["requests"] = store.requests - before
    print(row, file=sys.stderr, flush=True)
    return row


class CountedStore(FileStore):
    """A folder that counts what an S3 store would have been asked for."""

    requests = 0

    def get(self, key: str) -> bytes | None:
        """One request."""
        self.requests += 1
        return super().get(key)

    def list(self, prefix: str) -> list[str]:
        """A request for each page of keys."""
        keys = super().list(prefix)
        self.requests += max(1, math.ceil(len(keys) / KEYS_A_PAGE))
        return keys

    def create(self, key: str, data: bytes) -> None:
        """One request."""
        self.requests += 1
        super().create(key, data)

    def delete(self, key: str) -> None:
        """One request."""
        self.requests += 1
        super().delete(key)


def measure_store(folder: Path, size: int) -> Rows:
    """``size`` releases of ten pipelines, whose channels held the newest hundred of each."""
    store = CountedStore(folder)
    pipelines = [f"pipeline-{i}" for i in range(10)]
    for index in range(size):
        write_release(store, pipelines[index % 10], index)
    for pipeline in pipelines:
        extend_channel(store, pipeline, "production", list_versions(store, pipeline)[-100:])
    now, rules = START + timedelta(days=4000), RetentionRules()
    page: list[str] = []

    def show() -> None:
        page.append(render_registry(overview(store, keys=None, now=now)))

    def collect() -> None:
        plan = plan_cleanup(store, pipelines[0], rules=rules, now=now)
        clean_up(store, plan, rules=rules, now=now)

    rows = [
        _timed("list one pipeline's versions", size, lambda: list_versions(store, pipelines[1]), store=store),
        _timed("registry page", size, show, store=store),
        _timed("gc of one pipeline", size, collect, store=store),
    ]
    rows[1]["megabytes"] = round(len(page[0]) / 1e6, 2)
    return rows


def write_release(store: FileStore, pipeline: str, index: int) -> None:
    """A release as `publish` leaves it: three files, the manifest last."""
    digest = of_bytes(f"{pipeline} {index}".encode())
    files = [FileEntry(path=name, num_bytes=1, digest=of_bytes(b"x")) for name in ("a", "b", "c")]
    manifest = Manifest(
        pipeline=pipeline,
        created=START + timedelta(minutes=index),
        files=tuple(files),
        lineage=stand_in_lineage(digest),
        verdict=GateVerdict(outcome="pass", against="base", digest=digest),
    )
    for entry in files:
        _put(store, release_key(pipeline, manifest.version, entry.path), b"x")
    _put(store, release_key(pipeline, manifest.version, "manifest.json"), manifest.to_bytes())


def _put(store: FileStore, key: str, data: bytes) -> None:
    """Without the store's flush to the disk: 40,000 of them would take most of the time and are not measured."""
    path = Path(store.url.removeprefix("file://")) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def extend_channel(store: FileStore, pipeline: str, name: str, versions: Sequence[str]) -> None:
    """Promotions of these versions, one after another."""
    log = channel.Log(pipeline, name, ())
    for index, version in enumerate(versions):
        change = channel.ChannelChange(
            action="promote",
            version=version,
            release=of_bytes(version.encode()),
            verdict=None,
            actor="scale",
            reason="measured",
            time=START + timedelta(minutes=index),
        )
        entry = channel.next_entry(log, change)
        _put(store, f"channels/{pipeline}/{name}/{entry.number:010d}.json", entry.to_bytes())
        log = channel.Log(pipeline, name, (entry,))


def measure_channel(folder: Path, size: int) -> Rows:
    """One channel with ``size`` entries."""
    store = CountedStore(folder)
    extend_channel(store, "demo", "production", [f"20260101T000000Z-{i:012x}" for i in range(size)])
    log = channel.Log("demo", "production", channel.read(store, "demo", "production").entries[:-1])

    def timed(operation: str, work: Callable[[], object]) -> Row:
        return _timed(operation, size, work, store=store)

    return [
        timed("what is in production (head)", lambda: channel.head(store, "demo", "production")),
        timed("the ten newest entries (gc)", lambda: channel.newest(store, "demo", "production", 10)),
        timed("the entry before (rollback)", lambda: list(islice(channel.backwards(store, "demo", "production"), 2))),
        timed("every entry (history)", lambda: channel.read(store, "demo", "production")),
        timed("make the checkpoints, once", lambda: keep(store, log)),
        timed("whole history by its checkpoints (promote, gc)", lambda: recall(store, "demo", "production")),
    ]


def measure_channels(folder: Path, size: int) -> Rows:
    """``size`` channels with 100 entries each: what a server that follows all of them asks for at each look."""
    store = CountedStore(folder)
    for index in range(size):
        extend_channel(store, "demo", f"channel-{index}", [f"20260101T000000Z-{i:012x}" for i in range(100)])

    entries: list[channel.Entry | None] = []

    def follow() -> None:
        entries.extend(channel.head(store, "demo", f"channel-{index}") for index in range(size))

    def look_again() -> None:
        for entry in entries:
            assert entry
            channel.newer(store, entry)

    return [
        _timed("names of the channels", size, lambda: channel.names(store, "demo"), store=store),
        _timed("heads of all channels", size, follow, store=store),
        _timed("another look at all channels", size, look_again, store=store),
    ]


def measure_graph(folder: Path, size: int) -> Rows:
    """``size`` pipelines of nine stages in one dvc.yaml: as they are, and in a checkout narrowed to one."""
    root, name = make_many(folder, size), "pipeline-0000"
    names = [f"pipeline-{number:04d}" for number in range(size)]
    git(root, "config", "graftline.disposable", "true")
    fetch = ["repro", "--single-item", f"fetch@{name}"]
    return [
        _timed("digest of every pipeline's inputs", size, lambda: of_code(root, names)),
        _timed("digest of one pipeline's inputs", size, lambda: of_code(root, [name])),
        _timed("dvc repro of one stage, whole checkout", size, lambda: _dvc(root, *fetch)),
        _timed("narrow the checkout", size, lambda: narrow(root, name)),
        _timed("dvc repro of one stage, narrowed checkout", size, lambda: _dvc(root, *fetch)),
    ]


def _dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, capture_output=True)


def part(
    measure: Callable[[Path, int], Rows], sizes: tuple[int, ...], quick: tuple[int, ...] = (3, 6)
) -> Callable[[Setting], Json]:
    """Measure at every size."""

    def run(setting: Setting) -> Json:
        rows: Rows = []
        for size in setting.size(sizes, quick):
            rows += measure(setting.work / f"{size}", size)
        return {"rows": rows, "growth": _growth(rows)}

    return run


PARTS = {
    "store": part(measure_store, (1_000, 3_000, 10_000), (10, 20)),
    "channel": part(measure_channel, (100, 1_000, 10_000), (20, 40)),
    "channels": part(measure_channels, (10, 30, 100)),
    "graph": part(measure_graph, (10, 100, 300, 1_000), (2,)),
}
