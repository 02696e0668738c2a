"""Cells are pipelines: checked like one, known again by what they say."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline import settings
from graftline.errors import ConfigError, GraftlineError
from graftline.workflow.sweep_cells import Overrides, SweepCell, grid, make_cells, read_results, result_path
from tests.line.project import write_yaml
from tests.workflow.tiny_project import PIPELINE, tiny_settings


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_yaml(tmp_path, {"pipelines": {PIPELINE: tiny_settings()}, "channels": {"production": {}}})
    return tmp_path


def cells(project: Path, variants: dict[str, Overrides], seeds: tuple[int, ...] = (0,)) -> list[SweepCell]:
    return make_cells(project, PIPELINE, variants, seeds)


def parsed(cell: SweepCell, threads: int | None = None) -> settings.Pipeline:
    return settings.parse_config(cell.document(threads=threads).encode(), Path("x")).pipeline(PIPELINE)


def test_a_grid_is_every_combination_by_name() -> None:
    assert grid({"adapter.rank": [4, 8], "adapter.method": ["lora"]}) == {
        "adapter.rank=4, adapter.method=lora": {"adapter.rank": 4, "adapter.method": "lora"},
        "adapter.rank=8, adapter.method=lora": {"adapter.rank": 8, "adapter.method": "lora"},
    }
    assert grid({}) == {"as it is": {}}


def test_a_cell_is_the_pipeline_with_its_keys_and_its_seed_changed(project: Path) -> None:
    (first, second) = cells(project, {"small": {"adapter.rank": 2, "train.lr_ratio_b": 16.0}}, (3, 4))
    assert (parsed(first).adapter.rank, parsed(first).train.lr_ratio_b, parsed(first).train.seed) == (2, 16.0, 3)
    assert parsed(second).train.seed == 4
    assert parsed(first).adapter.alpha == 8  # the rest stays
    assert first.name != second.name


def test_a_cell_is_known_by_what_it_says_not_by_what_it_is_called(project: Path) -> None:
    (one,), (other,) = cells(project, {"a": {"adapter.rank": 2}}), cells(project, {"b": {"adapter.rank": 2}})
    assert one.name == other.name


def test_threads_are_given_to_a_pipeline_that_names_none_and_do_not_make_another_cell(project: Path) -> None:
    document: dict[str, Any] = {"pipelines": {PIPELINE: tiny_settings()}, "channels": {"production": {}}}
    (named,) = cells(project, {"a": {}})
    assert parsed(named, threads=7).train.threads == 1
    del document["pipelines"][PIPELINE]["train"]["threads"]
    write_yaml(project, document)
    (unnamed,) = cells(project, {"a": {}})
    assert (parsed(unnamed, threads=7).train.threads, parsed(unnamed).train.threads) == (7, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter.rnak": 2}, r"bad, seed 0: .*adapter\.rnak: unknown key; did you mean `rank`"),
        ({"adapter.rank": "two"}, r"adapter\.rank: given \"two\"; expected a whole number"),
        ({"adapter.rank.deep": 2}, r"adapter\.rank\.deep: rank is not a section"),
        ({"train.seed": 2}, r"train\.seed is what the seeds set"),
    ],
)
def test_a_wrong_key_or_value_is_refused_before_anything_runs(
    project: Path, overrides: Overrides, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(project, {"bad": overrides})


def test_cells_are_scored_by_our_own_code_because_no_server_has_their_candidates(tmp_path: Path) -> None:
    pipeline = tiny_settings()
    own = json.loads(json.dumps(pipeline))
    pipeline["evaluate"]["engine"] = {"url": "http://127.0.0.1:8000/v1", "model": "pets-{adapter}"}
    limit = {"metric": "engine_label_agreement", "direction": "higher", "test": "limit", "limit": 0.9}
    pipeline["gates"]["engine"] = limit
    names = []
    for number, section in enumerate((pipeline, own)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_yaml(folder, {"pipelines": {PIPELINE: section}, "channels": {"production": {}}})
        (cell,) = cells(folder, {"a": {"adapter.rank": 2}})
        assert parsed(cell).evaluate.engine is None
        assert set(parsed(cell).gates) == set(own["gates"])
        names.append(cell.name)
    assert names[0] == names[1]
    with pytest.raises(ConfigError, match=r"a: evaluate\.engine\.model: no server has the candidates of a sweep"):
        cells(tmp_path / "0", {"a": {"evaluate.engine.model": "pets"}})


def test_two_variants_that_are_the_same_pipeline_are_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="'b' with seed 0 is the same pipeline as 'a' with seed 0"):
        cells(project, {"a": {"adapter.rank": 4}, "b": {"adapter.rank": 4}})


def test_results_that_are_there_are_read_and_broken_ones_named(project: Path) -> None:
    first, second = cells(project, {"a": {}}, (0, 1))
    result_path(project, first).parent.mkdir()
    result_path(project, first).write_text(json.dumps({"seed": 0}))
    assert read_results(project, [first, second]) == {first.name: {"seed": 0}}
    result_path(project, second).write_text("{")
    with pytest.raises(GraftlineError, match=r"is not JSON .*delete it, and the cell runs again"):
        read_results(project, [first, second])
