"""The merge stage where its model is quantized again: the rounding reads training rows, and depends on them."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline.data.preparation import TRAINING
from graftline.merge.choice import MergeOutcome, MergePlan
from graftline.workflow import merging, resolve
from tasks import fetch, init, merge, train, validate
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings


def opened_with(root: Path, **package: Any) -> Opened:
    pipeline = tiny_settings()
    pipeline["data"]["evaluation_rows"] = pipeline["gates"]["accuracy"]["min_items"] = 10
    pipeline["quantize"] = {"method": "nf4"}
    pipeline["train"] |= {"steps": 1, "held_out_rows": 20, "evaluate_every": 1}
    pipeline["package"] = {"merged": True, "dtype": "float32", "requantize": True} | package
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    return open_pipeline(PIPELINE, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project behind the stage train."""
    folder = tmp_path_factory.mktemp("project")
    make_tiny_llama(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)), encoding="utf-8")
    opened = opened_with(folder)
    for stage in (resolve, fetch, validate, init, train):
        stage.run(*opened)
    return folder


def test_the_rounding_is_fitted_to_training_rows_that_did_not_choose_the_adapter(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[MergePlan] = []
    run = merging.merge_by_evidence

    def noting(*paths: Path, plan: MergePlan, **options: Any) -> Any:
        plans.append(plan)
        return run(*paths, plan=plan, **options)

    monkeypatch.setattr(merging, "merge_by_evidence", noting)
    opened = opened_with(root)
    merge.run(*opened)
    num_training = len((opened.at.folder("fetch") / TRAINING).read_text(encoding="utf-8").splitlines())
    assert len(plans[0].calibration or ()) == num_training - 20
    found = json.loads((opened.at.folder("merge") / "parity.json").read_text(encoding="utf-8"))["requantized"]
    assert found["rounding"] == "compensated"
    assert found["parity"]["num_sequences"] == 10


def test_the_nearest_codes_need_no_rows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[MergePlan] = []

    def noting(*paths: Path, plan: MergePlan, **options: Any) -> MergeOutcome:
        plans.append(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "merge_by_evidence", noting)
    for package in ({"rounding": "nearest"}, {"requantize": False}):
        with pytest.raises(KeyboardInterrupt):
            merge.run(*opened_with(root, **package))
    assert [plan.calibration for plan in plans] == [None, None]
