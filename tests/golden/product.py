"""Everything that the record uses of the product. When modules move, this is the one file of tests/golden to change."""

import contextlib
import importlib
import io
import json
import runpy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer.main

from graftline import settings
from graftline.cli import main
from graftline.cli.application import app
from graftline.digest import Digest, of_bytes
from graftline.errors import GraftlineError
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Scores
from graftline.evaluate.verdict import verdict_markdown, verdict_to_dict
from graftline.registry.keys import KeyRing
from graftline.registry.promotion import PromotionChecks, PromotionRequest, promote, rollback
from graftline.registry.releases import publish
from graftline.registry.store import Store, open_store
from graftline.release.card import CardData, License, render_card
from graftline.release.manifest import GateVerdict, Lineage, describe, write_manifest
from graftline.release.pages.report import (
    Confusion,
    Gate,
    LossPoint,
    MemoryPart,
    MetricRow,
    ReportData,
    StageCost,
    render_report,
)
from graftline.release.signing import create_key, sign_folder
from graftline.serve.app import AccessRules, Server, create_app
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Base, Runtime
from graftline.workflow.workspace import Workspace

__all__ = [
    "AnswerScore",
    "Approvals",
    "CardData",
    "Channel",
    "Confusion",
    "DocumentScore",
    "Gate",
    "GateVerdict",
    "GraftlineError",
    "ItemScore",
    "KeyRing",
    "License",
    "Lineage",
    "LossPoint",
    "MemoryPart",
    "MetricRow",
    "PromotionChecks",
    "PromotionRequest",
    "ReportData",
    "Scores",
    "StageCost",
    "Store",
    "create_key",
    "digest",
    "make_package",
    "open_store",
    "promote",
    "publish",
    "render_card",
    "render_report",
    "rollback",
    "schema",
    "sign_folder",
]

FLOWS = ("evaluate_pr", "nightly", "promote", "retrain", "sweep", "watch")
"""Flows whose command line takes ``--help``."""
STAGES = ("resolve", "fetch", "validate", "init", "train", "evaluate", "merge", "gate", "package")
"""The line up to the package, in its order."""
COMMANDS = (
    *(f"flows.{name}" for name in FLOWS),
    *(f"tasks.{name}" for name in STAGES[1:]),
    *(f"graftline.workflow.{name}" for name in ("packages", "plan", "resolve")),
    "graftline.workflow.recommend",
)
"""Modules that are run with ``python -m``."""
Approvals, Channel, schema = settings.Approvals, settings.Channel, settings.schema


def run_stages(root: Path, pipeline: str, stages: Sequence[str]) -> None:
    """Run stages in this process, as DVC would in processes of their own; each is said to have cost the same."""
    section, at = settings.load(root / settings.DEFAULT_FILE).pipeline(pipeline), Workspace(root, pipeline)
    cost = {"seconds": 1.0, "peak_rss_mb": 100, "energy_watt_hours": 0.1, "energy_source": "recorded"}
    for stage in stages:
        package = "graftline.workflow" if stage == "resolve" else "tasks"
        importlib.import_module(f"{package}.{stage}").run(section, at)
        if (folder := at.folder(stage)).is_dir():
            (folder / "stage.json").write_text(json.dumps(cost), encoding="utf-8")


def verbs() -> list[list[str]]:
    """Every verb of ``graftline`` with its groups before it, the bare command first."""

    def walk(command: Any, path: list[str]) -> Iterator[list[str]]:
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*path, name])

    return list(walk(typer.main.get_command(app), []))


def graftline(*arguments: str) -> str:
    """What a command prints on standard output."""
    return _printed(["graftline", *arguments], main)


def help_of(module: str) -> str:
    """What ``python -m MODULE --help`` prints."""

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported already
            runpy.run_module(module, run_name="__main__")

    return _printed([f"{module.rpartition('.')[2]}.py", "--help"], run)


def _printed(argv: list[str], run: Any) -> str:
    before, out = sys.argv, io.StringIO()
    try:
        sys.argv = argv
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            run()
    finally:
        sys.argv = before
    return out.getvalue()


def digest(data: bytes) -> Digest:
    """SHA-256."""
    return of_bytes(data)


def verdict(gates: Mapping[str, Any], candidate: Scores, references: Mapping[str, Scores]) -> tuple[Any, str]:
    """A verdict as JSON values and as Markdown; ``gates`` as in pipelines.yaml."""
    found = judge({name: settings.Gate(**gate) for name, gate in gates.items()}, candidate, references)
    return verdict_to_dict(found), verdict_markdown(found)


def make_package(folder: Path, *, created: datetime, lineage: Lineage, verdict: GateVerdict) -> bytes:
    """Describe a folder's files; the bytes of its manifest."""
    write_manifest(folder, describe(folder, pipeline="demo", created=created, lineage=lineage, verdict=verdict))
    return (folder / "manifest.json").read_bytes()


def application(base: Path, adapters: Mapping[str, Path], *, graphs: Path, loadable: Path, token: str) -> Any:
    """The server's ASGI application over one base and its adapters."""
    catalog = Catalog()
    catalog.add_base("tiny", Base(base, Runtime(graphs=graphs, num_threads=1, max_adapters=3)))
    for name, folder in adapters.items():
        catalog.load_adapter(name, folder)
    access = AccessRules(
        tokens=(token,), admin_tokens=(f"{token}-admin",), adapter_folder=loadable, max_body_bytes=20_000
    )
    return create_app(Server(catalog, Scheduler(Limits(max_batch=4, max_waiting=8, piece_tokens=32)), None, access))
