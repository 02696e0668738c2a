"""What the doctor says about what a line talks to: through which proxy, DVC's remote, the keys."""

import configparser
import importlib.util
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from graftline import proxies
from graftline.doctor.finding import Finding
from graftline.errors import GraftlineError
from graftline.registry.keys import BUILDER, KEY_FILE, KeyRing
from graftline.release.key_files import load_private_key

_SOON = timedelta(days=30)


def proxy() -> Iterator[Finding]:
    """Proxies that the environment names: our commands ask this machine without one, others may not."""
    found = proxies.named(os.environ)
    if not found:
        return
    shown = ", ".join(f"{name}={address}" for name, address in found.items())
    if (
        any(address.lower().startswith("socks") for address in found.values())
        and importlib.util.find_spec("socksio") is None
    ):
        yield Finding("proxy", "missing", f"{shown}: Prefect's client cannot speak SOCKS", "pip install 'httpx[socks]'")
        return
    spared = dict(os.environ)
    proxies.spare_loopback(spared)
    advice = f"for `prefect` and `dvc` by hand: export NO_PROXY={','.join(proxies.spared(spared))}"
    yield Finding("proxy", "note", f"{shown}; graftline asks this machine without it", advice)


def remote(root: Path) -> Finding:
    """DVC's default remote: where runs of other machines are found."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read([root / ".dvc" / "config", root / ".dvc" / "config.local"], encoding="utf-8")
    name = settings.get("core", "remote", fallback=None)
    if name is None:
        advice = "with several machines: dvc remote add --default NAME s3://BUCKET/dvc"
        return Finding("dvc remote", "ok", "none: what this machine runs stays here", advice)
    section = f"'remote \"{name}\"'"
    if not settings.has_option(section, "url"):
        return Finding("dvc remote", "missing", f"{name} has no url", f"dvc remote add --default {name} ADDRESS")
    return Finding("dvc remote", "ok", name)


def keys(root: Path, now: datetime | None = None) -> Finding:
    """The key ring: whether it can be read, names a builder, whose keys they are, and what expires within 30 days."""
    path, now = root / KEY_FILE, now or datetime.now(UTC)
    advice = "graftline new-key FILE, then list FILE.pub in keys.yaml (docs/releases.md)"
    if not path.is_file():
        return Finding("keys", "note", f"no {KEY_FILE}: nothing can be promoted on a signature", advice)
    try:
        ring = KeyRing.load(path)
    except GraftlineError as error:
        return Finding("keys", "missing", str(error), "correct keys.yaml by pull request")
    if not ring.keys:
        return Finding("keys", "note", f"{KEY_FILE} lists no key: nothing can be promoted on a signature", advice)
    alive = [key for key in ring.keys.values() if not key.has_expired(now)]
    if not any(BUILDER in key.roles for key in alive):
        return Finding("keys", "missing", "no builder's key counts now", "add one: docs/runbooks.md, rotate keys")
    if len(alive) > 1 and (nameless := [key.name for key in alive if key.person is None]):
        found = f"{', '.join(nameless)}: no `person`, so that each counts as a person of its own"
        return Finding("keys", "note", found, "write `person: NAME` beside each key: docs/promotion.md, people")
    if soon := [key.name for key in alive if key.has_expired(now + _SOON)]:
        return Finding("keys", "note", f"{', '.join(soon)} expires within 30 days", "docs/runbooks.md, rotate keys")
    return Finding("keys", "ok", f"{len(alive)} of {len(ring.keys)} keys count now")


def signing_key() -> Finding:
    """The private key that releases are signed with."""
    named = os.environ.get("GRAFTLINE_SIGNING_KEY")
    if not named:
        return Finding("signing key", "note", "GRAFTLINE_SIGNING_KEY is not set: releases are not signed")
    path = Path(named).expanduser()
    try:
        load_private_key(path)
    except GraftlineError as error:
        return Finding("signing key", "missing", str(error), "name a key that `graftline new-key` made")
    if path.stat().st_mode & 0o077:
        return Finding("signing key", "note", f"others may read {path}", f"chmod 600 {path}")
    return Finding("signing key", "ok", str(path))
