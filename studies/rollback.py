"""Rollback: how long one command takes, over HTTP, for a release of realistic size, and what it sends.

    python -m studies.rollback                      # 300 MB releases, a history of 40 entries, 5 rollbacks
    python -m studies.rollback --megabytes 1000

Two releases with a merged model lie on an S3 server (ministack, in a process of its own); a channel held them in turn.
``graftline rollback`` runs as a user runs it, start of Python included, through a proxy that counts requests and bytes.
Each time the channel is read back. Writes ``studies/results/rollback.json``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from graftline.digest import write_json
from graftline.registry import channel
from graftline.registry.channel import Change
from graftline.registry.releases import publish
from graftline.registry.store import Store, open_store
from graftline.release.manifest import Manifest, describe, write_manifest
from tests.registry.proxy import Faults, fault_proxy
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, ministack_server
from tests.release.packages import LINEAGE, VERDICT, write_files
from tests.settings.documents import changed

RESULTS = Path(__file__).parent / "results" / "rollback.json"


class Counts(Faults):
    """No faults; counts what passes."""

    requests = 0
    bytes_sent = 0

    def draw(self, method: str, path: str, body: bytes) -> None:
        """Let it pass."""
        self.requests += 1
        self.bytes_sent += len(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="of each release")
    parser.add_argument("--entries", type=int, default=40, help="of the channel's history")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    counts = Counts()
    os.environ |= CREDENTIALS
    with tempfile.TemporaryDirectory() as work, ministack_server() as server, fault_proxy(server, counts) as proxy:
        make_bucket(server)
        os.environ["AWS_ENDPOINT_URL_S3"] = server
        store, project = open_store(f"s3://{BUCKET}/store"), Path(work)
        releases = [make_release(store, project / name, name, args.megabytes) for name in ("good", "bad")]
        for number in range(args.entries):
            enter(store, releases[number % 2])
        (project / "pipelines.yaml").write_bytes(changed(**{"demo.release.store": f"s3://{BUCKET}/store"}))
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy
        seconds = [roll_back(project, store, releases[number % 2].version) for number in range(args.times)]
    report = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "release_megabytes": round(releases[0].num_bytes / 1e6, 1),
        "release_files": len(releases[0].files),
        "history_entries": args.entries,
        "times": args.times,
        "median_seconds": round(statistics.median(seconds), 2),
        "max_seconds": round(max(seconds), 2),
        "requests_each": counts.requests // args.times,
        "bytes_sent_each": counts.bytes_sent // args.times,
    }
    write_json(args.out, report)
    print(json.dumps(report, indent=2))


def make_release(store: Store, folder: Path, seed: str, megabytes: int) -> Manifest:
    """Publish a release whose merged model has that size."""
    write_files(folder, seed)
    (folder / "merged").mkdir()
    with (folder / "merged" / "model.safetensors").open("wb") as stream:
        for _ in range(megabytes):
            stream.write(os.urandom(1_000_000))
    now = datetime.now(UTC).replace(microsecond=0)
    manifest = describe(folder, pipeline="demo", created=now, lineage=LINEAGE, verdict=VERDICT)
    write_manifest(folder, manifest)
    return publish(store, folder)


def enter(store: Store, manifest: Manifest) -> None:
    """One more entry of the channel."""
    change = Change(
        action="promote",
        version=manifest.version,
        release=manifest.digest,
        verdict=manifest.verdict,
        actor="benchmark",
        reason="one of many",
        time=datetime.now(UTC).replace(microsecond=0),
    )
    channel.append(store, channel.next_entry(channel.read(store, "demo", "production"), change))


def roll_back(project: Path, store: Store, version: str) -> float:
    """Seconds that the command takes; the channel must hold that release, and another one before.

    The release is named: a second rollback within the hour has to be told where to.
    """
    before = channel.head(store, "demo", "production")
    command = [sys.executable, "-m", "graftline.cli", "rollback", "demo", "--to", version]
    command += ["--reason", "errors rose", "--as", "ada"]
    started = time.perf_counter()
    subprocess.run(command, cwd=project, check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    seconds = time.perf_counter() - started
    after = channel.head(store, "demo", "production")
    assert before
    assert after
    assert after.change.action == "rollback"
    assert after.change.version == version != before.change.version
    return seconds


if __name__ == "__main__":
    main()
