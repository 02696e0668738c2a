"""docs/runbooks.md, tried: the steps that a person takes, with the tools that the page names."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from graftline.errors import ReleaseError, StoreError, StoreUnavailableError
from graftline.registry import channel
from graftline.registry.file_store import FileStore
from graftline.registry.keys import KeyRing
from graftline.registry.releases import publish, verify
from graftline.registry.store import Store, open_store
from graftline.release.signing import create_key, sign_folder
from tests.registry.conftest import moto_endpoint, s3_environment  # noqa: F401
from tests.registry.people import NOW, log_of
from tests.registry.servers import make_bucket, moto_server
from tests.release.packages import make_package

VERSIONS = [(f"2026010{day}T000000Z-00000000000{day}", 24.0 * (9 - day)) for day in (1, 2, 3)]


def write_channel(store: Store) -> channel.Log:
    log = log_of(*VERSIONS)
    for entry in log.entries:
        channel.append(store, entry)
    return log


@pytest.fixture
def versioned(moto_endpoint: str, s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Any, str]:  # noqa: F811
    """A store in a bucket that keeps versions, an administrator's client, and the bucket's name."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_endpoint)
    client, bucket = boto3.client("s3"), "versioned"
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    yield open_store(f"s3://{bucket}/graftline"), client, bucket
    for kind in ("Versions", "DeleteMarkers"):
        for old in client.list_object_versions(Bucket=bucket).get(kind, []):
            client.delete_object(Bucket=bucket, Key=old["Key"], VersionId=old["VersionId"])
    client.delete_bucket(Bucket=bucket)


def test_a_deleted_channel_entry_comes_back_with_its_delete_marker_s_removal(
    versioned: tuple[Store, Any, str],
) -> None:
    store, client, bucket = versioned
    written = write_channel(store)
    key = "graftline/channels/demo/production/0000000002.json"
    client.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(StoreError, match="is missing, and later ones are there"):
        channel.read(store, "demo", "production")

    found = client.list_object_versions(Bucket=bucket, Prefix="graftline/channels/demo/production/")
    (marker,) = found["DeleteMarkers"]
    client.delete_object(Bucket=bucket, Key=marker["Key"], VersionId=marker["VersionId"])

    assert channel.read(store, "demo", "production") == written


def test_a_changed_channel_entry_comes_back_with_the_wrong_version_s_removal(versioned: tuple[Store, Any, str]) -> None:
    store, client, bucket = versioned
    written = write_channel(store)
    key = "graftline/channels/demo/production/0000000002.json"
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.put_object(Bucket=bucket, Key=key, Body=body.replace(b'"nightly"', b'"forged!"'))
    with pytest.raises(StoreError, match="history was changed"):
        channel.read(store, "demo", "production")

    newest = [one for one in client.list_object_versions(Bucket=bucket, Prefix=key)["Versions"] if one["IsLatest"]]
    client.delete_object(Bucket=bucket, Key=key, VersionId=newest[0]["VersionId"])

    assert channel.read(store, "demo", "production") == written


def test_a_folder_s_channel_comes_back_from_a_copy(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    written = write_channel(store)
    shutil.copytree(tmp_path / "store" / "channels", tmp_path / "backup")
    shutil.rmtree(tmp_path / "store" / "channels")

    shutil.copytree(tmp_path / "backup", tmp_path / "store" / "channels")

    assert channel.read(store, "demo", "production") == written


def ring(*keys: tuple[str, Path, str]) -> KeyRing:
    lines = ["keys:"]
    for name, public, expires in keys:
        lines += [f"- name: {name}", "  roles: [builder]", "  public_key: |"]
        lines += [f"    {line}" for line in public.read_text().splitlines()]
        lines += [f"  expires: {expires}"] if expires else []
    return KeyRing.parse("\n".join(lines) + "\n", origin="keys.yaml")


def test_a_builder_s_key_is_rotated_without_a_gap(tmp_path: Path) -> None:
    old, new = create_key(tmp_path / "old"), create_key(tmp_path / "new")
    before, after = tmp_path / "before", tmp_path / "after"
    make_package(before, "a")
    sign_folder(before, tmp_path / "old")
    make_package(after, "b")

    both = ring(("old", old, ""), ("new", new, ""))
    sign_folder(after, tmp_path / "new")
    assert [both.verify_release(folder, now=NOW) for folder in (before, after)] == ["old", "new"]

    ended = ring(("old", old, (NOW - timedelta(days=1)).isoformat()), ("new", new, ""))
    assert ended.verify_release(after, now=NOW) == "new"
    with pytest.raises(ReleaseError, match="signature is of none whose key"):
        ended.verify_release(before, now=NOW)


def test_a_release_is_finished_when_the_store_is_back(
    s3_environment: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    make_package(tmp_path / "package", "a")
    with moto_server() as endpoint:
        make_bucket(endpoint)
        monkeypatch.setattr("graftline.retry.random.uniform", lambda *_: 0.0)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        with pytest.raises(StoreUnavailableError):
            publish(open_store("s3://models/x"), tmp_path / "package")

        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = open_store("s3://models/x")
        manifest = publish(store, tmp_path / "package")
        assert verify(store, manifest.pipeline, manifest.version) == manifest
