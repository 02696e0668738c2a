"""Sign and verify package folders in the OpenSSF Model Signing format, so that any of its tools can check a release.

The signature, ``model.sig``, covers every other file of the folder, the manifest included:

```
model_signing verify key FOLDER --signature FOLDER/model.sig --public_key KEY.pub
```

Source: https://github.com/ossf/model-signing-spec.

Statements (approvals, entries, heads) are signed over the pre-authentication encoding of DSSE v1
(https://github.com/secure-systems-lab/dsse/blob/master/protocol.md) with ECDSA over P-256 and SHA-256.
"""

import base64
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from graftline.digest import Digest, write_text
from graftline.errors import ReleaseError
from graftline.release.manifest import SIGNATURE_NAME


def create_key(private_key: Path) -> Path:
    """Make an ECDSA key pair over P-256 in PEM: ``private_key``, for its owner only, and ``<private_key>.pub``.

    Returns:
        Path of the public key.

    Raises:
        ReleaseError: the file exists (keys are never replaced), or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        private_key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(private_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        if os.path.lexists(private_key):
            raise ReleaseError(f"{private_key} exists already; choose another name, keys are never replaced") from error
        raise ReleaseError(
            f"cannot write the key {private_key}: {error.strerror}; name a file in a folder that you may write"
        ) from error
    with os.fdopen(handle, "wb") as stream:
        stream.write(pem)
    public_key = private_key.with_name(f"{private_key.name}.pub")
    write_text(public_key, public_pem(key.public_key()))
    return public_key


def public_pem(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as PEM text."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key; ReleaseError unless it is an unencrypted ECDSA key over P-256."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ReleaseError(
            f"cannot read the key {path}: {error.strerror}; make one with `graftline new-key`"
        ) from error
    except (ValueError, TypeError) as error:
        raise ReleaseError(
            f"{path} is not an unencrypted PEM private key; make one with `graftline new-key`"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != ec.SECP256R1.name:
        kind = f"ECDSA over {key.curve.name}" if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__
        raise ReleaseError(
            f"{path} is a key of another kind ({kind.strip('_')}); expected ECDSA over P-256 (secp256r1), the only "
            "kind that keys.yaml takes; make one with `graftline new-key`"
        )
    return key


def sign_statement(key: ec.EllipticCurvePrivateKey, payload_type: bytes, body: bytes) -> str:
    """Base64 of the DER signature of a statement."""
    return base64.b64encode(key.sign(_encode(payload_type, body), ec.ECDSA(hashes.SHA256()))).decode()


def is_signed(key: ec.EllipticCurvePublicKey, signature: str, payload_type: bytes, body: bytes) -> bool:
    """Whether `sign_statement` made this signature of a statement with the key's private half."""
    try:
        key.verify(base64.b64decode(signature, validate=True), _encode(payload_type, body), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        return False
    return True


def _encode(payload_type: bytes, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: ``DSSEv1 len(type) type len(body) body``."""
    return b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type, len(body), body)


def sign_folder(folder: Path, private_key: Path) -> Path:
    """Sign every file of a package folder; returns the path of ``model.sig``. ReleaseError if the key is unusable."""
    # Imported here because it takes 0.9 s, which readers of channels need not wait for.
    from model_signing import hashing, signing

    load_private_key(private_key)
    signature = folder / SIGNATURE_NAME
    part = folder / f".{SIGNATURE_NAME}.part"
    ignored = hashing.Config().set_ignored_paths(paths=[signature, part], ignore_git_paths=False)
    try:
        signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(ignored).sign(folder, part)
        part.replace(signature)
    finally:
        part.unlink(missing_ok=True)
    return signature


def verify_folder(folder: Path, public_key: Path) -> None:
    """Check that ``model.sig`` was made by this key over exactly these files.

    Raises:
        ReleaseError: no signature, another key, or a file that was changed, added or removed.
    """
    from model_signing import hashing, verifying  # see sign_folder

    signature = folder / SIGNATURE_NAME
    if not signature.is_file():
        raise ReleaseError(f"{folder} has no {SIGNATURE_NAME}; sign it with `graftline package` and a key")
    hashed = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)
    with _refused_as_release_error(signature, public_key):
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        verifier.set_hashing_config(hashed).verify(folder, signature)


def verify_digests(digests: Mapping[str, Digest], signature: Path, public_key: Path) -> None:
    """As `verify_folder`, for files that were hashed elsewhere, the manifest included; ``digests`` by path."""
    from model_signing import hashing, manifest, verifying  # see sign_folder
    from model_signing._hashing.hashing import Digest as Hashed

    class Known(hashing.Config):
        """Gives the known digests where the library would hash a folder."""

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            form = manifest.SerializationType.from_args(
                {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
            )
            items = [
                form.new_item(path, Hashed("sha256", bytes.fromhex(digest.hex))) for path, digest in digests.items()
            ]
            return manifest.Manifest(str(model_path), items, form)

    with _refused_as_release_error(signature, public_key):
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        verifier.set_hashing_config(Known()).verify(signature.parent, signature)


@contextlib.contextmanager
def _refused_as_release_error(signature: Path, public_key: Path) -> Iterator[None]:
    # The library prints a warning about signatures of its first versions.
    with contextlib.redirect_stdout(None):
        try:
            yield
        except Exception as error:  # a damaged bundle can make the parser raise anything
            problem = str(error) or type(error).__name__
            raise ReleaseError(
                f"{signature} does not verify with {public_key.name}: {problem}; do not use this release"
            ) from error
