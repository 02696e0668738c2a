"""Transfer: our checked, resumable upload and download against raw boto3, paired in one run.

    python -m studies.store_transfer                 # 128 MiB, 12 pairs
    python -m studies.store_transfer --mib 512 --pairs 8

The server is a small one in a process of its own that keeps bodies in memory and speaks just enough S3 for both
(whole objects, multipart, ranges): a full emulator would be the bottleneck. boto3 is used as it comes: `upload_file`,
`download_file` with its own parallel transfers, which compute a CRC32. Ours computes SHA-256 of parts and of the whole.
The two alternate and take turns in going first, so that a busy machine is busy for both; what counts is the ratio.
Writes ``studies/results/store_transfer.json``.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import boto3
from botocore.config import Config

from graftline.digest import of_file, write_json
from graftline.registry.s3_store import S3Store
from tests.registry.servers import BUCKET, CREDENTIALS

RESULTS = Path(__file__).parent / "results" / "store_transfer.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    ready = fork.Queue()
    server = fork.Process(target=serve, args=(ready,), daemon=True)
    server.start()
    endpoint = f"http://127.0.0.1:{ready.get(timeout=30)}"
    os.environ |= CREDENTIALS | {"AWS_ENDPOINT_URL_S3": endpoint}
    with tempfile.TemporaryDirectory() as work:
        report = measure(Path(work), num_bytes=args.mib << 20, num_pairs=args.pairs)
    server.terminate()
    write_json(args.out, report)
    print(json.dumps(report, indent=2))


def measure(work: Path, *, num_bytes: int, num_pairs: int) -> dict[str, Any]:
    """Time both ways of transfer in turn; every download is compared with what was uploaded."""
    source = work / "source.bin"
    with source.open("wb") as stream:
        for _ in range(num_bytes >> 20):
            stream.write(os.urandom(1 << 20))
    digest = of_file(source)
    store, raw = S3Store(BUCKET), boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    ways: dict[str, Callable[[], object]] = {
        "upload ours": lambda: store.put_file("ours", source, digest=digest),
        "upload boto3": lambda: raw.upload_file(str(source), BUCKET, "raw"),
        "download ours": lambda: store.get_file("ours", work / "ours.bin"),
        "download boto3": lambda: raw.download_file(BUCKET, "raw", str(work / "raw.bin")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(num_pairs + 1):  # the first one warms up
        for direction in ("upload", "download"):
            for way in ("ours", "boto3") if pair % 2 else ("boto3", "ours"):
                started = time.perf_counter()
                ways[f"{direction} {way}"]()
                if pair:
                    seconds[f"{direction} {way}"].append(time.perf_counter() - started)
        assert of_file(work / "ours.bin") == of_file(work / "raw.bin") == digest
    return {"mib": num_bytes >> 20, "pairs": num_pairs, **summary(seconds, num_bytes)}


def summary(seconds: dict[str, list[float]], num_bytes: int) -> dict[str, Any]:
    """Median throughput, the median of the pairs' ratios ours / boto3, and the ratios."""
    report: dict[str, Any] = {}
    for direction in ("upload", "download"):
        ours, raw = seconds[f"{direction} ours"], seconds[f"{direction} boto3"]
        ratios = [b / a for a, b in zip(ours, raw, strict=True)]
        report[direction] = {
            "ours_mib_per_second": round(num_bytes / (1 << 20) / statistics.median(ours), 1),
            "boto3_mib_per_second": round(num_bytes / (1 << 20) / statistics.median(raw), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
        }
    return report


def serve(ready: Any) -> None:
    """Run the server until the process ends; puts its port into the queue."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    ready.put(server.server_port)
    server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}
    uploads: ClassVar[dict[str, dict[int, bytes]]] = {}
    numbers: ClassVar[Iterator[int]] = itertools.count(1)

    def do_PUT(self) -> None:
        query, body = self._query(), self._body()
        if "partNumber" in query:
            self.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
        else:
            self.objects[self._key()] = body
        self._answer(200, {"ETag": '"0"'})

    def do_POST(self) -> None:
        query = self._query()
        self._body()
        if "uploads" in query:
            upload = str(next(self.numbers))
            self.uploads[upload] = {}
            tag = "InitiateMultipartUploadResult"
            self._answer(200, {}, f"<{tag}><UploadId>{upload}</UploadId></{tag}>")
            return
        parts = self.uploads.pop(query["uploadId"][0])
        self.objects[self._key()] = b"".join(parts[number] for number in sorted(parts))
        self._answer(200, {}, '<CompleteMultipartUploadResult><ETag>"0"</ETag></CompleteMultipartUploadResult>')

    def do_HEAD(self) -> None:
        self._answer(200, {"ETag": '"0"'}, length=len(self.objects[self._key()]))

    def do_GET(self) -> None:
        if "uploads" in self._query():
            self._answer(200, {}, "<ListMultipartUploadsResult></ListMultipartUploadsResult>")
            return
        data = memoryview(self.objects[self._key()])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._answer(200, {"ETag": '"0"'}, data)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        self._answer(206, {"ETag": '"0"', "Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1])

    def _query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    def _key(self) -> str:
        return urlsplit(self.path).path

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
        self, status: int, headers: dict[str, str], body: "str | memoryview" = "", *, length: int | None = None
    ) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    main()
