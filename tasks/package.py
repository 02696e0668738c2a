"""Stage package: one folder with all that a release needs.

    adapter/       the adapter in PEFT's format, its graftline.json, the tokenizer with its template
    merged/        the merged model, where the pipeline asks for one
    evaluation/    scores by item, the verdict
    README.md      the model card
    report.html    the run on one page
    manifest.json  every file with size and SHA-256, and what all of it was made from; written last

``report.html`` is also made for a candidate that did not pass: the release stage refuses its manifest.
"""

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftline.adapters.peft_format import AdapterWeights
from graftline.checkpoint.identity import BaseIdentity, read_identity
from graftline.digest import Digest, of_file, of_json
from graftline.errors import ReleaseError
from graftline.progress import Reporter
from graftline.release.card import CardData, License, write_card
from graftline.release.manifest import GateVerdict, Lineage, describe, write_manifest
from graftline.release.report import write_report
from tasks import report_data, resolve, stage
from tasks.base import trained_base
from tasks.stage import Context

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)


def run(context: Context) -> None:
    """Assemble the package and describe it."""
    out, created = context.folder("package"), datetime.now(UTC).replace(microsecond=0)
    if out.exists():
        shutil.rmtree(out)
    _collect(context, out)
    lineage = _lineage(context)
    data = report_data.collect(context, created, lineage)
    write_report(out / "report.html", data)
    write_card(out, _card(context, data.metrics, lineage))
    verdict = _verdict(context)
    manifest = describe(
        out,
        pipeline=context.name,
        created=created,
        lineage=lineage,
        verdict=verdict,
        on_progress=Reporter("hash", "files"),
    )
    write_manifest(out, manifest)
    stage.logger.info("package of %d files, %.1f MB", len(manifest.files), manifest.num_bytes / 1e6)


def _collect(context: Context, out: Path) -> None:
    shutil.copytree(context.folder("train") / "adapter", out / "adapter", copy_function=_link)
    base = trained_base(context)
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / "adapter" / name)
    if context.pipeline.package.merged:
        shutil.copytree(context.folder("merge") / "model", out / "merged", copy_function=_link)
    shutil.copytree(context.folder("evaluate") / "scores", out / "evaluation")
    for name in ("verdict.json", "verdict.md"):
        shutil.copyfile(context.folder("gate") / name, out / "evaluation" / name)


def _link(source: str, target: str) -> str:
    """Large files are never changed in place, so a hard link serves where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _verdict(context: Context) -> GateVerdict:
    path = context.folder("gate") / "verdict.json"
    champion = resolve.load(context)["champion"]["version"]
    return GateVerdict(
        outcome=json.loads(path.read_text())["outcome"], against=champion or "base", digest=of_file(path)
    )


def _lineage(context: Context) -> Lineage:
    identity: BaseIdentity = read_identity(trained_base(context))
    adapter = AdapterWeights.open(context.folder("train") / "adapter").identity
    if adapter is None or adapter.template_digest is None or adapter.base_digest != identity.digest:
        raise ReleaseError("the adapter does not belong to the base at hand; run the train stage again")
    lock = context.root / "dvc.lock"
    config = {"pipeline": context.pipeline.model_dump(mode="json"), "resolved": resolve.load(context)}
    return Lineage(
        base_digest=identity.digest,
        source_digest=identity.source_digest,
        quantizer_digest=of_json(identity.quantizer) if identity.quantizer else None,
        data_digest=of_file(context.folder("fetch") / "data.json"),
        template_digest=adapter.template_digest,
        config_digest=of_json(config),
        dvc_lock_digest=of_file(lock) if lock.is_file() else None,
        code_revision=_code_revision(context.root),
        trust_remote_code=False,
    )


def _code_revision(root: Path) -> str:
    try:
        revision = _git(root, "rev-parse", "HEAD")
        return f"{revision}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def _card(context: Context, metrics: tuple[Any, ...], lineage: Lineage) -> CardData:
    pipeline, verdict = context.pipeline, _verdict(context)
    counts = report_data.count_rows(context)
    licenses = [
        License(of=what, name=name)
        for what, name in (("base model", pipeline.base.license), ("training data", pipeline.data.license))
        if name
    ]
    return CardData(
        pipeline=context.name,
        base_model=resolve.load(context)["sources"]["base"]["source"],
        method=report_data.method(context),
        task=f"pipeline {context.name}",
        outcome=verdict.outcome,
        against=verdict.against,
        licenses=tuple(licenses),
        metrics=metrics,
        dataset=resolve.load(context)["sources"]["data"]["source"],
        num_training_rows=counts["train"],
        num_evaluation_rows=counts["evaluation"],
        lineage=tuple((name, str(value)) for name, value in lineage if isinstance(value, Digest)),
        files=(
            ("adapter/", "the adapter in PEFT's format, with the tokenizer"),
            ("evaluation/", "scores by item and the verdict"),
            ("report.html", "the run on one page"),
        ),
        training_seconds=report_data.stage_cost(context, "train")["seconds"],
    )


def main() -> None:
    """Command line."""
    stage.main("package", run, measure=False)


if __name__ == "__main__":
    main()
