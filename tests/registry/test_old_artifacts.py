"""Everything that was ever written stays readable and verifies: see tests/old_artifacts/README.md."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from graftline.registry import channel
from graftline.registry.approval import ApprovalTarget, collect, why_not
from graftline.registry.keys import KeyRing
from graftline.registry.releases import fetch, list_versions, verify
from graftline.registry.store import Store, open_store

FORMATS = sorted((Path(__file__).parents[1] / "old_artifacts").glob("format-*"))


@pytest.fixture(params=FORMATS, ids=lambda folder: folder.name)
def old(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.param
    return folder


@pytest.fixture
def old_store(old: Path) -> Store:
    return open_store(str(old / "store"))


def test_there_are_old_artefacts() -> None:
    assert [folder.name for folder in FORMATS] == ["format-1"]


def test_old_releases_verify_to_the_last_byte_and_signature(old: Path, old_store: Store, tmp_path: Path) -> None:
    keys = KeyRing.load(old / "keys.yaml")
    versions = list_versions(old_store, "demo")
    assert len(versions) == 2
    for version in versions:
        manifest = verify(old_store, "demo", version)
        assert fetch(old_store, "demo", version, tmp_path / version) == manifest
        assert keys.verify_release(tmp_path / version, now=manifest.created) == "bob"


def test_the_standards_command_line_verifies_old_releases(old: Path, old_store: Store, tmp_path: Path) -> None:
    version = list_versions(old_store, "demo")[0]
    fetch(old_store, "demo", version, tmp_path / "release")
    (tmp_path / "bob.pub").write_text(KeyRing.load(old / "keys.yaml").keys["bob"].public_key)
    command = [str(Path(sys.executable).with_name("model_signing")), "verify", "key", str(tmp_path / "release")]
    options = ["--signature", str(tmp_path / "release" / "model.sig"), "--public_key", str(tmp_path / "bob.pub")]
    assert "succeeded" in subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout


def test_old_histories_are_whole(old_store: Store) -> None:
    log = channel.read(old_store, "demo", "production")
    assert [entry.change.action for entry in log.entries] == ["promote", "promote", "rollback"]
    assert [len(entry.change.approvals) for entry in log.entries] == [1, 1, 0]
    assert log.head == channel.head(old_store, "demo", "production")


def test_old_approvals_are_still_signed_by_whom_they_say(old: Path, old_store: Store) -> None:
    keys = KeyRing.load(old / "keys.yaml")
    for entry in channel.read(old_store, "demo", "production").entries[:2]:
        target = ApprovalTarget("demo", "production", entry.change.version, entry.change.release)
        assert collect(old_store, target) == entry.change.approvals
        now = datetime(2026, 11, 24, 9, tzinfo=UTC)
        for approval in entry.change.approvals:
            assert why_not(approval, target, keys=keys, valid=timedelta(days=1), used=set(), now=now) is None
