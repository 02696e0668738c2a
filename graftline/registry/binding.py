"""Is a release the one that was judged? Its own files record by digest what was scored, and must agree.

    evaluation/candidate.jsonl    which adapter, base, tokenizer and rows were scored (`graftline.evaluate.verdict`)
    evaluation/verdict.json       which scores, and which record of the merge, the verdict comes from
    evaluation/parity.json        which merged model was compared, and what it was made of
    provenance.intoto.json       if there is one: the same files and inputs as the manifest (`release.provenance`)

The check compares digests from the manifest; the files' bytes are compared with the manifest elsewhere.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from graftline.digest import Digest, of_bytes, of_files
from graftline.errors import EvaluationError, ReleaseError
from graftline.evaluate.verdict import (
    ScoredInputs,
    ScoredRelease,
    Verdict,
    adapter_digest,
    tokenizer_digest,
    verdict_from_dict,
)
from graftline.registry.reserve import ROW_FILES
from graftline.release import provenance
from graftline.release.manifest import Manifest
from graftline.release.provenance import PROVENANCE_NAME
from graftline.settings.gate_metrics import ANCHOR, PRODUCTION

BASE = "base"
"""What candidates are compared with while production is empty."""
FOLDER = "evaluation"
VERDICT, PARITY = f"{FOLDER}/verdict.json", f"{FOLDER}/parity.json"
_SCORES = ".jsonl"


def check_binding(manifest: Manifest, read: Callable[[str], bytes]) -> None:
    """Compare what a release holds with what its verdict is about; ``read`` gives the bytes of one of its files.

    Manifests of format 1 do not record it, and pass.

    Raises:
        ReleaseError: names everything that does not belong together, with the digests.
    """
    if manifest.format == 1:
        return
    try:
        files = _Files(manifest, read)
        problems = _problems(manifest, files)
        if PROVENANCE_NAME in files.digests:
            problems += provenance.problems(manifest, files.read(PROVENANCE_NAME))
    except (EvaluationError, KeyError, TypeError, AttributeError, ValueError) as error:
        problems = [f"its evaluation cannot be read: {error}"]
    if problems:
        raise ReleaseError(
            f"release {manifest.version} of {manifest.pipeline} is not what was judged: {'; '.join(problems)}; do not "
            f"use it: evaluate, gate and package again (dvc repro --force --single-item evaluate@{manifest.pipeline})"
        )


def judged_against(verdict: Verdict, production: ScoredRelease | None) -> ScoredRelease | None:
    """The release that a verdict compares with; None if production was empty, or no gate compares with it."""
    return production if any(gate.against == PRODUCTION for gate in verdict.gates) else None


class _Files:
    """The files of a release: their digests, and the bytes of those that are read."""

    def __init__(self, manifest: Manifest, read: Callable[[str], bytes]) -> None:
        self.digests = {entry.path: entry.digest for entry in manifest.files}
        self._read = read

    def below(self, folder: str) -> dict[str, Digest]:
        """Digests of the files in a folder, by path relative to it."""
        return {
            path.removeprefix(f"{folder}/"): digest
            for path, digest in self.digests.items()
            if path.startswith(f"{folder}/")
        }

    def read(self, path: str) -> bytes:
        if path not in self.digests:
            raise EvaluationError(f"{path} is missing")
        data = self._read(path)
        if (found := of_bytes(data)) != self.digests[path]:
            raise EvaluationError(f"{path} has digest {found}, the manifest says {self.digests[path]}")
        return data

    def json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def scored(self) -> dict[str, ScoredInputs]:
        """What was scored, by model, from the first line of each file of scores."""
        names = [path.removesuffix(_SCORES) for path in self.below(FOLDER) if path.endswith(_SCORES)]
        return {name: _scored(self.read(f"{FOLDER}/{name}{_SCORES}"), name) for name in names}


def _scored(data: bytes, name: str) -> ScoredInputs:
    header = json.loads(data.partition(b"\n")[0])
    if not header.get("scored"):
        raise EvaluationError(f"the scores of {name} do not say which bytes were scored")
    return ScoredInputs.from_json(header["scored"])


def _problems(manifest: Manifest, files: _Files) -> list[str]:
    scored = files.scored()
    if "candidate" not in scored:
        return ["there are no scores of the candidate"]
    verdict, parity = files.json(VERDICT), files.json(PARITY)
    candidate = scored["candidate"]
    template = json.loads(files.read(f"{FOLDER}/candidate{_SCORES}").partition(b"\n")[0])["template"]
    return [
        *_of_verdict(manifest, files, verdict, scored),
        *_other(
            "scored",
            (
                ("base", candidate.base, manifest.lineage.base_digest),
                ("template", template, manifest.lineage.template_digest),
                ("adapter", candidate.adapter, adapter_digest(files.below("adapter"))),
                ("tokenizer", candidate.tokenizer, tokenizer_digest(files.below("adapter"))),
                *((f"rows of {name}", other.rows, candidate.rows) for name, other in scored.items()),
            ),
        ),
        *_other("judged", ((name, value, getattr(candidate, name)) for name, value in manifest.judged or ())),
        *_of_merged(files, parity, candidate),
    ]


def _of_verdict(manifest: Manifest, files: _Files, record: Any, scored: Mapping[str, ScoredInputs]) -> list[str]:
    verdict = verdict_from_dict(record)
    release = judged_against(verdict, scored[PRODUCTION].release if PRODUCTION in scored else None)
    digests = {f"{FOLDER}/{name}{_SCORES}": digest for name, digest in record["judged"]["scores"].items()}
    digests[PARITY] = record["judged"]["parity"]
    evaluated = {path: str(found) for path, found in files.digests.items() if path in digests or _is_scores(path)}
    said, pinned = manifest.verdict, scored[ANCHOR].release if ANCHOR in scored else None
    return _other(
        "judged",
        (
            ("anchor", said.anchor and dict(said.anchor), verdict.anchor and vars(verdict.anchor)),
            ("anchor", verdict.anchor and verdict.anchor.version, pinned and pinned.version),
            ("anchor", verdict.anchor and verdict.anchor.release, pinned and pinned.digest),
            ("verdict", said.digest, files.digests.get(VERDICT)),
            ("outcome", said.outcome, verdict.outcome),
            ("against", said.against, release.version if release else BASE),
            ("against", said.release, release.digest if release else None),
            *((path, digests.get(path), evaluated.get(path)) for path in sorted({*digests, *evaluated})),
        ),
    )


def _is_scores(path: str) -> bool:
    """Whether a file may hold scores. Those of the reserve are rows, which nobody has judged before a promotion."""
    return path.endswith(_SCORES) and path not in ROW_FILES


def _of_merged(files: _Files, parity: Any, candidate: ScoredInputs) -> list[str]:
    merged = files.below("merged")
    if not parity["merged"]:
        return [f"merged: {len(merged)} files, and no record that they were compared"] if merged else []
    return _other(
        "merged",
        (
            ("model", parity["model"], of_files(merged)),
            ("adapter", parity["adapter"], candidate.adapter),
            ("base", parity["base"], candidate.base),
        ),
    )


def _other(what: str, pairs: Any) -> list[str]:
    """One sentence for each pair that differs: ``adapter: scored sha256:…, here sha256:…``."""
    return [f"{name}: {what} {was}, here {found}" for name, was, found in pairs if _text(was) != _text(found)]


def _text(value: object) -> str | None:
    return None if value is None else str(value)
