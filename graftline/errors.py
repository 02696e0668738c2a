"""The exception hierarchy. Every message says what was given, what was expected and what to do.

GraftlineError                 anything a caller may want to catch; the command line turns it into exit code 2
├── ConfigError                pipelines.yaml or a command line argument
├── SourceError                a base or a data set could not be fetched, or differs from what was pinned
│   └── SourceUnavailableError no answer, or errors after every retry
├── CheckpointError            a model folder: damaged, incomplete, of an unknown architecture
├── DataError                  rows: format, encoding, labels, nothing to learn from
├── QuantizeError              a weight or a model that cannot be quantized as asked
├── AdapterError               an adapter: shapes, keys, targets
│   └── BaseMismatchError      an adapter and a base that do not belong together
├── TrainError                 training cannot start, or must stop
├── ClusterError               a Ray cluster that cannot be used
├── PreemptedError             the process was asked to stop; the next attempt resumes from its checkpoint
├── EvaluationError            scores that are missing or cannot be compared
├── NumberTypeError            a weight that its number type cannot hold
├── MergeError                 folding an adapter into its base
├── ExportError                a target that cannot take what was asked
├── ReleaseError               a package, a manifest or a signature
├── StoreError                 the release store
│   ├── StoreUnavailableError  no answer, or errors after every retry
│   ├── ConflictError          another writer changed the entry first
│   ├── HistoryLostError       a channel's history is shorter than it was, or different
│   ├── UntrustedError         an entry that nobody who may has signed, or that its policy forbids
│   └── UnsafeStoreError       the store ignores preconditions: nothing can be promoted on it
├── PromotionError             a policy, an approval or a verdict forbids it
├── ServingError               the server cannot start, or refuses an adapter
└── LockedError                another run holds the checkout
"""

import errno
import os
import re

_DISK_REMEDIES = {
    errno.ENOSPC: "free some space, then run again",
    errno.EDQUOT: "free some space, or have the quota raised, then run again",
    errno.EROFS: "it is mounted read-only: mount it for writing (`mount`, `dmesg`), then run again",
    errno.EIO: "the disk failed: look at it (`dmesg`), then run again",
    errno.EFBIG: "the file is larger than that file system or `ulimit -f` allows",
    errno.ENODEV: "the disk or its mount is gone: mount it, then run again",
    errno.ESTALE: "the network mount was lost: mount it again, then run again",
    errno.EACCES: "permission is missing there: check owner and mode, then run again",
    errno.EPERM: "permission is missing there: check owner and mode, then run again",
}
_OF_DISKS_ALONE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""Errors that can be about nothing else; the others are the disk's where they name a file."""
_NUMBER = re.compile(r"\(os error (\d+)\)|\[[Ee]rrno (\d+)\]")
"""How Rust (tokenizers, safetensors), shutil.Error and Arrow name an error of the system in their texts."""


def disk_error(error: BaseException | None) -> OSError | None:
    """The disk's error behind an exception, its causes included; None if there is none.

    Libraries hide it: tokenizers and safetensors raise errors of their own, torch.save a RuntimeError on its way out.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_REMEDIES:
            return error if error.filename or error.errno in _OF_DISKS_ALONE else None
        named = _NUMBER.search(str(error))
        if named and (number := int(named[1] or named[2])) in _OF_DISKS_ALONE:
            return OSError(number, os.strerror(number))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def explain_disk_error(error: OSError) -> str:
    """What `disk_error` returned, in one line: what cannot be used, why, and the remedy."""
    where = error.filename2 or error.filename or "a file or the output"
    done = "written" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG) else "read or written"
    return f"{where} cannot be {done}: {error.strerror}; {_DISK_REMEDIES[error.errno or 0]}"


class GraftlineError(Exception):
    """Root of all errors that a user can act on."""


class ConfigError(GraftlineError, ValueError):
    """pipelines.yaml or a command line argument is wrong."""


class SourceError(GraftlineError):
    """A source could not be fetched, or its content differs from what was pinned."""


class SourceUnavailableError(SourceError):
    """A source did not answer, or returned errors after every retry; it may work later."""


class CheckpointError(GraftlineError, ValueError):
    """A model folder is damaged, incomplete or of an unknown architecture."""


class DataError(GraftlineError, ValueError):
    """Rows cannot be read, or there is nothing to learn from them."""


class QuantizeError(GraftlineError, ValueError):
    """A weight or a model cannot be quantized as asked."""


class AdapterError(GraftlineError, ValueError):
    """An adapter has wrong shapes, keys or targets."""


class BaseMismatchError(AdapterError):
    """An adapter was given a base that it was not trained on."""


class TrainError(GraftlineError, RuntimeError):
    """Training cannot start, or must stop."""


class ClusterError(GraftlineError):
    """A Ray cluster cannot be used."""


class PreemptedError(GraftlineError):
    """Training was asked to stop and saved its progress; another attempt continues it."""


class EvaluationError(GraftlineError, ValueError):
    """Scores are missing or cannot be compared."""


class MergeError(GraftlineError, ValueError):
    """An adapter cannot be folded into its base."""


class NumberTypeError(GraftlineError, ValueError):
    """A weight is too large for its target number type; a wider one would hold it."""


class ExportError(GraftlineError, ValueError):
    """A target cannot take what was asked of it."""


class ReleaseError(GraftlineError, ValueError):
    """A package, a manifest or a signature is invalid."""


class StoreError(GraftlineError):
    """An error of the release store."""


class StoreUnavailableError(StoreError):
    """The store did not answer, or returned errors after every retry."""


class ConflictError(StoreError):
    """Another writer changed the entry first."""


class HistoryLostError(StoreError):
    """A channel's history lacks entries that are known to have been in it, or has others in their place."""


class UntrustedError(StoreError):
    """An entry of a channel was not signed by a key that may, or its own evidence does not meet its policy."""


class UnsafeStoreError(StoreError):
    """The store ignores preconditions, so nothing can be promoted on it."""


class PromotionError(GraftlineError):
    """A policy, an approval or a verdict forbids the promotion."""


class ServingError(GraftlineError):
    """The server cannot start, or refuses an adapter."""


class LockedError(GraftlineError):
    """Another run holds the checkout."""
