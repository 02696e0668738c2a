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
│   └── UnsafeStoreError       the store ignores preconditions: nothing can be promoted on it
├── PromotionError             a policy, an approval or a verdict forbids it
├── ServingError               the server cannot start, or refuses an adapter
└── LockedError                another run holds the checkout
"""


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


class UnsafeStoreError(StoreError):
    """The store ignores preconditions, so nothing can be promoted on it."""


class PromotionError(GraftlineError):
    """A policy, an approval or a verdict forbids the promotion."""


class ServingError(GraftlineError):
    """The server cannot start, or refuses an adapter."""


class LockedError(GraftlineError):
    """Another run holds the checkout."""
