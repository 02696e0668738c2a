"""Which model a folder holds: its weights, what its configuration computes with them, and how its tokenizer cuts text.

    weights = sha256(canonical JSON of sorted [name, dtype, shape, sha256 of the bytes])
    digest  = sha256(canonical JSON of {weights, configuration, tokens})

The weights' digest does not depend on how they are cut into shards; it is recorded in ``graftline-base.json`` when a
folder is written, and computed for a folder from elsewhere. Configuration and tokenizer are read anew each time: an
edited ``config.json`` (another rotary scaling, another epsilon) is another base with another serving graph. Adapters
carry the digest of the base that they were trained on, and are refused on another (METHODS §7.11). Older adapters and
releases, of when the weights alone were the base, carry the weights' digest and are accepted by it.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftline.digest import Digest, of_json, write_json
from graftline.errors import BaseMismatchError, CheckpointError, GraftlineError
from graftline.logs import OnProgress, silent
from graftline.weights.model_folder import computed_by, load_tokenizer
from graftline.weights.reader import CheckpointReader, TensorInfo, read_json_object

IDENTITY_FILE = "graftline-base.json"
_FORMAT = 1
_KEYS = {"format", "digest", "source_digest", "quantizer", "pair"}
_CHUNK_BYTES = 1 << 22
_TOKENIZER_PROBE = (
    "The cat's 1,234.5 naïve  cafés\n\tif x == 10: # Ελληνικά, 北京, 東京, Ärger, 👍🏽\r\n  I'LL <b>don't</b> ﬁnd"
)
"""Case, digits, blanks, accents, composed and wide characters, scripts, an emoji of several code points."""


@dataclass(frozen=True)
class BaseIdentity:
    """Who a base is.

    digest: of weights, configuration and tokenizer. weights: of the weights alone; None where there is nothing else.
    source_digest: of the unquantized base that it was made from, if any. quantizer: the settings that made it, if any.
    pair: digest of the one adapter that it may be used with, if its weights were made together with an adapter's
    (LoftQ, QPiSSA).
    """

    digest: Digest
    source_digest: Digest | None = None
    quantizer: dict[str, Any] | None = None
    pair: Digest | None = None
    weights: Digest | None = None

    def is_called(self, recorded: Digest | None) -> bool:
        """Whether a record means this base: by its digest, or, an older one, by that of its weights."""
        return recorded is not None and recorded in (self.digest, self.weights)


@dataclass(frozen=True)
class TensorDigest:
    """One line of the list that is hashed. ``dtype`` as safetensors spells it; ``sha256`` is hexadecimal."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def combine(tensors: list[TensorDigest]) -> Digest:
    """Digest of a base from the digests of its tensors, in any order."""
    return of_json(sorted([t.name, t.dtype, list(t.shape), t.sha256] for t in tensors))


def base_digest(folder: Path, *, on_progress: OnProgress = silent) -> Digest:
    """Digest of the weights in a folder, computed from their bytes (read in pieces of 4 MiB).

    Raises:
        CheckpointError: as `CheckpointReader`.
    """
    reader = CheckpointReader(folder)
    names = reader.names()
    tensors = []
    for done, name in enumerate(names, start=1):
        tensors.append(tensor_digest(reader.info(name)))
        on_progress(done, len(names))
    return combine(tensors)


def read_identity(folder: Path) -> BaseIdentity:
    """The identity recorded in a folder, or computed where none is recorded.

    The record is trusted here, the bytes are not read again: `verify_identity` compares them.

    Raises:
        CheckpointError: the record or the folder is damaged.
    """
    file = folder / IDENTITY_FILE
    if not file.exists():
        return _whole(folder, BaseIdentity(base_digest(folder)))
    record = read_json_object(file)
    if record.keys() != _KEYS or record["format"] != _FORMAT:
        raise CheckpointError(
            f"{file} has format {record.get('format')!r} and the keys {', '.join(sorted(record))}; "
            f"format {_FORMAT} with {', '.join(sorted(_KEYS))} was expected; make the folder again"
        )
    if record["quantizer"] is not None and not isinstance(record["quantizer"], dict):
        raise CheckpointError(
            f"{file} has the quantizer {record['quantizer']!r}; an object or null was expected; make the folder again"
        )
    digests = {key: _parse(file, key, record[key]) for key in ("digest", "source_digest", "pair")}
    if digests["digest"] is None:
        raise CheckpointError(f"{file} has no digest; make the folder again")
    return _whole(
        folder, BaseIdentity(digests["digest"], digests["source_digest"], record["quantizer"], digests["pair"])
    )


def _whole(folder: Path, of_weights: BaseIdentity) -> BaseIdentity:
    """The identity with what is beside the weights in its digest; without a config.json there is nothing there."""
    configuration = computed_by(folder)
    if configuration is None:
        return of_weights
    weights = of_weights.digest
    parts = {"weights": str(weights), "configuration": configuration, "tokens": _tokens(folder)}
    return replace(of_weights, digest=of_json(parts), weights=weights)


def _tokens(folder: Path) -> str | None:
    """How the tokenizer cuts text: its vocabulary, and the ids of a text that shows every step; None without one.

    Not its files: another version writes the same tokenizer otherwise. Chat templates have a digest to themselves.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    tokenizer = load_tokenizer(folder)
    return str(of_json([sorted(tokenizer.get_vocab().items()), tokenizer(_TOKENIZER_PROBE).input_ids]))


def write_identity(folder: Path, identity: BaseIdentity) -> None:
    """Record an identity in a folder: of its digests that of the weights, which nothing else there changes."""
    record = {
        "format": _FORMAT,
        "digest": str(identity.weights or identity.digest),
        "source_digest": _text(identity.source_digest),
        "quantizer": identity.quantizer,
        "pair": _text(identity.pair),
    }
    write_json(folder / IDENTITY_FILE, record)


def verify_identity(folder: Path, *, on_progress: OnProgress = silent) -> BaseIdentity:
    """The identity of a folder after its bytes were read and compared with the record.

    Raises:
        BaseMismatchError: the weights are not those that were recorded; both digests are named.
    """
    recorded = read_identity(folder)
    found, expected = base_digest(folder, on_progress=on_progress), recorded.weights or recorded.digest
    if found != expected:
        raise BaseMismatchError(
            f"the weights in {folder} have digest {found}, {IDENTITY_FILE} records {expected}: "
            "they were changed after they were written; make the folder again"
        )
    return recorded


def check_pair(base: BaseIdentity, adapter: Digest | None) -> None:
    """Refuse a base without the adapter that it was made with, or with another one.

    A LoftQ or QPiSSA base is worse alone than plain quantization (METHODS §1.8): its quantization error lies in its
    adapter. ``adapter`` is the digest of the initial factors that the adapter was started from; None means no adapter.

    Raises:
        BaseMismatchError: the base belongs to another adapter; both digests are named.
    """
    if base.pair is None or base.pair == adapter:
        return
    given = "no adapter" if adapter is None else f"an adapter started from {adapter}"
    raise BaseMismatchError(
        f"the quantized base {base.digest} was made together with the adapter factors {base.pair} and was "
        f"given {given}; use it only with the adapter that was trained from those factors, or quantize the base "
        "without LoftQ or QPiSSA"
    )


def tensor_digest(info: TensorInfo) -> TensorDigest:
    """The line of one stored tensor, its bytes read and hashed."""
    return TensorDigest(info.name, info.dtype_name, info.shape, _hash_bytes(info))


def _hash_bytes(info: TensorInfo) -> str:
    state, left = hashlib.sha256(), info.num_bytes
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        while left:
            chunk = stream.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise CheckpointError(f"{info.file} ended inside tensor {info.name!r}; fetch it again")
            state.update(chunk)
            left -= len(chunk)
    return state.hexdigest()


def _parse(file: Path, key: str, value: Any) -> Digest | None:
    if value is None:
        return None
    try:
        return Digest.parse(value)
    except (GraftlineError, TypeError) as error:
        raise CheckpointError(
            f"{file} has {key} {value!r}; sha256:<64 hex digits> or null was expected; make the folder again"
        ) from error


def _text(digest: Digest | None) -> str | None:
    return None if digest is None else str(digest)
