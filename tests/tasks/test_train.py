"""The train stage on a tiny project: what it trains on, what it looks at, what it leaves."""

import json
from pathlib import Path

import pytest

import graftline.train.adapter as training
from graftline.adapters.weights import AdapterWeights
from graftline.data.columns import columns_of
from graftline.data.preparation import TRAINING
from graftline.data.row_file import RowFile
from graftline.data.template import Encoded
from graftline.errors import DataError
from graftline.plan.pipeline import trained_and_held_out
from graftline.train.results import TrainResult
from graftline.workflow import resolve
from tasks import fetch, init, train
from tests.line.project import ROOT, write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_tiny_llama(root / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(200)))
    opened = _open(root)
    for stage in (resolve, fetch, init):
        stage.run(*opened)
    return root


def _open(root: Path, **changes: object) -> Opened:
    pipeline = tiny_settings()
    pipeline["data"]["evaluation_rows"] = pipeline["gates"]["accuracy"]["min_items"] = 40
    pipeline["train"] |= changes
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    return open_pipeline(PIPELINE, root)


def test_rows_held_out_of_the_training_rows_choose_the_best_adapter_and_stop_early(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Encoded]] = {}
    library, look = training.train, training.held_out_loss

    def spy(model: object, rows: list[Encoded], **given: object) -> TrainResult:
        seen["trained"] = rows
        return library(model, rows, **given)

    def spy_look(rows: list[Encoded], *given: object) -> object:
        seen["held out"] = rows
        return look(rows, *given)

    monkeypatch.setattr(training, "train", spy)
    monkeypatch.setattr(training, "held_out_loss", spy_look)
    opened = _open(
        project, steps=40, learning_rate=1.0, evaluate_every=2, patience=2, held_out_rows=30, report_to=["dvclive"]
    )
    train.run(*opened)

    trained, held_out = ({tuple(row.input_ids) for row in seen[name]} for name in ("trained", "held out"))
    assert (len(seen["trained"]), len(seen["held out"])) == (130, 30)
    assert not trained & held_out
    out = opened.at.folder("train")
    metrics, history = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "history"))
    looks = {point["step"]: point["held_out_loss"] for point in history if "held_out_loss" in point}
    assert list(looks) == list(range(2, metrics["steps"] + 1, 2))
    assert metrics["steps"] < 40  # a learning rate this high soon does harm
    assert metrics["best_step"] == min(looks, key=looks.__getitem__) == metrics["steps"] - 4
    assert metrics["held_out_loss"] == min(looks.values())
    table = opened.at.runs / "trackers/dvclive/plots/metrics/eval/loss.tsv"
    assert [float(line.split("\t")[1]) for line in table.read_text().splitlines()[1:]] == list(looks.values())


def test_without_looks_every_training_row_is_trained_on(project: Path) -> None:
    opened = _open(project, steps=2)
    train.run(*opened)
    metrics = json.loads((opened.at.folder("train") / "metrics.json").read_text())
    assert "best_step" not in metrics
    assert metrics["tokens"] > 0


def test_more_held_out_rows_than_training_rows_name_the_key(project: Path) -> None:
    with pytest.raises(DataError, match=r"train\.held_out_rows is 160, but there are 160 rows"):
        train.run(*_open(project, evaluate_every=2, held_out_rows=160))


@pytest.mark.slow
def test_two_processes_of_one_training_give_the_adapter_of_one_with_twice_the_rows(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    losses = []
    for changes in ({"batch_size": 8}, {"batch_size": 4, "processes": 2, "sharding": True}):
        opened = _open(project, steps=3, **changes)
        train.run(*opened)
        losses.append([point["loss"] for point in json.loads((opened.at.folder("train") / "history.json").read_text())])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(AdapterWeights.open(opened.at.folder("train") / "adapter").modules()) == 14


def test_a_training_that_starts_again_reads_no_row_to_know_those_that_are_held_out(
    project: Path, tmp_path: Path
) -> None:
    pipeline, at = _open(project, evaluate_every=2, held_out_rows=20)
    file, gone = RowFile(at.folder("fetch") / TRAINING), RowFile(tmp_path / "gone.jsonl")
    whole = columns_of([Encoded([1, 2], [False, True])] * 160)

    def numbers(rows: RowFile) -> list[list[int]]:
        return [part.tolist() for part in trained_and_held_out(pipeline, rows, whole, cache=tmp_path)]

    first = numbers(file)
    assert list(map(len, first)) == [140, 20]
    assert sorted(first[0] + first[1]) == list(range(160))
    assert numbers(gone) == first
    (kept,) = tmp_path.glob("*/held_out.npy")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert numbers(file) == numbers(gone) == first
    pipeline = pipeline.model_copy(update={"train": pipeline.train.model_copy(update={"held_out_rows": 21})})
    with pytest.raises(FileNotFoundError):
        numbers(gone)
