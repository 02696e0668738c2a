"""The base in the cache that all pipelines share."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import graftline.workflow.pinned_base
from graftline.weights.identity import read_identity
from graftline.workflow import resolve
from graftline.workflow.pinned_base import base_folder
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings


def test_pipelines_that_start_at_once_convert_their_base_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_llama(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)))
    write_yaml(tmp_path, {"pipelines": {PIPELINE: tiny_settings()}, "channels": {"production": {}}})
    opened = open_pipeline(PIPELINE, tmp_path)
    resolve.run(*opened)
    sha256 = resolve.load(opened.at)["sources"]["base"]["sha256"]
    started, conversions, library = threading.Barrier(2), [], graftline.workflow.pinned_base.import_base

    def slowly(*given: Any, **options: Any) -> object:
        conversions.append(1)
        time.sleep(0.3)  # long enough for the other one to begin too, if it could
        return library(*given, **options)

    def ask() -> Path:
        started.wait()
        return base_folder(opened.pipeline.base, sha256, opened.at)

    monkeypatch.setattr(graftline.workflow.pinned_base, "import_base", slowly)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask) for _ in range(2)]
        first, second = (future.result() for future in asked)
    assert first == second
    assert len(conversions) == 1
    assert read_identity(first).digest
