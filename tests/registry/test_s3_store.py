"""What only S3 stores have: addresses, promises, large objects in parts, servers that are not there."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from graftline.digest import of_bytes
from graftline.errors import ConflictError, StoreError, StoreUnavailableError, UnsafeStoreError
from graftline.registry.objects import checksum_of_parts, part_ranges
from graftline.registry.s3_store import S3Store, StoreCapabilities
from graftline.registry.store import Store, open_store
from graftline.retry import Retry
from tests.registry.proxy import Faults, fault_proxy
from tests.registry.servers import BUCKET

QUICK = Retry(attempts=3, base_seconds=0.01)
LARGE_BYTES = 40 << 20  # five parts


@pytest.fixture(params=["moto", "ministack"])
def s3_store(request: pytest.FixtureRequest) -> Store:
    store: Store = request.getfixturevalue(f"{request.param}_store")
    return store


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    path.write_bytes(os.urandom(1 << 20) * 40)
    return path


@pytest.fixture
def faults(moto_endpoint: str, s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy before moto; the environment points at it."""
    faults = Faults()
    with fault_proxy(moto_endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        yield faults


class Counted:
    """Counts the calls of one operation of a store's client."""

    def __init__(self, store: Store, operation: str) -> None:
        assert isinstance(store, S3Store)
        self.requests: list[dict[str, Any]] = []
        store._client.meta.events.register(f"provide-client-params.s3.{operation}", self._note)

    def _note(self, params: dict[str, Any], **_: Any) -> None:
        self.requests.append(params)


def test_a_large_file_goes_up_in_parts_and_comes_back(s3_store: Store, large_file: Path, tmp_path: Path) -> None:
    digest = of_bytes(large_file.read_bytes())
    parts, ranges = Counted(s3_store, "UploadPart"), Counted(s3_store, "GetObject")
    seen: list[int] = []

    s3_store.put_file("large", large_file, digest=digest, on_progress=lambda done, total: seen.append(done))
    assert s3_store.get_file("large", tmp_path / "copy") == digest

    assert (tmp_path / "copy").read_bytes() == large_file.read_bytes()
    assert [request["PartNumber"] for request in sorted(parts.requests, key=lambda r: r["PartNumber"])] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert all("ChecksumSHA256" in request for request in parts.requests)
    assert len([request for request in ranges.requests if "Range" in request]) == 5
    assert max(seen) == LARGE_BYTES
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == ["copy"]


def test_the_checksum_of_parts_is_the_one_the_server_computes(ministack_store: Store, large_file: Path) -> None:
    ministack_store.put_file("large", large_file, digest=of_bytes(large_file.read_bytes()))
    stored = ministack_store.head("large")
    assert stored is not None
    assert stored.checksum == checksum_of_parts(large_file)
    assert stored.checksum.endswith("-5")


def test_an_interrupted_upload_goes_on_with_the_parts_that_are_missing(s3_store: Store, large_file: Path) -> None:
    digest = of_bytes(large_file.read_bytes())
    assert isinstance(s3_store, S3Store)

    def stop_at_part_two(params: dict[str, Any], **_: Any) -> None:
        if params["PartNumber"] == 2:
            raise KeyboardInterrupt

    events = s3_store._client.meta.events
    events.register("provide-client-params.s3.UploadPart", stop_at_part_two)
    with pytest.raises(KeyboardInterrupt):
        s3_store.put_file("large", large_file, digest=digest)
    events.unregister("provide-client-params.s3.UploadPart", stop_at_part_two)
    assert s3_store.head("large") is None

    parts = Counted(s3_store, "UploadPart")
    s3_store.put_file("large", large_file, digest=digest)
    assert 2 in [request["PartNumber"] for request in parts.requests]
    assert len(parts.requests) < 5
    assert s3_store.read_digest("large") == digest


def test_parts_of_another_file_are_not_taken_for_ours(s3_store: Store, large_file: Path, tmp_path: Path) -> None:
    assert isinstance(s3_store, S3Store)
    where = s3_store._at("large")
    upload = s3_store._client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256")["UploadId"]
    s3_store._client.upload_part(**where, UploadId=upload, PartNumber=1, Body=bytes(8 << 20))
    digest = of_bytes(large_file.read_bytes())
    s3_store.put_file("large", large_file, digest=digest)
    assert s3_store.read_digest("large") == digest


def test_a_large_file_that_changed_does_not_appear(s3_store: Store, large_file: Path) -> None:
    with pytest.raises(StoreError, match="changed since its manifest"):
        s3_store.put_file("large", large_file, digest=of_bytes(b"other"))
    assert s3_store.head("large") is None


def test_an_interrupted_download_goes_on_with_the_ranges_that_are_missing(
    s3_store: Store, large_file: Path, tmp_path: Path
) -> None:
    digest = of_bytes(large_file.read_bytes())
    s3_store.put_file("large", large_file, digest=digest)

    def stop_at_the_end(done: int, total: int) -> None:
        if done >= total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s3_store.get_file("large", tmp_path / "copy", on_progress=stop_at_the_end)
    assert not (tmp_path / "copy").exists()

    ranges = Counted(s3_store, "GetObject")
    assert s3_store.get_file("large", tmp_path / "copy") == digest
    assert ranges.requests == []
    assert (tmp_path / "copy").read_bytes() == large_file.read_bytes()


def test_a_download_does_not_go_on_with_another_version(s3_store: Store, large_file: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(bytes(LARGE_BYTES))
    s3_store.put_file("large", old, digest=of_bytes(old.read_bytes()))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s3_store.get_file("large", tmp_path / "copy", on_progress=stop)
    digest = of_bytes(large_file.read_bytes())
    s3_store.put_file("large", large_file, digest=digest)
    assert s3_store.get_file("large", tmp_path / "copy") == digest


@pytest.mark.parametrize("journal", ["", "{}", "[]", '{"etag": 1}', "\0"])
def test_a_damaged_journal_starts_the_download_again(
    moto_store: Store, large_file: Path, tmp_path: Path, journal: str
) -> None:
    digest = of_bytes(large_file.read_bytes())
    moto_store.put_file("large", large_file, digest=digest)
    (tmp_path / "copy.part").write_bytes(b"rubbish")
    (tmp_path / "copy.part.json").write_text(journal)
    assert moto_store.get_file("large", tmp_path / "copy") == digest


def test_no_object_has_more_parts_than_s3_takes() -> None:
    for num_bytes in (1, 8 << 20, (8 << 20) + 1, 5 << 40):
        ranges = part_ranges(num_bytes)
        assert len(ranges) <= 10_000
        assert ranges[0][0] == 0
        assert sum(size for _, size in ranges) == num_bytes
        assert all(start + size == following for (start, size), (following, _) in itertools.pairwise(ranges))


def test_what_the_servers_promise_is_found_by_trying(moto_store: Store, ministack_store: Store, faults: Faults) -> None:
    assert isinstance(moto_store, S3Store)
    assert isinstance(ministack_store, S3Store)
    assert moto_store._promises == StoreCapabilities(preconditions=True, checksums=False)
    assert ministack_store._promises == StoreCapabilities(preconditions=True, checksums=True)
    faults.ignore_preconditions = True
    assert S3Store(BUCKET, "ignoring")._promises == StoreCapabilities(preconditions=False, checksums=False)


def test_a_store_that_ignores_preconditions_is_refused(faults: Faults, tmp_path: Path) -> None:
    faults.ignore_preconditions = True
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}")
    with pytest.raises(UnsafeStoreError, match="ignores 'If-None-Match: \\*': two promoters could both win"):
        store.create("log/1", b"mine")
    assert store.list("log") == []
    assert store.list("probe") == []
    store.put_bytes("a/b", b"releases can be published there all the same")


def test_the_probe_is_made_once(moto_store: Store) -> None:
    deleted = Counted(moto_store, "DeleteObject")
    moto_store.create("log/1", b"1")
    moto_store.create("log/2", b"2")
    assert len(deleted.requests) == 1


def test_a_server_that_is_not_there_is_named_with_what_to_check(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    store = S3Store(BUCKET, retry=QUICK)
    started = time.monotonic()
    with pytest.raises(
        StoreUnavailableError, match=r"reading a from s3://models at http://127\.0\.0\.1:1: .*AWS_ENDPOINT_URL"
    ):
        store.get("a")
    assert time.monotonic() - started < 5


def test_a_missing_bucket_is_named(moto_store: Store) -> None:
    with pytest.raises(StoreError, match=r"s3://nobody-has-this.*create the bucket"):
        S3Store("nobody-has-this", retry=QUICK).put_bytes("a", b"")


def test_missing_credentials_are_said(moto_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    boto3.DEFAULT_SESSION = None
    with pytest.raises(StoreError, match="Unable to locate credentials; set AWS_ACCESS_KEY_ID"):
        S3Store(BUCKET, retry=QUICK).get("a")


@pytest.mark.parametrize("kind", ["500", "503", "refused", "closed mid-body", "truncated", "flipped answer bit"])
def test_one_bad_answer_is_survived(faults: Faults, kind: str, tmp_path: Path) -> None:
    store = S3Store(BUCKET, tmp_path.name, retry=Retry(attempts=8, base_seconds=0.01))
    store.put_bytes("a", b"hello " * 1000)
    faults.rate, faults.kinds = 0.5, (kind,)
    for _ in range(5):
        assert store.get("a") == b"hello " * 1000
    assert faults.counts.total() >= 1


def test_a_write_whose_answer_was_lost_is_not_taken_for_somebody_elses(faults: Faults, tmp_path: Path) -> None:
    store = S3Store(BUCKET, tmp_path.name, retry=Retry(attempts=8, base_seconds=0.01))
    store.create("log/0", b"the probe is done")
    faults.rate, faults.kinds = 0.5, ("lost answer",)
    for number in range(1, 20):
        store.create(f"log/{number}", f"entry {number}".encode())
    assert faults.counts["lost answer"] >= 5
    faults.rate = 0
    assert len(store.list("log")) == 20


class OvertakenStore(S3Store):
    """Another writer passes the server's look at the same time, and writes last: as moto's threads do now and then."""

    def _put(self, key: str, data: bytes, **more: Any) -> None:
        super()._put(key, data, **more)
        if more.get("IfNoneMatch"):
            S3Store(BUCKET, self._prefix.rstrip("/")).put_bytes(key, b"theirs")


def test_of_two_writers_that_a_server_lets_through_at_once_the_overtaken_one_is_told(moto_store: Store) -> None:
    assert isinstance(moto_store, S3Store)
    store = OvertakenStore(BUCKET, moto_store._prefix.rstrip("/"))
    with pytest.raises(ConflictError, match="somebody else wrote it at the same moment"):
        store.create("entry", b"ours")
    assert moto_store.get("entry") == b"theirs"


def test_errors_do_not_end_retrying_too_early_or_never(faults: Faults) -> None:
    faults.rate, faults.kinds = 1.0, ("503",)
    with pytest.raises(StoreUnavailableError, match="SlowDown"):
        S3Store(BUCKET, retry=Retry(attempts=4, base_seconds=0.001)).get("a")
    assert faults.counts["503"] == 4


def test_a_password_in_the_endpoints_address_is_not_shown(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hunter2@127.0.0.1:1")
    with pytest.raises(StoreError) as caught:
        S3Store(BUCKET, retry=QUICK).get("a")
    assert "hunter2" not in str(caught.value)
    assert "//***@127.0.0.1:1" in str(caught.value)
