"""One folder with everything that a release needs.

    adapter/       the adapter in PEFT's format, its graftline.json, the tokenizer with its template
    merged/        the merged model, if the pipeline asks for one and its answers equal the unmerged model's
    evaluation/    scores by item, the verdict, the comparison of the merged model
    reserve/       rows that only promotions look at, if the pipeline keeps some back
    README.md      the model card
    report.html    the run on one page
    bom.cdx.json   the bill of materials (CycloneDX)
    prompts.json   which words its training prompts have, as hashes, for the drift test; unless texts are not shown
    smoke.json     recorded answers, which a server must reproduce before it takes traffic
    provenance.intoto.json  what it was made from, as SLSA provenance, if GRAFTLINE_SIGNING_KEY names a key
    manifest.json  every file with size and SHA-256, and the lineage
    model.sig      the signature (OpenSSF Model Signing), if GRAFTLINE_SIGNING_KEY names a key; written last

A candidate that did not pass is packaged too, for its report; publishing refuses its manifest. Each file is hashed and
compared with the digests in the scores, so that only what was scored and judged is packaged.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.adapters.peft_format import AdapterWeights, load_exact
from graftline.data.preparation import EVALUATION, RESERVE, TRAINING
from graftline.data.row_file import RowFile
from graftline.data.rows import read_rows
from graftline.data.template import encode_prompt
from graftline.digest import Digest, copy_file, of_file, of_folder, of_json, sync_tree
from graftline.errors import EvaluationError, ReleaseError
from graftline.evaluate.scores import CANDIDATE, Scores, against
from graftline.evaluate.verdict import TOKENIZER_FILES, Verdict, verdict_from_dict
from graftline.logs import Reporter
from graftline.plan.stage_memory import check_stage
from graftline.registry.binding import BASE, check_binding, judged_against
from graftline.release.card import BomData, CardData, License, write_bom, write_card
from graftline.release.manifest import AnchorVerdict, GateVerdict, Judged, Lineage, describe, write_manifest
from graftline.release.pages import run_page
from graftline.release.pages.report import write_report
from graftline.release.provenance import ProvenanceData, write_provenance
from graftline.release.signing import sign_folder
from graftline.serve.smoke import SMOKE_FILE, record
from graftline.train.devices import resolve_device
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer, read_config
from graftline.workflow import resolve, scored
from graftline.workflow.drift_profile import PROMPTS_FILE, write_prompts
from graftline.workflow.git import GitError, git
from graftline.workflow.judging import judge_scores, judged_files
from graftline.workflow.pinned_base import original_base, trained_base
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")

SIGNING_KEY = "GRAFTLINE_SIGNING_KEY"
"""Environment variable with the path of the private key that signs packages."""
_NUM_RECORDED = 8


def assemble_package(pipeline: settings.Pipeline, at: Workspace, *, out: Path) -> None:
    """Assemble the package in ``out``, replacing an earlier one, and write its manifest.

    Raises:
        EvaluationError: the files in ``runs/`` are not those that were scored or judged.
        ReleaseError: the adapter was not trained on this base.
    """
    check_stage("package", pipeline, read_config(original_base(pipeline.base, at)))
    created = datetime.now(UTC).replace(microsecond=0)
    if out.exists():
        shutil.rmtree(out)
    scores = scored.read_all(pipeline.base, at)
    verdict, candidate = _check_verdict(pipeline, at, scores), scored.of_candidate(scores)
    assert candidate.adapter is not None  # read_all compared it with the one in train/
    base = trained_base(pipeline.base, at)
    _collect(at.runs, base, out)
    lineage = _lineage(pipeline, at, base, scores[CANDIDATE].measured_by)
    _record_answers(pipeline, base, at.runs, out)
    if pipeline.package.show_texts:
        write_prompts(RowFile(at.runs / "fetch" / TRAINING), out / PROMPTS_FILE)
    data = run_page.collect(at.name, pipeline, at.runs, created=created, lineage=lineage)
    write_report(out / "report.html", data)
    card = _card(pipeline, at, data.metrics, lineage, verdict)
    write_card(out, card)
    write_bom(out, _bom(card, lineage, created, out))
    if key := os.environ.get(SIGNING_KEY):
        write_provenance(out, _provenance(card, at, lineage, created, out), Path(key))
    manifest = describe(
        out,
        pipeline=at.name,
        created=created,
        lineage=lineage,
        verdict=verdict,
        judged=Judged(adapter=candidate.adapter, tokenizer=candidate.tokenizer, rows=candidate.rows),
        on_progress=Reporter("hash", "files"),
    )
    check_binding(manifest, lambda path: (out / path).read_bytes())
    sync_tree(out)  # the manifest vouches for files that outlive a power loss
    write_manifest(out, manifest)
    if key:
        sign_folder(out, Path(key))
    signed = "signed" if key else f"not signed: {SIGNING_KEY} names no key, so it can be released but not promoted"
    logger.info("package of %d files, %.1f MB, %s", len(manifest.files), manifest.num_bytes / 1e6, signed)


def _record_answers(pipeline: settings.Pipeline, base: Path, runs: Path, out: Path) -> None:
    """Record answers of the judged model, which the server must reproduce before it takes traffic.

    Always in fp32 arithmetic: a server in fp32 must give the very same tokens.
    """
    template, device = pipeline.base.template, resolve_device(pipeline.train.device)
    tokenizer, rows = load_tokenizer(base), read_rows(runs / "fetch" / EVALUATION)[:_NUM_RECORDED]
    prompts = [encode_prompt(row, tokenizer, template=template) for row in rows]
    model = load_exact(base, runs / "train" / "adapter", device=device)
    record(model, prompts, out / SMOKE_FILE)


def _collect(runs: Path, base: Path, out: Path) -> None:
    shutil.copytree(runs / "train" / "adapter", out / "adapter", copy_function=_link)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            copy_file(base / name, out / "adapter" / name)
    if (runs / "merge" / "model").is_dir():
        shutil.copytree(runs / "merge" / "model", out / "merged", copy_function=_link)
    if (runs / "fetch" / RESERVE).is_dir():
        shutil.copytree(runs / "fetch" / RESERVE, out / RESERVE, copy_function=_copy)
    shutil.copytree(runs / "evaluate" / "scores", out / "evaluation", copy_function=_copy)
    for stage_name, name in (("gate", "verdict.json"), ("gate", "verdict.md"), ("merge", "parity.json")):
        copy_file(runs / stage_name / name, out / "evaluation" / name)


def _link(source: str, target: str) -> str:
    """Hard-link where the file system can: large files are never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        _copy(source, target)
    return target


def _copy(source: str, target: str) -> str:
    copy_file(Path(source), Path(target))
    return target


def _check_verdict(pipeline: settings.Pipeline, at: Workspace, scores: Mapping[str, Scores]) -> GateVerdict:
    """The gate stage's verdict; EvaluationError if the gates now judge the scores differently."""
    path = at.folder("gate") / "verdict.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    verdict = verdict_from_dict(record)
    files, again = judged_files(at), judge_scores(pipeline, at, scores)
    if record.get("judged") != files or _outcomes(verdict) != _outcomes(again):
        raise EvaluationError(
            f"{path} says {verdict.outcome} of {record.get('judged')}, the gates now say {again.outcome} of {files}: "
            f"it belongs to other scores or was changed; judge again: "
            f"dvc repro --force --single-item gate@{at.name}"
        )
    release = judged_against(verdict, against(scores))
    return GateVerdict(
        outcome=verdict.outcome,
        against=release.version if release else BASE,
        digest=of_file(path),
        release=release.digest if release else None,
        anchor=AnchorVerdict(**vars(verdict.anchor)) if verdict.anchor else None,
    )


def _outcomes(verdict: Verdict) -> Mapping[str, str]:
    """Outcomes by gate, without numbers, whose last digits may differ on another machine."""
    anchor = {} if verdict.anchor is None else {"anchor moves": str(verdict.anchor.is_better)}
    return {gate.name: gate.outcome for gate in verdict.gates} | {"": verdict.outcome} | anchor


def _lineage(pipeline: settings.Pipeline, at: Workspace, base: Path, measured_by: Mapping[str, str]) -> Lineage:
    identity = read_identity(base)
    adapter = AdapterWeights.open(at.folder("train") / "adapter").identity
    if adapter is None or adapter.template_digest is None or not identity.is_called(adapter.base_digest):
        raise ReleaseError("the adapter does not belong to the base at hand; run the train stage again")
    start = resolve.load(at).get("settings", {}).get("train", {}).get(resolve.START) or {}
    lock = at.root / "dvc.lock"
    config = {"pipeline": pipeline.model_dump(mode="json"), "sources": run_page.sources(at.runs)}
    if measured_by:
        config["measured_by"] = dict(measured_by)
    return Lineage(
        base_digest=identity.digest,
        source_digest=identity.source_digest,
        quantizer_digest=of_json(identity.quantizer) if identity.quantizer else None,
        data_digest=of_file(at.folder("fetch") / "data.json"),
        template_digest=adapter.template_digest,
        config_digest=of_json(config),
        dvc_lock_digest=of_file(lock) if lock.is_file() else None,
        code_revision=_code_revision(at.root),
        trust_remote_code=False,
        parent_version=start.get("version"),
        parent_digest=Digest.parse(start["release"]) if start.get("version") else None,
    )


def _code_revision(root: Path) -> str:
    try:
        revision = git(root, "rev-parse", "HEAD").strip()
        return f"{revision}-dirty" if git(root, "status", "--porcelain", "--untracked-files=no").strip() else revision
    except GitError as error:
        logger.warning("the release will say `code_revision: unknown`, because git says: %s", error)
        return "unknown"


def _card(
    pipeline: settings.Pipeline, at: Workspace, metrics: tuple[Any, ...], lineage: Lineage, verdict: GateVerdict
) -> CardData:
    sources, counts = run_page.sources(at.runs), run_page.count_rows(at.runs)
    trained = run_page.stage_cost(at.runs, "train")
    licenses = [
        License(of=what, name=name)
        for what, name in (("base model", pipeline.base.license), ("training data", pipeline.data.license))
        if name
    ]
    return CardData(
        pipeline=at.name,
        base_model=sources["base"]["source"],
        method=run_page.method(pipeline.adapter),
        task=f"pipeline {at.name}",
        outcome=verdict.outcome,
        against=verdict.against,
        licenses=tuple(licenses),
        metrics=metrics,
        dataset=sources["data"]["source"],
        num_training_rows=counts["train"],
        num_evaluation_rows=counts["evaluation"],
        judged_by=run_page.judged_by(pipeline.data, at.runs),
        lineage=tuple((name, str(value)) for name, value in lineage if isinstance(value, Digest)),
        files=(
            ("adapter/", "the adapter in PEFT's format, with the tokenizer"),
            ("evaluation/", "scores by item and the verdict"),
            ("report.html", "the run on one page"),
        ),
        training_seconds=trained["seconds"],
        energy_watt_hours=trained.get("energy_watt_hours"),
        energy_source=trained.get("energy_source", ""),
        money=run_page.money(pipeline.prices, at.runs),
        notes=run_page.notes(at.runs),
    )


def _provenance(card: CardData, at: Workspace, lineage: Lineage, created: datetime, out: Path) -> ProvenanceData:
    return ProvenanceData(
        pipeline=card.pipeline,
        created=created,
        files=of_folder(out),
        lineage=lineage,
        base=card.base_model,
        rows=card.dataset,
        code=of_json(resolve.load(at).get("code", {})),
    )


def _bom(card: CardData, lineage: Lineage, created: datetime, out: Path) -> BomData:
    licenses = {entry.of: entry for entry in card.licenses}
    return BomData(
        pipeline=card.pipeline,
        created=created,
        base_model=card.base_model,
        base_digest=lineage.base_digest,
        method=card.method,
        dataset=card.dataset,
        data_digest=lineage.data_digest,
        files=of_folder(out),
        base_license=licenses.get("base model"),
        data_license=licenses.get("training data"),
    )
