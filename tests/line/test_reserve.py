"""Rows that only promotions look at, from the split to the channel's entry: two releases of a tiny model."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from graftline.cli import main
from graftline.data.rows import read_rows
from graftline.digest import of_file, write_json
from graftline.registry import channel, reserve
from graftline.registry.store import open_store
from graftline.workflow import resolve
from tasks import evaluate, fetch, gate, init, merge, package, release, train, validate
from tests.line.project import write_yaml
from tests.registry.people import People
from tests.tiny import make_tiny_llama
from tests.workflow.opened import open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STAGES = (resolve, fetch, validate, init, train, evaluate, merge, gate)


def line(folder: Path, **train_settings: Any) -> str:
    """Make a release; its version."""
    pipeline = tiny_settings()
    pipeline["data"] |= {"evaluation_rows": 40, "reserve_rows": 60}
    pipeline["train"] |= {"steps": 4, "batch_size": 8, "checkpoint_every": 0} | train_settings
    pipeline["gates"]["accuracy"] |= {"margin": 0.9, "min_items": 40}
    pipeline["guards"] = {"stops": "off", "training": "off", "likelihood": "off"}  # four steps teach little
    write_yaml(folder, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {"reserve": True}}})
    opened = open_pipeline(PIPELINE, folder)
    for part in STAGES:
        part.run(*opened)
        cost = {"seconds": 1.0, "peak_rss_mb": 1, "energy_watt_hours": 0.0, "energy_source": ""}
        write_json(opened.at.folder(part.__name__.rpartition(".")[2]) / "stage.json", cost)
    package.run(*opened)
    release.run(*opened)
    found: str = json.loads((opened.at.folder("release") / "release.json").read_text(encoding="utf-8"))["version"]
    return found


@pytest.mark.long
def test_two_releases_enter_the_channel_by_rows_that_nothing_else_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def graftline(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["graftline", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        told = capfd.readouterr()
        assert not ended.value.code, told.err
        return told.out

    make_tiny_llama(tmp_path / "base")
    rows = "".join(json.dumps(row) + "\n" for row in make_rows(160))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    people = People(tmp_path)
    (tmp_path / "keys.yaml").write_text(people.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFTLINE_SIGNING_KEY", str(people.private_key("bob")))
    monkeypatch.setenv("GRAFTLINE_CHANNEL_KEY", str(people.private_key("pia")))

    first = line(tmp_path)
    graftline("promote", PIPELINE, first, "--reason", "first")
    shutil.rmtree(tmp_path / "runs")  # as DVC does before it runs a stage again
    second = line(tmp_path, steps=5)
    assert "reserve: 'pass' in look 2" in graftline("promote", PIPELINE, second, "--reason", "nightly")

    runs, store = tmp_path / "runs" / PIPELINE, open_store(str(tmp_path / "store"))
    kept = runs / "fetch" / "reserve" / "evaluation.jsonl"
    entries = channel.read(store, PIPELINE, "production").entries
    found = [entry.change.reserve for entry in entries]
    assert [(one.look, one.against, one.rows) for one in found if one] == [
        (1, "base", of_file(kept)),
        (2, first, of_file(kept)),
    ]
    assert all(one and one.evidence.startswith("60 rows; accuracy: pass") for one in found)
    assert reserve.all_looks(store, PIPELINE) == {of_file(kept).hex: 2}

    # No prompt of theirs is in what the line made of the rows, but in the folder that travels with the release.
    prompts = [row.prompt.strip() for row in read_rows(kept)]
    assert len(prompts) == 60
    graftline("page", PIPELINE, "registry.html")
    graftline("pull", PIPELINE, second, "pulled")
    assert (tmp_path / "pulled" / reserve.ROWS).read_bytes() == kept.read_bytes()
    readable = {".json", ".jsonl", ".md", ".html", ".txt", ".svg"}
    made = [path for path in (*runs.rglob("*"), tmp_path / "registry.html") if path.suffix in readable]
    leaks = [path for path in made if "reserve" not in path.parts and _holds(path, prompts)]
    assert leaks == []
    assert "reserve: 'pass' in look 1" in graftline("history", PIPELINE)
    assert "reserve/evaluation.jsonl" not in graftline("diff", PIPELINE, first, second)
    assert "looked at 2 times" in (tmp_path / "registry.html").read_text(encoding="utf-8")


def _holds(path: Path, prompts: list[str]) -> bool:
    text = path.read_text(encoding="utf-8")
    return any(prompt in text for prompt in prompts)
