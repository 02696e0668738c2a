"""The init stage on a tiny project: where its start is calibrated, it reads training rows, and depends on them."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline.data.preparation import TRAINING
from graftline.weights.identity import read_identity
from graftline.workflow import resolve
from tasks import fetch, init, train
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_tiny_llama(folder / "base")
    return folder


def fetched(root: Path, init_as: Any, *, rows: int = 60, **train_as: Any) -> Opened:
    """The project behind the stage fetch."""
    pipeline = tiny_settings()
    pipeline["data"]["evaluation_rows"] = pipeline["gates"]["accuracy"]["min_items"] = 10
    pipeline["quantize"] = {"method": "nf2", "init": init_as, "loftq_iterations": 1}
    pipeline["adapter"]["method"] = "loftq"
    pipeline["train"] |= {"steps": 1} | train_as
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(rows)))
    opened = open_pipeline(PIPELINE, root)
    for stage in (resolve, fetch):
        stage.run(*opened)
    return opened


def base_record(opened: Opened) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((opened.at.folder("fetch") / "base.json").read_text())
    return found


def test_a_calibrated_base_and_its_adapter_pass_through_the_stages(root: Path) -> None:
    opened = fetched(root, {"kind": "loftq", "weighting": "full"})
    for stage in (init, train):
        stage.run(*opened)
    identity = read_identity(opened.at.folder("init") / "base")
    report = json.loads((opened.at.folder("init") / "base" / "quantization.json").read_text())
    adapter = json.loads((opened.at.folder("train") / "adapter" / "graftline.json").read_text())
    assert (identity.quantizer or {})["weighting"] == "full"
    assert all(layer["output_error"] < layer["output_error_plain"] for layer in report["layers"])
    assert adapter["initial_digest"] == str(identity.pair)


def test_what_init_depends_on_follows_the_rows_only_where_they_calibrate_it(root: Path) -> None:
    weighted = {"kind": "loftq", "weighting": "diagonal"}
    records = [
        base_record(fetched(root, start, rows=rows, **held_out))
        for start, rows, held_out in (
            ("loftq", 60, {}),
            ("loftq", 50, {}),
            (weighted, 60, {}),
            (weighted, 50, {}),
            (weighted, 60, {"held_out_rows": 10, "evaluate_every": 1}),
            (weighted, 60, {}),
        )
    ]
    assert records[0] == records[1]
    assert "calibration_rows" not in records[0]
    assert len({record["calibration_rows"] for record in records[2:]}) == 3
    assert records[2] == records[5]


def test_rows_that_choose_the_best_adapter_do_not_calibrate_its_start(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = fetched(root, {"kind": "loftq", "weighting": "diagonal"}, held_out_rows=20, evaluate_every=1)
    given: dict[str, Any] = {}
    monkeypatch.setattr("graftline.workflow.calibrating.init_base", lambda _, **kwargs: given.update(kwargs))
    init.run(*opened)
    num_training = len((opened.at.folder("fetch") / TRAINING).read_text().splitlines())
    assert len(given["rows"]) == num_training - 20
