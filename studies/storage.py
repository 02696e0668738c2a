"""The release store: transfer against raw boto3, and how long a rollback takes and what it sends.

transfer  our checked, resumable upload and download against boto3's `upload_file` and `download_file` as they come
          (parallel, with a CRC32 where ours computes SHA-256 of parts and of the whole). The server is a small one in a
          process of its own that keeps bodies in memory: a full emulator would be the bottleneck
rollback  `graftline rollback` as a user runs it, start of Python included, of releases of 300 MB whose channel has 40
          entries, against moto's S3 over HTTP, which counts requests and bytes. Each time the channel is read back
"""

import contextlib
import itertools
import logging
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import boto3
from botocore.config import Config
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from graftline.digest import Digest, of_bytes, of_file
from graftline.registry import channel
from graftline.registry.channel import ChannelChange
from graftline.registry.releases import publish
from graftline.registry.s3_store import S3Store
from graftline.registry.store import Store, open_store
from graftline.release.manifest import GateVerdict, Lineage, Manifest, describe, write_manifest
from studies.harness import Json, Setting, rate, ratio, turns, wall_seconds

BUCKET = "models"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = os.environ.copy()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def transfer(setting: Setting) -> Json:
    """Upload and download; every download is compared with what was uploaded."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Queue()
    server = fork.Process(target=_serve, args=(ready,), daemon=True)
    server.start()
    endpoint = f"http://127.0.0.1:{ready.get(timeout=30)}"
    try:
        with _environment(**CREDENTIALS, AWS_ENDPOINT_URL_S3=endpoint):
            return _transfer(setting)
    finally:
        server.terminate()


def _transfer(setting: Setting) -> Json:
    mib, work = setting.size(128, 4), setting.folder("files")
    source = _write_random(work / "source.bin", mib << 20)
    digest = of_file(source)
    store, raw = S3Store(BUCKET), boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    ways: dict[str, dict[str, Callable[[], object]]] = {
        "upload": {
            "ours": lambda: store.put_file("ours", source, digest=digest),
            "boto3": lambda: raw.upload_file(str(source), BUCKET, "raw"),
        },
        "download": {
            "ours": lambda: store.get_file("ours", work / "ours.bin"),
            "boto3": lambda: raw.download_file(BUCKET, "raw", str(work / "raw.bin")),
        },
    }
    report: Json = {"mib": mib}
    for direction, sides in ways.items():
        timed = {name: partial(wall_seconds, way) for name, way in sides.items()}
        seconds = turns(timed, setting.turns(12), seed=setting.seed)
        report[direction] = {f"{name}_mib_per_second": rate(mib, found) for name, found in seconds.items()}
        report[direction]["ratio"] = ratio(seconds["boto3"], seconds["ours"])
    assert of_file(work / "ours.bin") == of_file(work / "raw.bin") == digest
    return report


def _write_random(path: Path, num_bytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for start in range(0, num_bytes, 1 << 20):
            stream.write(os.urandom(min(1 << 20, num_bytes - start)))
    return path


def _serve(ready: Any) -> None:
    """Run the server until the process ends; puts its port into the queue."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Bodies)
    ready.put(server.server_port)
    server.serve_forever()


class _Bodies(BaseHTTPRequestHandler):
    """Just enough S3 for both: whole objects, multipart, ranges."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}
    uploads: ClassVar[dict[str, dict[int, bytes]]] = {}
    numbers: ClassVar[Iterator[int]] = itertools.count(1)

    def do_PUT(self) -> None:
        """An object, or a part."""
        query, body = self._query(), self._body()
        if "partNumber" in query:
            self.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
        else:
            self.objects[urlsplit(self.path).path] = body
        self._answer(200, {"ETag": '"0"'})

    def do_POST(self) -> None:
        """Begin or complete a multipart upload."""
        query = self._query()
        self._body()
        if "uploads" in query:
            upload, tag = str(next(self.numbers)), "InitiateMultipartUploadResult"
            self.uploads[upload] = {}
            self._answer(200, {}, f"<{tag}><UploadId>{upload}</UploadId></{tag}>".encode())
            return
        parts, tag = self.uploads.pop(query["uploadId"][0]), "CompleteMultipartUploadResult"
        self.objects[urlsplit(self.path).path] = b"".join(parts[number] for number in sorted(parts))
        self._answer(200, {}, f'<{tag}><ETag>"0"</ETag></{tag}>'.encode())

    def do_HEAD(self) -> None:
        """Length of an object."""
        self._answer(200, {"ETag": '"0"'}, length=len(self.objects[urlsplit(self.path).path]))

    def do_GET(self) -> None:
        """An object or a range of it; no unfinished uploads."""
        if "uploads" in self._query():
            self._answer(200, {}, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
            return
        data = memoryview(self.objects[urlsplit(self.path).path])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._answer(200, {"ETag": '"0"'}, data)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        self._answer(206, {"ETag": '"0"', "Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1])

    def _query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    def _body(self) -> bytes:
        """The request's body; boto3 sends it in chunks with a checksum at the end."""
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes | memoryview = b"", *, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Counting:
    """moto's S3 as a WSGI application that counts what it is asked."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self.requests = self.bytes_sent = 0

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Count and pass on."""
        self.requests += 1
        self.bytes_sent += int(environ.get("CONTENT_LENGTH") or 0)
        return self._application(environ, start_response)


def rollback(setting: Setting) -> Json:
    """Seconds, requests and bytes of one command."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request
    counts = Counting()
    server = make_server("127.0.0.1", 0, counts, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with _environment(**CREDENTIALS, AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{server.server_port}"):
            return _rollback(setting, counts)
    finally:
        server.shutdown()


def _rollback(setting: Setting, counts: Counting) -> Json:
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    url, project, num_entries = f"s3://{BUCKET}/store", setting.folder("project"), setting.size(40, 4)
    store = open_store(url)
    megabytes = setting.size(300, 1)
    releases = [_publish(store, setting.folder(name), name, megabytes) for name in ("good", "bad")]
    for number in range(num_entries):
        _enter(store, releases[number % 2])
    (project / "pipelines.yaml").write_text(PROJECT.format(store=url), encoding="utf-8")
    counts.requests = counts.bytes_sent = 0
    times = setting.rounds or setting.size(5, 1)
    seconds = [_roll_back(project, store, releases[number % 2].version) for number in range(times)]
    return {
        "release_megabytes": round(releases[0].num_bytes / 1e6, 1),
        "release_files": len(releases[0].files),
        "history_entries": num_entries,
        "times": times,
        "median_seconds": round(statistics.median(seconds), 2),
        "max_seconds": round(max(seconds), 2),
        "requests_each": counts.requests // times,
        "bytes_sent_each": counts.bytes_sent // times,
    }


PROJECT = """\
pipelines:
  demo:
    base: {{source: "path:base", template: none}}
    data: {{source: "path:rows.jsonl", evaluation_rows: 200, max_tokens: 64, labels: [cat, dog]}}
    quantize: {{method: none}}
    adapter: {{method: lora}}
    train: {{steps: 10, batch_size: 4, learning_rate: 0.001}}
    evaluate: {{metric: accuracy}}
    gates: {{better: {{metric: accuracy, direction: higher, test: non-inferiority, margin: 0.02, against: base}}}}
    package: {{merged: true}}
    release: {{store: "{store}", channel: production}}
channels: {{production: {{}}}}
"""


def stand_in_lineage(digest: Digest) -> Lineage:
    """Where a made-up release comes from: one digest for all that a real one names."""
    return Lineage(
        base_digest=digest,
        source_digest=None,
        quantizer_digest=None,
        data_digest=digest,
        template_digest=digest,
        config_digest=digest,
        dvc_lock_digest=None,
        code_revision="0" * 40,
        trust_remote_code=False,
    )


def _publish(store: Store, folder: Path, name: str, megabytes: int) -> Manifest:
    """A release whose merged model has that size."""
    _write_random(folder / "merged" / "model.safetensors", megabytes * 1_000_000)
    _write_random(folder / "adapter" / "adapter_model.safetensors", 70_000)
    (folder / "README.md").write_text(f"# {name}\n", encoding="utf-8")
    digest = of_bytes(name.encode())
    lineage = stand_in_lineage(digest)
    verdict = GateVerdict(outcome="pass", against="base", digest=digest)
    now = datetime.now(UTC).replace(microsecond=0)
    write_manifest(folder, describe(folder, pipeline="demo", created=now, lineage=lineage, verdict=verdict))
    return publish(store, folder)


def _enter(store: Store, manifest: Manifest) -> None:
    """One more entry of the channel."""
    change = ChannelChange(
        action="promote",
        version=manifest.version,
        release=manifest.digest,
        verdict=manifest.verdict,
        actor="study",
        reason="one of many",
        time=datetime.now(UTC).replace(microsecond=0),
    )
    channel.append(store, channel.next_entry(channel.read(store, "demo", "production"), change))


def _roll_back(project: Path, store: Store, version: str) -> float:
    """Seconds that the command takes; the channel must hold that release, and another one before.

    The release is named: a second rollback within the hour has to be told where to.
    """
    before = channel.head(store, "demo", "production")
    command = [sys.executable, "-m", "graftline.cli", "rollback", "demo", "--to", version]
    command += ["--reason", "errors rose", "--as", "ada", "--unsigned"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    seconds = wall_seconds(
        partial(subprocess.run, command, cwd=project, check=True, env=environment, capture_output=True)
    )
    after = channel.head(store, "demo", "production")
    assert before
    assert after
    assert after.change.action == "rollback"
    assert after.change.version == version != before.change.version
    return seconds


PARTS = {"transfer": transfer, "rollback": rollback}
