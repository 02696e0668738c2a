"""Keys in files: ECDSA over P-256 in PEM, what OpenSSF Model Signing and our approvals sign with."""

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from graftline.digest import write_text
from graftline.errors import ReleaseError


def create_key(private_key: Path) -> Path:
    """Make a key pair: ``private_key`` (readable by its owner only) and ``<private_key>.pub`` beside it.

    Returns:
        Path of the public key.

    Raises:
        ReleaseError: the file exists; a key is never replaced.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        handle = os.open(private_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ReleaseError(f"{private_key} exists already; choose another name, keys are never replaced") from error
    with os.fdopen(handle, "wb") as stream:
        stream.write(pem)
    public_key = private_key.with_name(f"{private_key.name}.pub")
    write_text(public_key, public_pem(key.public_key()))
    return public_key


def public_pem(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as PEM text."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        ReleaseError: no such file, or not an unencrypted ECDSA key over P-256, which is all that keys.yaml takes.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ReleaseError(
            f"cannot read the key {path}: {error.strerror}; make one with `graftline new-key`"
        ) from error
    except (ValueError, TypeError) as error:
        raise ReleaseError(f"{path} is no unencrypted PEM private key; make one with `graftline new-key`") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != ec.SECP256R1.name:
        kind = f"ECDSA over {key.curve.name}" if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__
        raise ReleaseError(
            f"{path} is a key of another kind ({kind.strip('_')}); expected ECDSA over P-256 (secp256r1), the only "
            "kind that keys.yaml takes; make one with `graftline new-key`"
        )
    return key
