"""The sources of a pipeline as they are at one moment: which files, which bytes, and the same again for the stages.

The record of a source, in ``resolved.json`` and in the fetch stage's ``data.json``:

    {"source": address, "sha256": digest, "prepare": digest of the script}
    and, of a folder or a pattern,   "files": {address: digest}
    of several sources,              "parts": [records]

``sha256`` says what all of it holds: it is equal where every file has the same bytes and the same name. What servers
call these bytes (ETag, version, time) is recorded beside that, in ``versions``: an object that is written again with
the same bytes is not new data.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.address import Source
from graftline.data.mixing import FetchedSource
from graftline.data.sources import NamedFile, at_hand, fetch, list_files, look, parse
from graftline.data.sources.cache import place_of
from graftline.digest import of_file, of_json
from graftline.errors import SourceError
from graftline.logs import Reporter
from graftline.plain_text import count
from graftline.workflow.script import parts_in
from graftline.workflow.workspace import Workspace

Versions = dict[str, dict[str, str]]
"""What servers call what they hold, by address."""

_Section = settings.Base | settings.RowSource | settings.EvaluationRows | settings.Forgetting


def may_move(section: settings.Data) -> bool:
    """Whether one of the sources of rows may have other content tomorrow."""
    return any(each.sha256 is None and not parse(each.source).is_pinned for each in section.all_sources)


def pin_all(pipeline: settings.Pipeline, at: Workspace) -> tuple[dict[str, Any], Versions]:
    """The record of every source of a pipeline, and what their servers call what they hold.

    Raises:
        SourceError: one is not there or cannot be read, matches no file, or gives a file that another gives too.
    """
    found = _Pinning(at)
    records = {"base": found.one(pipeline.base), "data": found.rows(pipeline.data)}
    if pipeline.data.evaluation:
        records["evaluation"] = found.one(pipeline.data.evaluation)
    if pipeline.evaluate.forgetting:
        records["forgetting"] = found.one(pipeline.evaluate.forgetting)
    return records, found.versions


class _Pinning:
    """The sources of one pipeline being looked at."""

    def __init__(self, at: Workspace) -> None:
        self.at, self.versions = at, Versions()

    def one(self, section: _Section) -> dict[str, Any]:
        """A source that is one thing: a file, an archive, a folder that a script reads, a model."""
        source = parse(section.source)
        sha256 = section.sha256 or self._look(NamedFile(source))
        return {"source": source.masked, "sha256": sha256, "prepare": _script(self.at.root, section)}

    def rows(self, section: settings.Data) -> dict[str, Any]:
        """Every source of rows; two that give one file are an error."""
        root = self.at.root
        listed = [(each, files_of(each, root)) for each in section.all_sources]
        _refuse_repeats([*listed, *([(section.evaluation, None)] if section.evaluation else [])], root)
        records = [self.one(each) if files is None else self._set(each, files) for each, files in listed]
        if section.source is not None:
            return records[0]
        sha256 = of_json([[record["sha256"], record["prepare"]] for record in records]).hex
        named = ", ".join(record["source"] for record in records)
        return {"source": named, "sha256": sha256, "prepare": None, "parts": records}

    def _set(self, section: settings.RowSource, files: Sequence[NamedFile]) -> dict[str, Any]:
        address, script = parse(section.source).masked, _script(self.at.root, section)
        digests = {file.source.masked: self._look(file) for file in files}
        sha256 = of_json(digests).hex
        if section.sha256 not in (None, sha256):
            raise SourceError(
                f"{address} has digest sha256:{sha256} over {count(len(files), 'file')}; expected "
                f"sha256:{section.sha256}: find out what has changed before changing `sha256`"
            )
        return {"source": address, "sha256": sha256, "prepare": script, "files": digests}

    def _look(self, file: NamedFile) -> str:
        progress = Reporter("fetch", "bytes")
        found = look(file.source, cache=self.at.cache, root=self.at.root, etag=file.etag, on_progress=progress)
        if found.version:
            self.versions[file.source.masked] = found.version
        return found.digest.hex


def rows_at_hand(section: settings.Data, at: Workspace) -> tuple[list[FetchedSource], FetchedSource | None] | str:
    """Rows before they are fetched: the sources of ``data``, and of ``data.evaluation``; or the first that is not here.

    Nothing is downloaded or copied, and nobody is asked.

    Raises:
        SourceError: a local source has another digest than the pipeline says, or a pattern matches no file.
    """
    found = []
    evaluation: list[settings.EvaluationRows] = [section.evaluation] if section.evaluation else []
    sections: list[settings.RowSource | settings.EvaluationRows] = [*section.all_sources, *evaluation]
    for each in sections:
        source = parse(each.source)
        # A folder or a pattern in a store would have to be listed there.
        files = files_of(each, at.root) if source.kind == "path" else None
        named = [file.source for file in files] if files is not None else [source]
        sha256 = each.sha256 if files is None else None
        places = [(one, at_hand(one, sha256=sha256, cache=at.cache, root=at.root)) for one in named]
        if any(place is None for _, place in places):
            return source.masked
        found.append(FetchedSource(each, tuple((one.masked, place) for one, place in places if place)))
    return (found[:-1], found[-1]) if section.evaluation else (found, None)


def files_of(section: settings.RowSource | settings.EvaluationRows, root: Path) -> tuple[NamedFile, ...] | None:
    """The files of a folder or a pattern; None if the source is one thing.

    Raises:
        SourceError: as in `list_files`.
    """
    source = parse(section.source)
    if section.prepare and source.kind == "path" and os.path.isdir(place_of(source, root)):
        return None  # The script is given the folder.
    return list_files(source, root)


def _refuse_repeats(
    listed: Sequence[tuple[settings.RowSource | settings.EvaluationRows, Sequence[NamedFile] | None]], root: Path
) -> None:
    """A file that two sources give would count twice, and one that evaluates must not be trained on."""
    given: dict[tuple[str, str | None], str] = {}
    for section, files in listed:
        address = parse(section.source)
        for file in files or (NamedFile(address),):
            # Two scripts may make different rows of one file.
            key = (_identity(file.source, root), section.prepare)
            if key in given:
                raise SourceError(
                    f"{file.source.masked} is given by {given[key]} and again by {address.masked}: its rows would "
                    "count twice, or be trained on and evaluate; name it once"
                )
            given[key] = address.masked


def _identity(source: Source, root: Path) -> str:
    """The same for two addresses of one file: links and ``..`` are followed."""
    if source.kind == "path":
        return f"path {os.path.realpath(place_of(source, root))}"
    return str(source)


def _script(root: Path, section: _Section) -> str | None:
    script = getattr(section, "prepare", None)
    if script is None:
        return None
    if not (root / script).is_file():
        raise SourceError(
            f"prepare names {script}, which is not there; expected a Python file relative to pipelines.yaml"
        )
    return script_digest(root, script)


def script_digest(root: Path, script: str) -> str:
    """Digest of a script with the modules that it imports and the files that it names: they make rows as much."""
    parts = parts_in(root, script)
    if len(parts) == 1:
        return str(of_file(root / script))
    return str(of_json({path: str(of_file(root / path)) for path in parts}))


# What was pinned, fetched for a stage.


def fetch_rows(
    section: settings.Data, record: Mapping[str, Any], versions: Versions, at: Workspace
) -> Sequence[FetchedSource]:
    """The files of every source of rows as they were pinned, in order."""
    records = record.get("parts") or [record]
    return [
        FetchedSource(each, tuple(_fetch_files(each, pinned, versions, at)))
        for each, pinned in zip(section.all_sources, records, strict=True)
    ]


def _fetch_files(
    section: settings.RowSource, record: Mapping[str, Any], versions: Versions, at: Workspace
) -> Iterable[tuple[str, Path]]:
    if "files" not in record:
        yield record["source"], fetch_one(section.source, record["sha256"], versions, at)
        return
    for address, sha256 in record["files"].items():
        yield address, fetch_one(address, sha256, versions, at)


def fetch_one(address: str, sha256: str, versions: Versions, at: Workspace) -> Path:
    """What an address named when it was pinned; of an object, by its version where its bucket keeps versions."""
    source = parse(address)
    source = source.at_version(versions.get(source.masked, {}).get("version_id"))
    return fetch(source, sha256=sha256, cache=at.cache, root=at.root, on_progress=Reporter("fetch data", "bytes"))
