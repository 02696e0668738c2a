"""A plugin for vLLM: a request for ``pipeline@VERSION`` fetches the release, verifies it, and loads it.

vLLM calls `register` if its environment has ``VLLM_PLUGINS=graftline`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``;
the variables of `Setup.from_environment` configure the plugin. Only immutable names are resolved, because vLLM asks
only once for each name, and only releases that a channel holds or has held. vLLM itself has not been run here: the test
uses a stand-in for its published base class.
"""

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftline import settings
from graftline.digest import Digest
from graftline.errors import ConfigError, GraftlineError, PromotionError
from graftline.registry import channel as channels
from graftline.registry.channel import Entry
from graftline.registry.keys import KEY_FILE, KeyFile
from graftline.registry.objects import is_name
from graftline.registry.store import Store, open_store
from graftline.registry.trust import UNSIGNED, EntryJudge, Trust, trust_in
from graftline.serve.vllm_follower import exporter, prepare

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NAME = "graftline"
_VERSION = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}")
_MAX_ID = (1 << 31) - 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where releases come from, and how they are checked."""

    store: str
    channels: tuple[str, ...]
    """A release is served if one of these holds it, tries it, or held it and was not rolled back from it."""
    base: Path
    """The base that vLLM serves."""
    folder: Path
    project: Path | None = None
    """The folder with the keys.yaml and the pipelines.yaml by which entries are judged; None: nothing is checked."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Setup":
        """Read ``GRAFTLINE_STORE``, ``_CHANNELS`` (default production), ``_BASE``, ``_FOLDER`` and ``_PROJECT``.

        ``GRAFTLINE_UNSIGNED=1`` instead of ``_PROJECT``: do not check signatures.

        Raises:
            ConfigError: one that is needed is missing, or names no folder.
        """
        needed = {name: environment.get(f"GRAFTLINE_{name}", "") for name in ("STORE", "BASE", "FOLDER")}
        if missing := [f"GRAFTLINE_{name}" for name, value in needed.items() if not value]:
            raise ConfigError(
                f"{', '.join(missing)} not set; expected the store, vLLM's base and a folder for adapters"
            )
        if not Path(needed["BASE"]).is_dir():
            raise ConfigError(f"GRAFTLINE_BASE is {needed['BASE']}; there is no such folder")
        project, unsigned = environment.get("GRAFTLINE_PROJECT"), environment.get("GRAFTLINE_UNSIGNED") == "1"
        if bool(project) == unsigned:
            raise ConfigError(
                f"GRAFTLINE_PROJECT is {project or 'not set'}; expected the folder with keys.yaml and pipelines.yaml, "
                "or in its place GRAFTLINE_UNSIGNED=1: check no signature"
            )
        names = environment.get("GRAFTLINE_CHANNELS", "production").split(",")
        return cls(
            store=needed["STORE"],
            channels=tuple(name.strip() for name in names if name.strip()),
            base=Path(needed["BASE"]),
            folder=Path(needed["FOLDER"]).absolute(),
            project=Path(project) if project else None,
        )


class Releases:
    """Releases by the names that vLLM is asked for."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._store: Store = open_store(setup.store, seen=setup.folder / "seen")
        self._keys = KeyFile(setup.project / KEY_FILE) if setup.project else None
        self._policies = settings.load(setup.project / settings.DEFAULT_FILE).channels if setup.project else {}
        if self._keys is None or self._keys.is_unsigned:
            logger.warning("%s: %s", self._store.url, UNSIGNED)
        self._export: Callable[[Path, Path], object] = exporter(setup.base)
        self._ids: dict[int, Digest] = {}

    def find(self, name: str) -> tuple[Path, int] | None:
        """The adapter folder of a name and its id; None for a name that is not a release's.

        Raises:
            GraftlineError: no channel holds the release, or it is refused; the reason is given.
        """
        pipeline, separator, version = name.partition("@")
        if not (separator and is_name(pipeline) and _VERSION.fullmatch(version)):
            return None
        trust = self._trust()
        entry, since = self._entry(pipeline, version, trust)
        keys = trust.keys if trust else None
        folder = prepare(self._store, entry, self._setup.folder, self._export, keys, at=since)
        return folder, self._id(entry.change.release)

    def _trust(self) -> Trust | None:
        if self._keys is None:
            return None
        self._keys.refresh()
        return trust_in(self._keys.ring, self._policies)

    def _entry(self, pipeline: str, version: str, trust: Trust | None) -> tuple[Entry, datetime | None]:
        """An entry that holds the release, as if it held nothing else, and since when, if that is known.

        UntrustedError where the newest entry of a channel does not count; older ones that do not are passed over.
        """
        for name in self._setup.channels:
            if trust is None:
                found = _holding(channels.backwards(self._store, pipeline, name), version)
                if found:
                    return found, None
                continue
            judge = EntryJudge(self._store, pipeline, trust, now=datetime.now(UTC))
            log = judge.read(name).log
            newest_first = reversed(range(len(log.entries)))
            found = _holding((log.entries[at] for at in newest_first if judge.why_not(log, at) is None), version)
            if found:
                return found, judge.held_since(log, found)
        known = ", ".join(self._setup.channels)
        raise PromotionError(f"{pipeline}@{version} is in no channel of {known}, or was gone back from: not served")

    def _id(self, release: Digest) -> int:
        """A positive number made from the release's digest, so that it is the same in every process."""
        number = int(release.hex[:8], 16) % _MAX_ID + 1
        if self._ids.setdefault(number, release) != release:
            raise PromotionError(f"two releases have the id {number}; promote one of them again from a new package")
        return number


def _holding(newest_first: Iterable[Entry], version: str) -> Entry | None:
    """The newest entry that holds a version, or tries it now; None if there is none or somebody went back from it."""
    following: Entry | None = None
    for entry in newest_first:
        candidate = channels.candidate_of(entry)
        if following is None and candidate and candidate.change.version == version:
            return candidate
        if entry.change.version == version:
            is_left = following and following.change.action == "rollback" and following.change.version != version
            return None if is_left else entry
        following = entry
    return None


def make_resolver(releases: Releases) -> Any:
    """A resolver for vLLM's registry."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class Resolver(LoRAResolver):
        """Resolves ``pipeline@VERSION``."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> "LoRARequest | None":
            """The request that loads a release; None where it is not served, and the log says why."""
            if lora_name == base_model_name:
                return None
            try:
                found = await asyncio.to_thread(releases.find, lora_name)
            except (GraftlineError, OSError) as error:
                logger.error("%s is not served: %s", lora_name, error)
                return None
            if found is None:
                return None
            folder, number = found
            return LoRARequest(
                lora_name=lora_name, lora_int_id=number, lora_path=str(folder), base_model_name=base_model_name
            )

    return Resolver()


def register() -> None:
    """Called by vLLM when it starts (entry point ``vllm.general_plugins``), in each of its processes.

    Does nothing without ``GRAFTLINE_STORE``: vLLM calls every installed plugin.

    Raises:
        ConfigError: the environment says where releases are, but other variables are missing.
    """
    if not os.environ.get("GRAFTLINE_STORE"):
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver(NAME, make_resolver(Releases(Setup.from_environment(os.environ))))
