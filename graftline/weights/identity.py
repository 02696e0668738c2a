"""Which model a folder holds: its weights, what its configuration computes with them, and its tokenization.

    weights = sha256(canonical JSON of sorted [name, dtype, shape, sha256 of the bytes])
    digest  = sha256(canonical JSON of {weights, configuration, tokens})

The weights' digest does not depend on the division into shards; it is recorded in ``graftline-base.json`` when a folder
is written, and computed for folders from elsewhere. Configuration and tokenizer are always read: an edited
``config.json`` (another rotary scaling, another epsilon) makes another base with another serving graph. Adapters record
the digest of the base that they were trained on and are refused on another (METHODS §7.11). Older adapters and releases
record the weights' digest, and are accepted by it.
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graftline.digest import Digest, of_json, write_json
from graftline.errors import BaseMismatchError, CheckpointError, GraftlineError
from graftline.weights.model_folder import computed_by, load_tokenizer, one_spelling
from graftline.weights.reader import CheckpointReader, TensorInfo, read_json_object

IDENTITY_FILE = "graftline-base.json"
_FORMAT = 1
_KEYS = {"format", "digest", "source_digest", "quantizer", "pair"}
_CHUNK_BYTES = 1 << 22
_TOKENIZER_PROBE = (
    "The cat's 1,234.5 naïve  cafés\n\tif x == 10: # Ελληνικά, 北京, 東京, Ärger, 👍🏽\r\n  I'LL <b>don't</b> ﬁnd"
)
"""Case, digits, spaces, accents, composed and wide characters, scripts, an emoji of several code points."""


@dataclass(frozen=True)
class BaseIdentity:
    """What identifies a base.

    digest: of weights, configuration and tokenizer. weights: of the weights alone; None if there is nothing else.
    spelled: with the configuration as its file spells it, which records had before spellings were made one.
    source_digest: of the unquantized base that it was made from, if any. quantizer: the settings that made it, if any.
    pair: digest of the initial factors of the only adapter that it may be used with, if it was made together with them
    (LoftQ, QPiSSA).
    """

    digest: Digest
    source_digest: Digest | None = None
    quantizer: dict[str, Any] | None = None
    pair: Digest | None = None
    weights: Digest | None = None
    spelled: Digest | None = field(default=None, compare=False)

    def is_called(self, recorded: Digest | None) -> bool:
        """Whether a recorded digest is this base's, or was in older records."""
        return recorded is not None and recorded in (self.digest, self.weights, self.spelled)


@dataclass(frozen=True)
class TensorDigest:
    """An entry of the list that is hashed. ``dtype`` as safetensors spells it; ``sha256`` in hexadecimal."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def combine(tensors: list[TensorDigest]) -> Digest:
    """Digest of weights from the digests of their tensors, in any order."""
    return of_json(sorted([t.name, t.dtype, list(t.shape), t.sha256] for t in tensors))


def base_digest(folder: Path) -> Digest:
    """Digest of the weights in a folder, computed from their bytes; raises as `CheckpointReader`."""
    reader = CheckpointReader(folder)
    return combine([tensor_digest(reader.info(name)) for name in reader.names()])


def read_identity(folder: Path) -> BaseIdentity:
    """The identity recorded in a folder, or computed if none is recorded.

    A record is trusted; `verify_identity` compares it with the bytes.

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
    """The identity with configuration and tokenizer in its digest, if the folder has a config.json."""
    configuration = computed_by(folder)
    if configuration is None:
        return of_weights
    weights = of_weights.digest
    spelled = {"weights": str(weights), "configuration": configuration, "tokens": _tokens(folder)}
    parts = spelled | {"configuration": one_spelling(configuration)}
    return replace(of_weights, digest=of_json(parts), weights=weights, spelled=of_json(spelled))


def _tokens(folder: Path) -> str | None:
    """Digest of the tokenizer's vocabulary and of the ids of a probe text that shows its steps; None without one.

    Its files are not hashed, because versions write the same tokenizer differently. Templates have their own digest.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    tokenizer = load_tokenizer(folder)
    return str(of_json([sorted(tokenizer.get_vocab().items()), tokenizer(_TOKENIZER_PROBE).input_ids]))


def write_identity(folder: Path, identity: BaseIdentity) -> None:
    """Record an identity in a folder, with the weights' digest: nothing else in the folder changes that."""
    record = {
        "format": _FORMAT,
        "digest": str(identity.weights or identity.digest),
        "source_digest": _text(identity.source_digest),
        "quantizer": identity.quantizer,
        "pair": _text(identity.pair),
    }
    write_json(folder / IDENTITY_FILE, record)


def verify_identity(folder: Path) -> BaseIdentity:
    """The identity of a folder, its record compared with the weights' bytes.

    Raises:
        BaseMismatchError: the weights are not those that were recorded; both digests are named.
    """
    recorded = read_identity(folder)
    if not (folder / IDENTITY_FILE).exists():
        return recorded  # computed from the bytes
    found, expected = base_digest(folder), recorded.weights or recorded.digest
    if found != expected:
        raise BaseMismatchError(
            f"the weights in {folder} have digest {found}, {IDENTITY_FILE} records {expected}: "
            "they were changed after they were written; make the folder again"
        )
    return recorded


def check_pair(base: BaseIdentity, adapter: Digest | None) -> None:
    """Refuse a LoftQ or QPiSSA base without the adapter that it was made with.

    Alone it is worse than plain quantization (METHODS §1.8), because its adapter makes up for its quantization error.
    ``adapter`` is the digest of the initial factors that the adapter was started from; None: no adapter.

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
    """The digest of a stored tensor, from its bytes."""
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
