"""`graftline doctor` says which gates an equal candidate would often fail, and what would do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftline.digest import of_bytes
from graftline.doctor import Finding, project
from graftline.evaluate.verdict import GateResult, Verdict, verdict_to_dict
from graftline.registry.releases import publish
from graftline.registry.reserve import Looker, count_look
from graftline.registry.store import open_store
from graftline.release.manifest import Judged, describe, write_manifest
from graftline.settings import load
from tests.registry.entries import put_in
from tests.release.packages import CREATED, LINEAGE, VERDICT, write_files
from tests.settings.documents import changed

RATE: dict[str, Any] = {
    "metric": "accuracy",
    "direction": "higher",
    "test": "non-inferiority",
    "margin": 0.02,
    "against": "production",
}
MEAN: dict[str, Any] = {
    "metric": "nll",
    "direction": "lower",
    "test": "non-inferiority",
    "margin": 0.1,
    "against": "production",
}
LIMIT: dict[str, Any] = {"metric": "option_stop_rate", "direction": "higher", "test": "limit", "limit": 0.9}


def look(folder: Path, gates: dict[str, Any], verdict: Verdict | None = None, rows: int = 300) -> list[Finding]:
    path = folder / "pipelines.yaml"
    path.write_bytes(changed(**{"demo.gates": gates, "demo.data.evaluation_rows": rows}))
    last = folder / "verdict.json"
    if verdict is not None:
        last.write_text(json.dumps(verdict_to_dict(verdict)), encoding="utf-8")
    return list(project.look_at_gates("demo", load(path).pipeline("demo"), last))


def result(**more: Any) -> GateResult:
    values: dict[str, Any] = RATE | {"name": "accuracy", "outcome": "pass", "reason": "", "limit": None, "alpha": 0.05}
    return GateResult(**values | {"min_items": 100, "num_items": 300, "power": 0.9} | more)


def test_a_margin_too_narrow_for_its_rows_is_noted_with_what_would_do(tmp_path: Path) -> None:
    (found,) = look(tmp_path, {"accuracy": RATE})
    assert (found.name, found.status) == ("gate demo/accuracy", "note")
    assert "passes this gate 40% of the time; a margin of 0.035 with 300 items or about 8" in found.found
    assert "if it answers 5% of the items differently" in found.found
    assert "data.evaluation_rows" in found.advice


@pytest.mark.parametrize(("margin", "rows"), [(0.05, 300), (0.02, 900)])
def test_the_margin_or_the_rows_that_it_names_are_enough(tmp_path: Path, margin: float, rows: int) -> None:
    (found,) = look(tmp_path, {"accuracy": RATE | {"margin": margin}}, rows=rows)
    assert found.status == "ok"


def test_a_mean_is_known_after_a_run(tmp_path: Path) -> None:
    (found,) = look(tmp_path, {"likelihood": MEAN})
    assert found.status == "ok"
    assert "is known after a run, which shows how much nll differs" in found.found
    after = result(name="likelihood", metric="nll", direction="lower", margin=0.1, power=0.3, power_items=900)
    (found,) = look(tmp_path, {"likelihood": MEAN}, Verdict("pass", (after,)))
    assert found.status == "note"
    assert (
        "30% of the time; about 900 items with the margin of 0.1 would make it 8 of 10 (by the last run)" in found.found
    )


def test_the_last_run_counts_only_for_a_gate_that_asks_the_same(tmp_path: Path) -> None:
    verdict = Verdict("pass", (result(),))
    assert look(tmp_path, {"accuracy": RATE}, verdict)[0].status == "ok"
    assert look(tmp_path, {"accuracy": RATE | {"margin": 0.01}}, verdict)[0].status == "note"
    assert look(tmp_path, {"accuracy": RATE}, verdict, rows=200)[0].status == "note"
    assert look(tmp_path, {"accuracy": RATE}, Verdict("pass", (replace(result(), power=None),)))[0].status == "note"


def test_a_verdict_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text("{", encoding="utf-8")
    assert look(tmp_path, {"accuracy": RATE})[0].status == "note"


def test_gates_that_an_equal_candidate_need_not_pass_are_left_out(tmp_path: Path) -> None:
    assert look(tmp_path, {"stops": LIMIT, "better": RATE | {"test": "superiority"}}) == []


def promote(root: Path, seed: str, rows: bytes) -> None:
    """A release into production that was judged by these rows."""
    store, folder, any_digest = open_store(str(root / "store")), root / f"package-{seed}", of_bytes(b"any")
    write_files(folder, seed)
    judged = Judged(adapter=any_digest, tokenizer=any_digest, rows=of_bytes(rows))
    described = describe(folder, pipeline="demo", created=CREATED, lineage=LINEAGE, verdict=VERDICT, judged=judged)
    write_manifest(folder, described)
    put_in(store, publish(store, folder))


def test_rows_that_only_promotions_look_at_are_noted_once_they_looked_often(tmp_path: Path) -> None:
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    store = open_store(str(tmp_path / "store"))
    by = Looker(pipeline="demo", rows=of_bytes(b"reserve"), version="v", channel="production", actor="ci")
    for _ in range(9):
        count_look(store, by, known=[], now=CREATED)
    (found,) = [one for one in project.look_at_channels(tmp_path) if one.name == "reserve demo"]
    assert (found.status, found.advice) == ("ok", "")
    assert "looked at 9 times" in found.found
    count_look(store, by, known=[], now=CREATED)
    (found,) = [one for one in project.look_at_channels(tmp_path) if one.name == "reserve demo"]
    assert (found.status, bool(found.advice)) == ("note", True)
    assert "looked at 10 times" in found.found


def test_rows_that_have_let_in_ten_releases_are_noted_until_others_judge(tmp_path: Path) -> None:
    (tmp_path / "pipelines.yaml").write_bytes(changed())

    def notes() -> list[str]:
        return [found.found for found in project.look_at_channels(tmp_path) if found.status == "note"]

    for number in range(project.MOST_LOOKS - 1):
        promote(tmp_path, f"{number}", b"rows")
    assert notes() == []
    promote(tmp_path, "tenth", b"rows")
    assert len(notes()) == 1
    assert f"the same evaluation rows ({of_bytes(b'rows').short}) have let in the newest 10 releases" in notes()[0]
    promote(tmp_path, "eleventh", b"newer rows")
    assert notes() == []
