"""Scale: what a store of 10,000 releases, a channel of 10,000 entries and a graph of 1,000 pipelines cost.

    python -m studies.scale                               # what the file does not hold yet, full size
    python -m studies.scale --parts store --scale 0.1     # one part, a tenth of the size

Synthetic: releases of three small files, entries as promotions write them, pipelines whose stages do nothing. Each
operation is timed at growing sizes, in CPU seconds (Prefect's by the clock: its server works); ``growth`` is the
exponent b of seconds ~ size^b between the two largest, so 1 is linear and 2 is quadratic. For stores the requests are
counted too that S3 would get: a listing is one per 1,000 keys.

Each size of each part is written to ``studies/results/scale.json`` when it is done, and a size that stands there is
not measured again: an interrupted run goes on. To measure a part anew, take it out of the file.
"""

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from graftline.digest import of_bytes, write_json
from graftline.registry import channel
from graftline.registry.cleanup import Rules, clean_up, plan_cleanup
from graftline.registry.file_store import FileStore
from graftline.registry.log_checkpoints import keep, recall
from graftline.registry.overview import overview
from graftline.registry.releases import list_versions, release_key
from graftline.release.manifest import FileEntry, GateVerdict, Lineage, Manifest
from graftline.release.pages.registry_page import render_registry
from graftline.workflow import archive
from graftline.workflow.checkout import narrow
from graftline.workflow.inputs import of_code
from tests.flows.deployed import BIN, serve
from tests.line.project import read_yaml, write_yaml
from tests.workflow.stand_in_project import make_repository
from tests.workflow.tiny_project import PIPELINE, commit, git

RESULTS = Path(__file__).parent / "results" / "scale.json"
START = datetime(2026, 1, 1, tzinfo=UTC)
KEYS_A_PAGE = 1_000
"""Of S3's listing."""
Row = dict[str, Any]
Rows = list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for part in args.parts:
        measure, sizes = PARTS[part]
        for size in (max(2, round(size * args.scale)) for size in sizes):
            rows: Rows = report.get(part, {}).get("rows", [])
            if any(row["size"] == size for row in rows):
                continue
            with tempfile.TemporaryDirectory() as work:
                rows = sorted([*rows, *measure(Path(work) / f"{size}", size)], key=lambda row: int(row["size"]))
            report[part] = {"rows": rows, "growth": _growth(rows)}
            write_json(args.out, report)
    print(json.dumps({part: report[part]["growth"] for part in args.parts}, indent=2))


def _growth(rows: Rows) -> dict[str, float]:
    """Exponent of each operation between its two largest sizes."""
    growth = {}
    for operation in dict.fromkeys(row["operation"] for row in rows):
        measured = sorted((r["size"], r["seconds"]) for r in rows if r["operation"] == operation)
        if len(measured) > 1:
            (one, first), (two, second) = measured[-2:]
            growth[operation] = round(math.log(second / first) / math.log(two / one), 2)
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
    now, rules = START + timedelta(days=4000), Rules()
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
    data = of_bytes(f"{pipeline} {index}".encode())
    files = [FileEntry(path=name, num_bytes=1, digest=str(of_bytes(b"x"))) for name in ("a", "b", "c")]
    digest = str(data)
    manifest = Manifest(
        pipeline=pipeline,
        created=START + timedelta(minutes=index),
        files=tuple(files),
        lineage=Lineage(
            base_digest=digest,
            source_digest=None,
            quantizer_digest=None,
            data_digest=digest,
            template_digest=digest,
            config_digest=digest,
            dvc_lock_digest=None,
            code_revision="0" * 40,
            trust_remote_code=False,
        ),
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
        change = channel.Change(
            action="promote",
            version=version,
            release=str(of_bytes(version.encode())),
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
    root = make_project(folder, size)
    name = "pipeline-0000"
    for pipeline in read_yaml(root)["pipelines"]:
        (root / "runs" / pipeline).mkdir(parents=True)
        (root / "runs" / pipeline / "resolved.json").write_text('{"sources": {}, "champion": null}')
    git(root, "config", "graftline.disposable", "true")
    fetch = ["repro", "--single-item", f"fetch@{name}"]

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, capture_output=True)

    return [
        _timed("digest of every pipeline's inputs", size, lambda: of_code(root, list(read_yaml(root)["pipelines"]))),
        _timed("digest of one pipeline's inputs", size, lambda: of_code(root, [name])),
        _timed("dvc repro of one stage, whole checkout", size, lambda: run(*fetch)),
        _timed("narrow the checkout", size, lambda: narrow(root, name)),
        _timed("dvc repro of one stage, narrowed checkout", size, lambda: run(*fetch)),
    ]


def make_project(folder: Path, size: int) -> Path:
    """The stand-in project with many pipelines."""
    root = make_repository(folder)
    document = read_yaml(root)
    one = document["pipelines"][PIPELINE]
    # Copies: one section with a thousand aliases would be a small file.
    document["pipelines"] = {f"pipeline-{i:04d}": deepcopy(one) for i in range(size)}
    write_yaml(root, document)
    commit(root, "many")
    return root


def measure_archive(folder: Path, size: int) -> Rows:
    """A run cache with ``size`` earlier runs: one more is sent to an empty remote, by DVC's command and by ours."""
    root = make_project(folder, 1)
    stage, name = "fetch", "pipeline-0000"
    settings = root / ".dvc" / "config"
    settings.write_text(settings.read_text() + f"    remote = there\n['remote \"there\"']\n    url = {folder}-remote\n")
    (root / "runs" / name).mkdir(parents=True)
    (root / "runs" / name / "resolved.json").write_text('{"sources": {}, "champion": null}')
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "repro", "--single-item", f"{stage}@{name}"], cwd=root, check=True, capture_output=True)
    runs = root / ".dvc" / "cache" / "runs"
    (entry,) = [path for path in runs.glob("*/*/*") if path.is_file()]
    for index in range(size):
        key = of_bytes(f"{index}".encode()).hex
        (runs / key[:2] / key).mkdir(parents=True)
        shutil.copyfile(entry, runs / key[:2] / key / entry.name)
    ours = _timed("graftline.workflow.archive, one stage", size, lambda: archive.push(stage, name, root=root))
    push = [*dvc, "push", "--run-cache", f"{stage}@{name}"]
    theirs = _timed(
        "dvc push --run-cache", size, lambda: subprocess.run(push, cwd=root, check=True, capture_output=True)
    )
    return [ours, theirs]


def measure_prefect(folder: Path, size: int) -> Rows:
    """A server (PostgreSQL where it is installed, else SQLite) with ``size`` waiting runs and pipelines' limits."""
    folder.mkdir()
    with serve(folder) as server, SyncPrefectClient(server.url) as client:
        server.command(str(BIN / "prefect"), "--no-prompt", "work-pool", "create", "graftline", "--type", "process")
        flow = client.create_flow_from_name("retrain")
        deployment = client.create_deployment(flow, "retrain", work_pool_name="graftline")

        def queue() -> None:
            for index in range(size):
                client.create_flow_run_from_deployment(deployment, parameters={"pipeline": f"pipeline-{index}"})

        def limit() -> None:
            for index in range(size):
                client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=f"graftline-pipeline-{index}", limit=1)
                )

        def poll() -> None:
            # What a worker asks every few seconds.
            asked = {"scheduled_before": datetime.now(UTC).isoformat(), "limit": 8}
            client.request(
                "POST", "/work_pools/{name}/get_scheduled_flow_runs", path_params={"name": "graftline"}, json=asked
            )

        def take() -> None:
            client.increment_concurrency_slots(
                names=[f"graftline-pipeline-{size - 1}"], slots=1, mode="concurrency"
            ).raise_for_status()

        return [
            _timed("queue runs", size, queue, clock=time.perf_counter),
            _timed("make pipelines' limits", size, limit, clock=time.perf_counter),
            _timed("a worker asks for work", size, poll, clock=time.perf_counter),
            _timed("take one pipeline's limit", size, take, clock=time.perf_counter),
            _timed("read a page of 200 runs", size, lambda: client.read_flow_runs(limit=200), clock=time.perf_counter),
        ]


PARTS: dict[str, tuple[Callable[[Path, int], Rows], tuple[int, ...]]] = {
    "store": (measure_store, (1_000, 3_000, 10_000)),
    "channel": (measure_channel, (100, 1_000, 10_000)),
    "channels": (measure_channels, (10, 30, 100)),
    "graph": (measure_graph, (10, 100, 300, 1_000)),
    "archive": (measure_archive, (10, 100, 1_000, 10_000)),
    "prefect": (measure_prefect, (100, 300, 1_000)),
}


if __name__ == "__main__":
    main()
