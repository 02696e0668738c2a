"""What an S3 store says when its server, its settings or its keys are not as they should be."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from graftline.digest import of_bytes
from graftline.errors import StoreError, StoreUnavailableError
from graftline.registry import channel, overview, releases
from graftline.registry.approval import collect
from graftline.registry.cleanup import RetentionRules, clean_up, plan_cleanup
from graftline.registry.s3_store import S3Store
from graftline.registry.store import Store, open_store
from graftline.retry import Retry
from tests.registry.people import NOW, People, target_of
from tests.registry.servers import BUCKET

QUICK = Retry(attempts=3, base_seconds=0.01)


@pytest.fixture(params=["moto", "ministack"])
def s3_store(request: pytest.FixtureRequest) -> S3Store:
    store: S3Store = request.getfixturevalue(f"{request.param}_store")
    return store


MARKERS = [
    "channels/demo/production/",
    "channels/demo/",
    "channels/",
    "leases/demo/",
    "approvals/demo/production/{}/",
    "releases/demo/{}/",
    "releases/demo/{}/.hidden",
    "channels/demo/production/.DS_Store",
    "releases/notes for me.txt",
    "channels/notes for me.txt",
    "channels/demo/notes for me.txt",
]


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_of_folders_and_other_peoples_objects_stop_nothing(
    moto_store: S3Store, tmp_path: Path, marker: str
) -> None:
    people = People(tmp_path)
    made = people.release(moto_store, tmp_path / "package")
    key = moto_store._prefix + marker.format(made.version)
    moto_store._client.put_object(Bucket=BUCKET, Key=key, Body=b"")
    assert channel.read(moto_store, "demo", "production").entries == ()
    assert channel.names(moto_store, "demo") == []
    assert collect(moto_store, target_of(made)) == ()
    assert releases.verify(moto_store, "demo", made.version) == made
    view = overview.overview(moto_store, keys=None, now=NOW)
    assert [pipeline.name for pipeline in view.pipelines] == ["demo"]
    plan = plan_cleanup(moto_store, "demo", rules=RetentionRules(), now=NOW)
    clean_up(moto_store, plan, rules=RetentionRules(), now=NOW)
    assert moto_store._client.head_object(Bucket=BUCKET, Key=key)["ContentLength"] == 0


def test_a_missing_bucket_is_never_taken_for_a_missing_object(s3_store: S3Store, tmp_path: Path) -> None:
    store = S3Store("nobody-has-this", retry=QUICK)
    looks = [store.get, store.head, store.list, store.unfinished, store.read_digest]
    for look in looks:
        with pytest.raises(StoreError, match="create the bucket or correct the store's address"):
            look("releases/demo")
    with pytest.raises(StoreError):
        store.get_file("a", tmp_path / "a")


class _NotS3(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "22")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"<html>Not Found</html>")

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer  # noqa: N815 - the base class's names

    def log_message(self, *_: Any) -> None:
        pass


def test_a_web_server_that_is_no_s3_is_never_taken_for_an_empty_store(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NotS3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    store = S3Store(BUCKET, retry=QUICK)
    try:
        for look in (store.get, store.head, store.list, store.delete):
            with pytest.raises(StoreError, match="not that of an S3 server"):
                look("releases/demo")
    finally:
        server.shutdown()
        server.server_close()


def _refusing(code: str, status: int, operation: str) -> Any:
    def refuse(**_: Any) -> None:
        answer: Any = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(answer, operation)

    return refuse


def test_not_being_allowed_to_list_is_an_error_and_gc_removes_nothing(
    moto_store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = People(tmp_path).release(moto_store, tmp_path / "package")
    real = moto_store._client.get_paginator

    class Denied:
        def __init__(self, operation: str) -> None:
            self._real = real(operation)

        def paginate(self, **request: Any) -> Any:
            if "/leases/" in request["Prefix"]:
                _refusing("AccessDenied", 403, "ListObjectsV2")()
            return self._real.paginate(**request)

    plan = plan_cleanup(moto_store, "demo", rules=RetentionRules(min_age=NOW - NOW), now=NOW.replace(year=2036))
    assert plan.remove == (made.version,)
    monkeypatch.setattr(moto_store._client, "get_paginator", Denied)
    with pytest.raises(StoreError, match="lack a permission"):
        plan_cleanup(moto_store, "demo", rules=RetentionRules(), now=NOW)
    with pytest.raises(StoreError, match="lack a permission"):
        clean_up(moto_store, plan, rules=RetentionRules(), now=NOW)
    assert releases.list_versions(moto_store, "demo") == [made.version]


@pytest.mark.parametrize("refusals", [1, 2])
def test_an_answer_that_a_new_entry_is_not_there_is_asked_again(
    moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    store = S3Store(BUCKET, moto_store._prefix.rstrip("/"), retry=Retry(attempts=8, base_seconds=0.01))
    real, left = store._client.get_object, [refusals]

    def late(**request: Any) -> Any:
        if "channels" in request["Key"] and left[0]:
            left[0] -= 1
            _refusing("NoSuchKey", 404, "GetObject")()
        return real(**request)

    monkeypatch.setattr(store._client, "get_object", late)
    store.create("channels/demo/production/0000000001.json", b"entry")
    assert left == [0]
    assert store.get("channels/demo/production/0000000001.json") == b"entry"
    left[0] = 99
    with pytest.raises(StoreError, match="was written, and the store says at every try that it is not there"):
        store.create("channels/demo/production/0000000002.json", b"entry")


@pytest.mark.parametrize("act", ["put_bytes", "create", "delete", "list", "unfinished", "put_file"])
def test_no_answer_ends_in_an_internal_exception(
    s3_store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    s3_store.create("log/probe", b"the probe is done")
    (tmp_path / "file").write_bytes(b"1")
    arguments: dict[str, tuple[Any, ...]] = {"put_bytes": (b"1",), "create": (b"1",), "put_file": (tmp_path / "file",)}
    named = {"digest": of_bytes(b"1")} if act == "put_file" else {}
    for code, status in (("NoSuchKey", 404), ("404", 404), ("PreconditionFailed", 412), ("Unheard", 418)):
        refuse = _refusing(code, status, "Any")
        for operation in ("put_object", "delete_object", "get_object"):
            monkeypatch.setattr(s3_store._client, operation, refuse)
        monkeypatch.setattr(s3_store._client, "get_paginator", lambda _, refuse=refuse: refuse())
        with pytest.raises(StoreError):
            getattr(s3_store, act)("a/b", *arguments.get(act, ()), **named)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"AWS_PROFILE": "nobody"}, r"AWS_PROFILE names a profile that ~/\.aws/config does not have"),
        ({"AWS_ENDPOINT_URL_S3": "no address"}, "opening s3://models"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:99999"}, "s3://models"),
        ({"AWS_CA_BUNDLE": "/absent.pem", "AWS_ENDPOINT_URL_S3": "https://127.0.0.1:1"}, "s3://models"),
    ],
)
def test_settings_of_aws_that_cannot_be_used_are_store_errors(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], hint: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=hint):
        S3Store(BUCKET, retry=QUICK).get("a")


@pytest.mark.parametrize("address", ["s3://Not_A_Bucket", "s3://x", "s3://bucket with spaces"])
def test_a_bucket_that_no_server_takes_is_a_store_error(moto_store: Store, address: str) -> None:
    with pytest.raises(StoreError):
        open_store(address).get("a")


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """Takes every connection and never answers."""
    server, taken = socket.create_server(("127.0.0.1", 0)), list[socket.socket]()

    def take() -> None:
        while True:
            try:
                taken.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=take, daemon=True).start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.close()
    for connection in taken:
        connection.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_store_that_never_answers_is_given_up(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch, silent_endpoint: str, scheme: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"{scheme}://{silent_endpoint}")
    waited: list[str] = []
    store = S3Store(BUCKET, retry=Retry(deadline_seconds=0.5), timeout_seconds=0.4)
    store._client.meta.events.register("before-send.s3.GetObject", lambda **_: waited.append("try"))
    with pytest.raises(StoreUnavailableError, match="no good answer"):
        store.get("a")
    assert len(waited) <= 3, "eight tries of a timeout each would be minutes"


def test_by_default_a_hanging_store_is_given_up_within_the_time_that_the_docs_say(s3_environment: None) -> None:
    store = S3Store(BUCKET)
    timeout = max(store._client.meta.config.read_timeout, store._client.meta.config.connect_timeout)
    # Its first failure, tries until the deadline, and one that began just before it.
    assert timeout + Retry().deadline_seconds + timeout <= 45
    page = (Path(__file__).parents[2] / "docs" / "releases.md").read_text(encoding="utf-8")
    assert "given up within 45 s" in page


def test_tries_end_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    tries: list[float] = []

    def hang() -> None:
        tries.append(clock[0])
        clock[0] += 15
        raise TimeoutError("no answer")

    with pytest.raises(TimeoutError):
        Retry().call(hang, transient=lambda _: True)
    assert clock[0] <= 45
    assert 2 <= len(tries) <= 3


def test_an_upload_in_parts_of_somebody_who_was_killed_is_seen_and_can_be_removed(s3_store: S3Store) -> None:
    where = {"Bucket": BUCKET, "Key": f"{s3_store._prefix}releases/demo/v/weights.bin"}
    upload = s3_store._client.create_multipart_upload(**where)["UploadId"]
    s3_store._client.upload_part(**where, UploadId=upload, PartNumber=1, Body=os.urandom(5 << 20))
    (found,) = s3_store.unfinished("releases/demo")
    assert (found.key, found.num_bytes, found.handle) == ("releases/demo/v/weights.bin", 5 << 20, upload)
    assert s3_store.unfinished("releases/dem") == ()
    s3_store.discard(found)
    s3_store.discard(found)
    assert s3_store.unfinished("releases") == ()


class _Elsewhere(_NotS3):
    """What a gateway answers to those who have not logged in."""

    def _answer(self) -> None:
        self.send_response(302)
        self.send_header("Location", "http://127.0.0.1:1/login")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer  # noqa: N815 - the base class's names


def test_redirections_that_lead_nowhere_are_store_errors(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    store = S3Store(BUCKET, retry=QUICK)
    try:
        for look in (store.get, store.head, store.list, store.unfinished, lambda key: store.create(key, b"x")):
            with pytest.raises(StoreError, match="AWS_"):
                look("releases/demo")
    finally:
        server.shutdown()
        server.server_close()


class _Login(BaseHTTPRequestHandler):
    """A proxy's page, in XML, with status 200 to every request."""

    def _answer(self) -> None:
        page = b"<html><body><p>Please log in</p></body></html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer  # noqa: N815 - the base class's names

    def log_message(self, *_: Any) -> None:
        pass


def test_a_login_page_is_never_taken_for_an_empty_listing(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Login)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    store = S3Store(BUCKET, retry=QUICK)
    try:
        with pytest.raises(StoreUnavailableError, match="not the listing of an S3 server"):
            store.list("releases/demo")
        with pytest.raises(StoreError):
            plan_cleanup(store, "demo", rules=RetentionRules(), now=NOW)
    finally:
        server.shutdown()
        server.server_close()


def test_a_listing_that_ends_before_its_end_is_an_error(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that know only the first version of listings answer a thousand keys, and no token for the rest."""
    for number in range(3):
        moto_store.put_bytes(f"releases/demo/v{number}", b"x")
    real = moto_store._client._make_api_call

    def without_token(operation: str, request: Any) -> Any:
        if operation != "ListObjectsV2":
            return real(operation, request)
        answer = real(operation, {**request, "MaxKeys": 2})
        answer.pop("NextContinuationToken", None)
        return answer

    monkeypatch.setattr(moto_store._client, "_make_api_call", without_token)
    moto_store._retry = QUICK
    with pytest.raises(StoreUnavailableError, match="says that there is more"):
        moto_store.list("releases/demo")


def test_a_date_without_a_zone_is_utc(moto_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    dated = {"ResponseMetadata": {"HTTPHeaders": {"date": "Tue, 24 Nov 2026 12:00:00 -0000"}}}
    monkeypatch.setattr(moto_store._client, "head_object", lambda **_: dated)
    assert moto_store.now() == datetime(2026, 11, 24, 12, tzinfo=UTC)
