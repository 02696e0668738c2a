"""Sign a package folder, and verify one, in the OpenSSF Model Signing format: any verifier of it can check a release.

The signature covers every file of the folder, the manifest included, and lies beside them as ``model.sig``:

```
model_signing verify key FOLDER --signature FOLDER/model.sig --public_key KEY.pub
```

Source: https://github.com/ossf/model-signing-spec.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftline.digest import Digest
from graftline.errors import ReleaseError
from graftline.release.key_files import load_private_key
from graftline.release.paths import SIGNATURE_NAME


def sign_folder(folder: Path, private_key: Path) -> Path:
    """Sign every file of a package folder; returns the path of ``model.sig``.

    Raises:
        ReleaseError: the key cannot be used.
    """
    # Imported here: it costs 0.9 s, which whoever only reads a channel need not pay.
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
    """Check that a signature was made by this key over exactly the files of these digests, which were read elsewhere.

    Args:
        digests: digest of every file by its path in the release, the manifest included.
        signature: a ``model.sig``.
        public_key: PEM file.

    Raises:
        ReleaseError: another key, or a file that was changed, added or removed since.
    """
    from model_signing import hashing, manifest, verifying  # see sign_folder
    from model_signing._hashing.hashing import Digest as Hashed

    class Known(hashing.Config):
        """Says what was hashed already, where the library would read a folder."""

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
    # The library prints a warning for signatures of its first versions; a library prints nothing.
    with contextlib.redirect_stdout(None):
        try:
            yield
        except Exception as error:  # whatever a damaged bundle makes the parser raise, it does not verify
            problem = str(error) or type(error).__name__
            raise ReleaseError(
                f"{signature} does not verify with {public_key.name}: {problem}; do not use this release"
            ) from error
