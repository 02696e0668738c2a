"""Deciding settings that a pull request changes: gates, channels, keys, evaluation rows.

A pull request that changes them would judge itself, so it never passes automatically. Values are compared after anchors
and defaults are resolved, files by git's objects; nothing is checked out.
"""

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.address import mask_secrets
from graftline.data.sources import local_part, parse
from graftline.digest import of_bytes
from graftline.errors import GraftlineError
from graftline.evaluate.scores import Scores, Section
from graftline.registry.keys import KEY_FILE, KeyRing
from graftline.workflow.git import CommitFiles, git

# By section, the keys that do not decide; of base and release, those that do.
_IGNORED = {"data": {"license"}, "evaluate": {"batch_tokens", "processes"}}
_CHOSEN = {"base": {"template"}, "release": {"store", "channel"}}
_WHOLE = ("gates", "guards")

JUDGES = (
    "dvc.yaml",
    "graftline/settings",
    # Measurement: rows and their split, templates, leaks, scores, merged against unmerged.
    "graftline/data",
    "graftline/evaluate",
    "graftline/merge",
    "graftline/workflow/fetching.py",
    "graftline/workflow/pinned_sources.py",
    "graftline/workflow/merging.py",
    "graftline/workflow/scoring.py",
    "tasks/fetch.py",
    "tasks/evaluate.py",
    "tasks/merge.py",
    # Decision: what passes, against what, and who may release.
    "graftline/workflow/judging.py",
    "graftline/workflow/published.py",
    "graftline/workflow/reserve.py",
    "graftline/workflow/resolve.py",
    "graftline/workflow/scored.py",
    "graftline/registry",
    "tasks/gate.py",
    "graftline/workflow/line.py",
    "graftline/workflow/stages.py",
    "graftline/workflow/process.py",
    "flows/retrain.py",
    # Report: the result for a pull request.
    "graftline/workflow/against_base.py",
    "graftline/workflow/comment.py",
    "graftline/workflow/changes.py",
    "graftline/workflow/git.py",
    "graftline/workflow/deciding.py",
    "graftline/workflow/pull_request.py",
    "graftline/workflow/worktree.py",
    "flows/evaluate_pr.py",
    ".github/workflows/evaluate-pr.yaml",
    ".gitlab-ci.yml",
    "infra/ci/gitlab.yaml",
)
"""Code that measures and judges. A pull request runs its own version, so its changes are shown like a gate's."""


@dataclass(frozen=True)
class DecidingSetting:
    """A deciding setting at both revisions, as text without secrets; None where it is missing.

    ``pipeline`` is None if it concerns all of them.
    """

    pipeline: str | None
    key: str
    old: str | None
    new: str | None


def read_config(root: Path, commit: str) -> settings.Config:
    """pipelines.yaml at a commit; GraftlineError if it is missing or not valid."""
    name = f"{settings.DEFAULT_FILE} of {commit[:12]}"
    data = CommitFiles(root, commit).read(settings.DEFAULT_FILE)
    if data is None:
        raise GraftlineError(f"{name} is missing; commit the project's pipelines there")
    return settings.parse_config(data, Path(name))


def find_settings(root: Path, base: str, head: str) -> list[DecidingSetting]:
    """Deciding settings that differ between two commits, those of all pipelines first.

    Raises:
        GraftlineError: pipelines.yaml cannot be read at one of them.
    """
    before, after = read_config(root, base), read_config(root, head)
    found = list(_differences(None, "channels", _dump(before.channels), _dump(after.channels)))
    found += _differences(None, KEY_FILE, _keys(root, base), _keys(root, head))
    found += _differences(None, "code", _objects(root, base, JUDGES), _objects(root, head, JUDGES))
    files = [_objects(root, commit, _files(side)) for commit, side in ((base, before), (head, after))]
    for name in dict.fromkeys([*before.names, *after.names]):
        found += _pipeline(name, before, after)
        if name in before.names and name in after.names:
            # If only one side names a file, the setting that names it differs.
            shared = sorted(set(_named(before, name)) & set(_named(after, name)))
            old, new = ({f"content of {path}": held.get(path) for path in shared} for held in files)
            found += _differences(name, "", old, new)
    return found


def measured_settings(pipeline: str, base: Scores, head: Scores) -> list[DecidingSetting]:
    """The rows that were scored and their template, if they differ.

    A file or a source may change without changing the evaluation rows, and vice versa.
    """
    found = []
    if base.template != head.template:
        found.append(DecidingSetting(pipeline, "template, as it was used", base.template.short, head.template.short))
    sections: tuple[Section, ...] = ("items", "general", "documents", "answers")
    for section in sections:
        old, new = base.item_set(section), head.item_set(section)
        if old != new:
            texts = (f"{len(side.ids(section))} {section} {side.item_set(section).short}" for side in (base, head))
            found.append(DecidingSetting(pipeline, f"what was scored: {section}", *texts))
    return found


def _pipeline(name: str, before: settings.Config, after: settings.Config) -> Iterator[DecidingSetting]:
    if name not in before.names or name not in after.names:
        old, new = (_summary(side, name) for side in (before, after))
        yield DecidingSetting(name, "the whole pipeline", old, new)
        return
    old_values, new_values = (_decisive(side.pipeline(name).model_dump(mode="json")) for side in (before, after))
    yield from _differences(name, "", old_values, new_values)


def _summary(side: settings.Config, name: str) -> str | None:
    if name not in side.names:
        return None
    pipeline = side.pipeline(name)
    off = [guard for guard, is_on in pipeline.guards.model_dump().items() if not is_on]
    guards = f"; guards switched off: {', '.join(off)}" if off else ""
    rows = ", ".join(each.source for each in pipeline.data.all_sources)
    return mask_secrets(
        f"gates {', '.join(pipeline.gates)}{guards}; rows {rows}; "
        f"channel {pipeline.release.channel} of {pipeline.release.store}"
    )


def _decisive(values: dict[str, Any]) -> dict[str, Any]:
    kept = {section: values[section] for section in _WHOLE if section in values}
    for section, ignored in _IGNORED.items():
        kept[section] = {key: value for key, value in values[section].items() if key not in ignored}
    for section, chosen in _CHOSEN.items():
        kept[section] = {key: value for key, value in values[section].items() if key in chosen}
    return kept


def _differences(pipeline: str | None, key: str, old: Any, new: Any) -> Iterator[DecidingSetting]:
    """The differing values; a part that one side lacks is one difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(pipeline, f"{key}.{name}" if key else name, old.get(name), new.get(name))
    elif old != new:
        yield DecidingSetting(pipeline, key, _text(old), _text(new))


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {_text(item)}" for key, item in value.items() if item is not None) or "nothing"
    return mask_secrets(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _dump(channels: Mapping[str, settings.Channel]) -> dict[str, Any]:
    return {name: channel.model_dump(mode="json") for name, channel in channels.items()}


def _keys(root: Path, commit: str) -> dict[str, Any]:
    """The keys that count, by name: person, roles, fingerprint and expiry date."""
    data = CommitFiles(root, commit).read(KEY_FILE)
    if data is None:
        return {}
    try:
        ring = KeyRing.parse(data.decode(errors="surrogateescape"), origin=KEY_FILE)
    except GraftlineError as error:
        return {"all of it": f"{of_bytes(data).short}, cannot be read: {error}"}
    return {
        name: {
            "person": ring.person(name),
            "roles": list(key.roles),
            "key": of_bytes(key.public_key.encode()).short,
            "expires": key.expires.isoformat() if key.expires else None,
            "revoked": key.revoked.isoformat() if key.revoked else None,
        }
        for name, key in ring.keys.items()
    } | {
        name: value
        for name, value in (("accepted", sorted(map(str, ring.accepted))), ("unsigned", ring.unsigned))
        if value
    }


def _files(side: settings.Config) -> list[str]:
    return sorted({path for name in side.names for path in _named(side, name)})


def _named(side: settings.Config, name: str) -> Iterator[str]:
    """Files and folders of the repository from which a pipeline's rows, general text and tasks are made."""
    pipeline = side.pipeline(name)
    yield from map(posixpath.normpath, pipeline.read_files)
    for section in filter(None, (*pipeline.read_sections, pipeline.evaluate.harness)):
        for key in ("source", "prepare", "folder"):
            value = getattr(section, key, None)
            if isinstance(value, str) and (key != "source" or value.startswith("path:")):
                named = local_part(parse(value)) if key == "source" else value
                path = posixpath.normpath(named)
                if not path.startswith(("/", "..", "~")):
                    yield path


def _objects(root: Path, commit: str, paths: Any) -> dict[str, str]:
    """Abbreviated git objects by path: of the path, of its .dvc file, or of the submodule that contains it."""
    asked = list(paths)
    if not asked:
        return {}
    places = {path: [path, f"{path}.dvc", *map(str, list(Path(path).parents)[:-1])] for path in asked}
    every = sorted({place for candidates in places.values() for place in candidates})
    output = git(root, "ls-tree", "-t", "-z", "--full-tree", commit, "--", *every)
    listed = [line.partition("\t") for line in output.split("\0") if line]
    held = {path: about.split()[1:3] for about, _, path in listed}
    found = {}
    for path, candidates in places.items():
        own = [held[place][1] for place in candidates[:2] if place in held]
        modules = [held[place][1] for place in candidates[2:] if place in held and held[place][0] == "commit"]
        if own or modules:
            found[path] = (own or modules)[0][:12]
    return found
