"""Scale: what a store of 10,000 releases, a channel of 10,000 entries and a graph of 1,000 pipelines cost.

    python -m benchmarks.scale                               # every part, full size
    python -m benchmarks.scale --parts store --scale 0.1     # one part, a tenth of the size

Synthetic: releases of three small files, entries as promotions write them, pipelines whose stages do nothing. Each
operation is timed at growing sizes; ``growth`` is the exponent b of seconds ~ size^b between the two largest, so 1 is
linear and 2 is quadratic. Parts that ran replace their own in ``benchmarks/results/scale.json``.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from flows import archive
from flows.changes import read_graph
from graftline.digest import of_bytes
from graftline.registry import channel
from graftline.registry.cleanup import Rules, clean_up, plan_cleanup
from graftline.registry.file_store import FileStore
from graftline.registry.overview import overview
from graftline.registry.releases import list_versions, release_key
from graftline.release.manifest import FileEntry, GateVerdict, Lineage, Manifest
from graftline.release.registry_page import render_registry
from tests.flows.deployed import BIN, serve
from tests.flows.stand_in_project import make_repository
from tests.flows.tiny_project import PIPELINE, commit
from tests.line.project import read_yaml, write_yaml

RESULTS = Path(__file__).parent / "results" / "scale.json"
START = datetime(2026, 1, 1, tzinfo=UTC)
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for part in args.parts:
        measure, sizes = PARTS[part]
        with tempfile.TemporaryDirectory() as work:
            rows = [
                row
                for size in (max(2, round(size * args.scale)) for size in sizes)
                for row in _shown(part, measure(Path(work) / f"{size}", size))
            ]
        report[part] = {"rows": rows, "growth": _growth(rows)}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({part: report[part]["growth"] for part in args.parts}, indent=2))


def _shown(part: str, rows: Rows) -> Rows:
    for row in rows:
        print(part, row, file=sys.stderr, flush=True)
    return rows


def _growth(rows: Rows) -> dict[str, float]:
    """Exponent of each operation between its two largest sizes."""
    growth = {}
    for operation in dict.fromkeys(row["operation"] for row in rows):
        (one, first), (two, second) = sorted((r["size"], r["seconds"]) for r in rows if r["operation"] == operation)[
            -2:
        ]
        growth[operation] = round(math.log(second / first) / math.log(two / one), 2)
    return growth


def _timed(operation: str, size: int, work: Callable[[], object], **more: object) -> dict[str, Any]:
    started = time.perf_counter()
    work()
    return {"operation": operation, "size": size, "seconds": round(time.perf_counter() - started, 5), **more}


def measure_store(folder: Path, size: int) -> Rows:
    """``size`` releases of ten pipelines."""
    store = FileStore(folder)
    pipelines = [f"pipeline-{i}" for i in range(10)]
    for index in range(size):
        write_release(store, pipelines[index % 10], index)
    for pipeline in pipelines:
        extend_channel(store, pipeline, "production", list_versions(store, pipeline)[-20:])
    now, rules = START + timedelta(days=4000), Rules()
    page: list[str] = []

    def show() -> None:
        page.append(render_registry(overview(store, keys=None, now=now)))

    def collect() -> None:
        plan = plan_cleanup(store, pipelines[0], rules=rules, now=now)
        clean_up(store, plan, rules=rules, now=now)

    rows = [
        _timed("list one pipeline's versions", size, lambda: list_versions(store, pipelines[1])),
        _timed("registry page", size, show),
        _timed("gc of one pipeline", size, collect),
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
    store = FileStore(folder)
    extend_channel(store, "demo", "production", [f"20260101T000000Z-{i:012x}" for i in range(size)])
    return [
        _timed("what is in production (head)", size, lambda: channel.head(store, "demo", "production")),
        _timed("its ten newest entries", size, lambda: channel.newest(store, "demo", "production", 10)),
        _timed("whole history, verified", size, lambda: channel.read(store, "demo", "production")),
    ]


def measure_channels(folder: Path, size: int) -> Rows:
    """``size`` channels with 100 entries each: what a server that follows all of them asks for."""
    store = FileStore(folder)
    for index in range(size):
        extend_channel(store, "demo", f"channel-{index}", [f"20260101T000000Z-{i:012x}" for i in range(100)])

    def follow() -> None:
        for index in range(size):
            channel.head(store, "demo", f"channel-{index}")

    return [_timed("heads of all channels", size, follow)]


def measure_graph(folder: Path, size: int) -> Rows:
    """``size`` pipelines of nine stages in one dvc.yaml."""
    root = make_project(folder, size)
    name = "pipeline-0000"
    (root / "runs" / name).mkdir(parents=True)
    (root / "runs" / name / "resolved.json").write_text('{"sources": {}, "champion": null}')
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    revision = head.stdout.strip()
    dvc = [sys.executable, "-m", "dvc"]

    def run(*arguments: str) -> None:
        subprocess.run([*dvc, *arguments], cwd=root, check=True, capture_output=True)

    rows = [
        _timed("digest of every pipeline's inputs", size, lambda: read_graph(root, revision)),
        _timed("dvc status of one pipeline", size, lambda: run("status", f"fetch@{name}", f"train@{name}")),
        _timed("dvc repro of one stage", size, lambda: run("repro", "--single-item", f"fetch@{name}")),
    ]
    document = read_yaml(root)
    document["pipelines"] = {name: document["pipelines"][name]}
    write_yaml(root, document)
    return [*rows, _timed("the same, checkout narrowed", size, lambda: run("repro", "--single-item", f"fetch@{name}"))]


def make_project(folder: Path, size: int) -> Path:
    """The stand-in project with many pipelines."""
    root = make_repository(folder)
    document = read_yaml(root)
    one = document["pipelines"][PIPELINE]
    document["pipelines"] = {f"pipeline-{i:04d}": one for i in range(size)}
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
    ours = _timed("flows.archive, one stage", size, lambda: archive.push(stage, name, root=root))
    push = [*dvc, "push", "--run-cache", f"{stage}@{name}"]
    theirs = _timed(
        "dvc push --run-cache", size, lambda: subprocess.run(push, cwd=root, check=True, capture_output=True)
    )
    return [ours, theirs]


def measure_prefect(folder: Path, size: int) -> Rows:
    """A server (SQLite) with ``size`` runs of a deployment that wait, and as many pipelines' limits."""
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
            _timed("queue runs", size, queue),
            _timed("make pipelines' limits", size, limit),
            _timed("a worker asks for work", size, poll),
            _timed("take one pipeline's limit", size, take),
            _timed("read a page of 200 runs", size, lambda: client.read_flow_runs(limit=200)),
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
