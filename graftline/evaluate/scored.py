"""Which bytes were scored: digests that go with the scores, through gate and package, into the release.

A verdict is about one adapter on one base, on given rows. Every later step compares what lies before it with what was
scored (`differences`), so that nothing is released with the verdict of something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from graftline.digest import Digest, of_files
from graftline.errors import EvaluationError, GraftlineError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)
"""Files of a base that a release carries beside its adapter."""


@dataclass(frozen=True)
class ScoredRelease:
    """The release that a scored model is."""

    version: str
    digest: Digest
    """Of its manifest's bytes."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was scored, each as it was when the model was loaded."""

    base: Digest
    """Weights of the folder that was loaded (`graftline.weights.identity`); of a merged model its own."""
    base_files: Digest
    """Whatever else lies in that folder: architecture, tokenizer."""
    tokenizer: Digest
    """The tokenizer's files in that folder."""
    adapter: Digest | None
    """Every file of the adapter's folder but a tokenizer's; None without an adapter."""
    rows: Digest
    """The file of evaluation rows."""
    texts: Digest
    """The file of general texts."""
    release: ScoredRelease | None = None
    """None for what was not released yet, and for the base."""

    def as_json(self) -> dict[str, Any]:
        """A JSON value."""
        digests = {name: None if (found := getattr(self, name)) is None else str(found) for name in DIGESTS}
        release = self.release and {"version": self.release.version, "digest": str(self.release.digest)}
        return digests | {"release": release}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `as_json` gave.

        Raises:
            EvaluationError: a digest is missing or is not one.
        """
        try:
            if value.keys() != {*DIGESTS, "release"}:
                raise KeyError(f"has {', '.join(sorted(value))}, expected {', '.join((*DIGESTS, 'release'))}")
            found = {name: value[name] and Digest.parse(value[name]) for name in DIGESTS}
            if missing := [name for name in DIGESTS if name != "adapter" and not found[name]]:
                raise KeyError(f"without {', '.join(missing)}")
            release = value["release"] and ScoredRelease(
                str(value["release"]["version"]), Digest.parse(value["release"]["digest"])
            )
        except (KeyError, TypeError, AttributeError, GraftlineError) as error:
            raise EvaluationError(f"what was scored is not said right: {error}; evaluate again") from error
        return cls(**found, release=release)


DIGESTS = tuple(field.name for field in fields(Scored) if field.name != "release")


def adapter_digest(files: Mapping[str, Digest]) -> Digest:
    """Digest of an adapter from the digests of the files in its folder; a tokenizer that lies there does not count."""
    return of_files({path: digest for path, digest in files.items() if path not in TOKENIZER_FILES})


def tokenizer_digest(files: Mapping[str, Digest]) -> Digest:
    """Digest of a tokenizer from the digests of the files in its folder."""
    return of_files({path: digest for path, digest in files.items() if path in TOKENIZER_FILES})


def differences(scored: Scored, found: Scored) -> list[str]:
    """What is not as it was scored: ``adapter: scored sha256:…, found sha256:…``."""
    pairs = {name: (getattr(scored, name), getattr(found, name)) for name in DIGESTS}
    return [f"{name}: scored {was}, found {here}" for name, (was, here) in pairs.items() if was != here]
