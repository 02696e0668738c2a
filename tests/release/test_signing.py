import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from graftline.errors import ReleaseError
from graftline.release.manifest import check_folder, read_manifest
from graftline.release.signing import create_key, load_private_key, sign_folder, verify_folder
from tests.release.packages import make_package


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A signed package; the keys ``key`` and ``key.pub`` lie beside it."""
    make_package(tmp_path / "package")
    create_key(tmp_path / "key")
    sign_folder(tmp_path / "package", tmp_path / "key")
    return tmp_path / "package"


def test_the_standards_own_command_line_verifies_a_release(signed: Path) -> None:
    done = model_signing(signed)
    assert done.returncode == 0, done.stderr
    assert "succeeded" in done.stdout


def test_the_standards_own_command_line_finds_a_changed_byte(signed: Path) -> None:
    (signed / "README.md").write_text("# b\n")
    done = model_signing(signed)
    assert done.returncode != 0
    assert "README.md" in done.stdout + done.stderr


def model_signing(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("model_signing"), "verify", "key", folder]
    options = ["--signature", folder / "model.sig", "--public_key", folder.parent / "key.pub"]
    return subprocess.run([*map(str, command), *map(str, options)], capture_output=True, text=True, check=False)


def test_we_verify_what_the_standards_own_command_line_signs(tmp_path: Path) -> None:
    make_package(tmp_path / "package")
    create_key(tmp_path / "key")
    command = [Path(sys.executable).with_name("model_signing"), "sign", "key", tmp_path / "package"]
    options = ["--signature", tmp_path / "package" / "model.sig", "--private_key", tmp_path / "key"]
    subprocess.run([*map(str, command), *map(str, options)], check=True, capture_output=True)
    verify_folder(tmp_path / "package", tmp_path / "key.pub")


def test_a_signed_folder_verifies_and_its_manifest_still_fits(signed: Path) -> None:
    verify_folder(signed, signed.parent / "key.pub")
    check_folder(signed, read_manifest(signed))


def test_a_signed_folder_verifies_after_it_was_moved(signed: Path) -> None:
    verify_folder(signed.rename(signed.parent / "moved here"), signed.parent / "key.pub")


def test_signing_again_replaces_the_signature(signed: Path) -> None:
    sign_folder(signed, signed.parent / "key")
    verify_folder(signed, signed.parent / "key.pub")
    assert sorted(path.name for path in signed.iterdir() if "sig" in path.name) == ["model.sig"]


def change(folder: Path) -> None:
    (folder / "README.md").write_text("# b\n")


def add(folder: Path) -> None:
    (folder / "extra").touch()


def add_hidden(folder: Path) -> None:
    (folder / ".gitignore").touch()


def remove(folder: Path) -> None:
    (folder / "empty.txt").unlink()


def rename(folder: Path) -> None:
    (folder / "empty.txt").rename(folder / "void.txt")


def change_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"demo"', '"dema"'))


def swap(folder: Path) -> None:
    (folder / "empty.txt").rename(folder / "t")
    (folder / "README.md").rename(folder / "empty.txt")
    (folder / "t").rename(folder / "README.md")


@pytest.mark.parametrize("damage", [change, add, add_hidden, remove, rename, change_manifest, swap])
def test_a_folder_that_changed_after_it_was_signed_does_not_verify(signed: Path, damage: object) -> None:
    damage(signed)  # type: ignore[operator]
    with pytest.raises(ReleaseError, match=r"does not verify with key\.pub"):
        verify_folder(signed, signed.parent / "key.pub")


@pytest.mark.parametrize("data", ["", "{}", "null", "[]", "not json", '{"dsseEnvelope": {}}', "\0" * 100])
def test_a_signature_that_is_none_does_not_verify(signed: Path, data: str) -> None:
    (signed / "model.sig").write_text(data)
    with pytest.raises(ReleaseError, match=r"does not verify with key\.pub"):
        verify_folder(signed, signed.parent / "key.pub")


def test_a_missing_signature_is_said(tmp_path: Path) -> None:
    make_package(tmp_path / "package")
    with pytest.raises(ReleaseError, match=r"has no model\.sig"):
        verify_folder(tmp_path / "package", tmp_path / "key.pub")


def test_another_key_does_not_verify(signed: Path) -> None:
    create_key(signed.parent / "other")
    with pytest.raises(ReleaseError, match=r"does not verify with other\.pub"):
        verify_folder(signed, signed.parent / "other.pub")


def test_the_signature_of_another_release_does_not_verify(signed: Path, tmp_path: Path) -> None:
    make_package(tmp_path / "second", "b")
    sign_folder(tmp_path / "second", tmp_path / "key")
    (signed / "model.sig").write_bytes((tmp_path / "second" / "model.sig").read_bytes())
    with pytest.raises(ReleaseError, match="does not verify"):
        verify_folder(signed, tmp_path / "key.pub")


def test_a_key_s_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    create_key(tmp_path / "home" / ".graftline" / "key")
    assert stat.S_IMODE((tmp_path / "home" / ".graftline").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["file/key", "file/below/key", "x" * 300])
def test_a_key_that_cannot_be_written_is_explained(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ReleaseError, match=r"cannot write the key .*; name a file in a folder that you may write"):
        create_key(tmp_path / name)


def test_private_keys_are_readable_by_their_owner_only_and_never_replaced(tmp_path: Path) -> None:
    create_key(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with pytest.raises(ReleaseError, match="exists already"):
        create_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before


def test_what_is_no_private_key_is_refused(tmp_path: Path) -> None:
    make_package(tmp_path / "package")
    public = create_key(tmp_path / "key")
    (tmp_path / "text").write_text("secret")
    rsa = tmp_path / "rsa"
    key = generate_private_key(public_exponent=65537, key_size=2048)
    rsa.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for path, message in (
        (tmp_path / "absent", "cannot read the key"),
        (tmp_path / "text", "is not an unencrypted PEM private key"),
        (public, "is not an unencrypted PEM private key"),
        (rsa, "of another kind"),
    ):
        with pytest.raises(ReleaseError, match=message):
            sign_folder(tmp_path / "package", path)
        with pytest.raises(ReleaseError, match=message):
            load_private_key(path)
    assert not (tmp_path / "package" / "model.sig").exists()
