"""Before a run: pin what moves, so that DVC can see whether it moved.

Writes ``runs/<pipeline>/resolved.json``:

    {"sources": {"base" | "data" | "forgetting": {"source", "sha256", "prepare"}}, "champion": {"version", "release"},
     "harness": digest}

``prepare`` is the digest of the script that makes rows and of what it is made of (tasks.script), ``champion`` what the
release's channel holds now (null at first), ``harness`` the digest of ``evaluate.harness.folder`` (null without one).
It is no stage of dvc.yaml: it runs before each of them is asked whether it is up to date.
"""

import json
from pathlib import Path
from typing import Any

from graftline import config
from graftline.digest import of_file, of_folder, of_json, write_json
from graftline.errors import SourceError
from graftline.progress import Reporter
from graftline.registry import channel
from graftline.registry.store import open_store
from graftline.sources import parse, resolve
from tasks import stage
from tasks.script import parts as script_parts
from tasks.stage import Context

RESOLVED = "resolved.json"


def run(context: Context) -> None:
    """Pin what moves for this run: sources without a digest, and what production holds."""
    path = context.runs / RESOLVED
    before = json.loads(path.read_text()) if path.is_file() else {}
    now = {
        "sources": _sources(context),
        "champion": _champion(context, before.get("champion")),
        "harness": _harness(context),
    }
    if now != before:
        write_json(path, now)


def _sources(context: Context) -> dict[str, Any]:
    pipeline = context.pipeline
    sources: dict[str, Any] = {"base": _pin(context, pipeline.base), "data": _pin(context, pipeline.data)}
    if pipeline.evaluate.forgetting:
        sources["forgetting"] = _pin(context, pipeline.evaluate.forgetting)
    return sources


def _pin(context: Context, section: config.Base | config.Data | config.Forgetting) -> dict[str, Any]:
    source = parse(section.source)
    sha256 = section.sha256
    if sha256 is None:
        sha256 = resolve(source, cache=context.cache, root=context.root, on_progress=Reporter("fetch", "bytes")).hex
    script = getattr(section, "prepare", None)
    return {"source": source.masked, "sha256": sha256, "prepare": _script_digest(context.root, script)}


def _script_digest(root: Path, script: str | None) -> str | None:
    if script is None:
        return None
    if not (root / script).is_file():
        raise SourceError(
            f"prepare names {script}, which is not there; expected a Python file relative to pipelines.yaml"
        )
    # The modules that it imports and the files that it names make rows as much as the script does.
    parts = script_parts(
        script, is_file=lambda path: (root / path).is_file(), read=lambda path: (root / path).read_bytes()
    )
    if len(parts) == 1:
        return str(of_file(root / script))
    return str(of_json({path: str(of_file(root / path)) for path in parts}))


def harness_folder(context: Context) -> Path | None:
    """Further task definitions for lm-evaluation-harness.

    Raises:
        SourceError: the folder is not there.
    """
    section = context.pipeline.evaluate.harness
    if section is None or section.folder is None:
        return None
    folder = context.root / section.folder
    if not folder.is_dir():
        raise SourceError(
            f"evaluate.harness.folder names {section.folder}, which is not there; expected a folder of task "
            "definitions (YAML) relative to pipelines.yaml"
        )
    return folder


def _harness(context: Context) -> str | None:
    folder = harness_folder(context)
    return str(of_json({path: str(digest) for path, digest in of_folder(folder).items()})) if folder else None


def _champion(context: Context, before: dict[str, Any] | None) -> dict[str, Any]:
    release = context.pipeline.release
    entry = channel.head(open_store(store_url(context)), context.name, release.channel)
    champion = {"version": entry.change.version, "release": str(entry.change.release)} if entry else _NOBODY
    # Once this checkout's own release is in production, the candidate would be compared with itself: the verdict that
    # brought it there stays, and with it everything after `evaluate` stays up to date.
    if before and champion["version"] is not None and champion["version"] == _own_version(context):
        return before
    return champion


_NOBODY: dict[str, Any] = {"version": None, "release": None}


def _own_version(context: Context) -> str | None:
    path = context.folder("release") / "release.json"
    return json.loads(path.read_text())["version"] if path.is_file() else None


def store_url(context: Context) -> str:
    """The release store's address; a folder is relative to the project's root."""
    url = context.pipeline.release.store
    return url if "://" in url else str(context.root / url)


def load(context: Context) -> dict[str, Any]:
    """What `run` wrote.

    Raises:
        SourceError: it has not run.
    """
    path = context.runs / RESOLVED
    if not path.is_file():
        raise SourceError(f"{path} is missing; run `python -m tasks.resolve {context.name}` first")
    resolved: dict[str, Any] = json.loads(path.read_text())
    return resolved


def main() -> None:
    """Command line."""
    stage.main("resolve", run, measure=False)


if __name__ == "__main__":
    main()
