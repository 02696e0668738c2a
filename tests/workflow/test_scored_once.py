"""Nothing is scored twice: not base and production by the next run, not a batch that was done when a run was killed.

The evaluate stage in this process, on a tiny base with a release in production.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

import graftline
from graftline.data.preparation import EVALUATION
from graftline.data.rows import read_rows
from graftline.digest import of_json
from graftline.errors import BaseMismatchError, EvaluationError
from graftline.evaluate import models
from graftline.evaluate.evaluation import EvaluationPlan, evaluate_model
from graftline.evaluate.kept import KeptScores
from graftline.evaluate.scores import read_scores
from graftline.registry.releases import list_versions
from graftline.registry.store import open_store
from graftline.release.manifest import read_manifest
from graftline.workflow import code, resolve, scored
from graftline.workflow.pinned_base import original_base, trained_base
from tasks import evaluate, gate, merge
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.test_scored import AFTER_SCORES, UNTIL_SCORES, promote, run_stages
from tests.workflow.tiny_project import change, make_rows, tiny_settings

pytestmark = pytest.mark.slow

ROOT = Path(graftline.__file__).parents[1]
MODELS = ("base", "candidate", "production")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a release in production and another candidate, all scored, each model in many batches."""
    folder = tmp_path_factory.mktemp("once") / "project"
    make_tiny_llama(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(80)))
    pipeline = tiny_settings()
    pipeline["data"] |= {"evaluation_rows": 20}
    pipeline["train"] |= {"steps": 2, "batch_size": 4, "checkpoint_every": 0}
    pipeline["gates"]["accuracy"] |= {"margin": 0.9, "min_items": 1}
    pipeline["evaluate"] |= {"batch_tokens": 64, "answers": {"max_new_tokens": 2, "max_rows": 4}}
    pipeline["evaluate"]["forgetting"] = {"source": "path:text.txt"}
    (folder / "text.txt").write_text("Some general words.\nOther general words.\n")
    write_yaml(folder, {"pipelines": {"pets": pipeline}, "channels": {"production": {"anchor": "off"}}})
    (folder / "keys.yaml").write_text("unsigned: true\n", encoding="utf-8")
    opened = open_pipeline("pets", folder)
    run_stages(opened, resolve, *UNTIL_SCORES, *AFTER_SCORES)
    promote(opened, read_manifest(opened.at.folder("package")).version)
    change(folder, "train", steps=3)
    run_stages(open_pipeline("pets", folder), resolve, *UNTIL_SCORES)
    return folder


@pytest.fixture
def opened(finished: Path, tmp_path: Path) -> Opened:
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    return open_pipeline("pets", folder)


class Done(NamedTuple):
    """What one run of the stage did."""

    loads: list[str]
    """Names of the folders that a model was loaded from."""
    parts: int
    """Batches that were scored."""
    kept: set[str]
    """Models that were not scored again, by the log."""
    files: dict[str, bytes]
    """What it wrote, by name."""


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Run:
    """Runs the stage and counts. Everything that is counted still happens."""
    loads: list[str] = []
    parts: list[int] = []
    load, write = models.load_base, KeptScores.write_part
    monkeypatch.setattr(models, "load_base", lambda folder, **how: [loads.append(folder.name), load(folder, **how)][1])
    monkeypatch.setattr(KeptScores, "write_part", lambda *part: [parts.append(part[2]), write(*part)][1])
    caplog.set_level(logging.INFO, logger="graftline")

    def once(opened: Opened) -> Done:
        for seen in (loads, parts):
            seen.clear()
        caplog.clear()
        run_stages(open_pipeline("pets", opened.at.root), evaluate)
        out = opened.at.folder("evaluate")
        files = {path.name: path.read_bytes() for path in sorted([*out.glob("scores/*"), out / "metrics.json"])}
        kept = set(re.findall(r"(\w+) is not scored again", caplog.text))
        return Done(list(loads), len(parts), kept, files)

    return once


def forget(opened: Opened) -> None:
    """As on a machine that has not scored anything yet."""
    shutil.rmtree(opened.at.cache / "scores")


def test_a_second_run_scores_and_loads_nothing_and_writes_the_same_bytes(opened: Opened, run: Run) -> None:
    again = run(opened)
    assert (again.loads, again.parts, again.kept) == ([], 0, set(MODELS))
    forget(opened)
    anew = run(opened)
    assert anew.parts > 6
    assert anew.files == again.files


def test_the_verdict_on_kept_scores_is_the_one_on_new_scores(opened: Opened, run: Run) -> None:
    verdicts = []
    run_stages(opened, merge)
    for _ in range(2):
        run(opened)
        run_stages(opened, gate)
        verdicts.append((opened.at.folder("gate") / "verdict.json").read_bytes())
        forget(opened)
    assert verdicts[0] == verdicts[1]


def test_another_candidate_is_scored_alone(opened: Opened, run: Run) -> None:
    change(opened.at.root, "train", steps=4)
    run_stages(open_pipeline("pets", opened.at.root), *UNTIL_SCORES[:-1])
    assert run(opened).kept == {"base", "production"}


def test_what_becomes_production_was_scored_when_it_was_the_candidate(opened: Opened, run: Run) -> None:
    run_stages(opened, *AFTER_SCORES)
    promote(opened, read_manifest(opened.at.folder("package")).version)
    run_stages(opened, resolve)
    again = run(opened)
    assert (again.loads, again.kept) == ([], set(MODELS))
    scores = read_scores(scored.scores_folder(opened.at) / "production.jsonl")
    assert scores.scored
    assert scores.scored.release
    newest = list_versions(open_store(str(opened.at.root / opened.pipeline.release.store)), "pets")[-1]
    assert scores.scored.release.version == newest


def test_on_another_machine_production_brings_its_scores_along(opened: Opened, run: Run) -> None:
    before = run(opened)
    forget(opened)
    found = run(opened)
    assert found.kept == {"production"}
    assert found.files == before.files
    assert run(opened).kept == set(MODELS)


# Each thing that scores depend on: changed, and everything that depends on it is scored again.


def edit(path: str, old: str, new: str) -> Callable[[Opened], None]:
    """Another text in a file below runs/pets."""

    def change_text(opened: Opened) -> None:
        file = opened.at.runs / path
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.unlink()
        file.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change_text


def other_setting(section: str, **values: Any) -> Callable[[Opened], None]:
    return lambda opened: change(opened.at.root, section, **values)


def of_base(name: str, change_bytes: Callable[[bytes], bytes]) -> Callable[[Opened], None]:
    def change_file(opened: Opened) -> None:
        (file,) = (opened.at.cache / "bases").glob(f"*-float32/{name}")
        file.write_bytes(change_bytes(file.read_bytes()))

    return change_file


CHANGES: dict[str, tuple[Callable[[Opened], None], set[str]]] = {
    "rows": (edit("fetch/evaluation.jsonl", "purrs", "sleeps"), set()),
    "general text": (edit("fetch/general.jsonl", "Some", "Many"), set()),
    "batch_tokens": (other_setting("evaluate", batch_tokens=65), set()),
    "answers' length": (other_setting("evaluate", answers={"max_new_tokens": 3, "max_rows": 4}), set()),
    "answers' rows": (other_setting("evaluate", answers={"max_new_tokens": 2, "max_rows": 5}), set()),
    "no answers": (other_setting("evaluate", answers=None), set()),
    "labels": (other_setting("data", labels=["dog", "cat"]), set()),
    "threads": (other_setting("train", threads=2), set()),
    "the candidate": (
        edit("train/adapter/adapter_config.json", '"lora_alpha": 8', '"lora_alpha": 9'),
        {"base", "production"},
    ),
    "a file beside the base's weights": (of_base("config.json", lambda data: data + b"\n"), set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_score_is_scored_again(opened: Opened, run: Run, name: str) -> None:
    make, kept = CHANGES[name]
    make(opened)
    assert run(opened).kept == kept
    assert run(opened).kept == set(MODELS)


KEEPS: dict[str, Callable[[Opened], None]] = {
    "the metric": other_setting("evaluate", metric="f1"),
    "the number of processes": other_setting("evaluate", processes=2),
    "a limit on answers": other_setting(
        "evaluate", answers={"max_new_tokens": 2, "max_rows": 4, "forbidden": ["no answer has this"]}
    ),
    "what is measured of the candidate alone": other_setting("evaluate", miub_rows=2),
    "gates": other_setting(
        "gates",
        accuracy={
            "metric": "accuracy",
            "direction": "higher",
            "test": "superiority",
            "margin": 0.1,
            "min_items": 2,
            "against": "base",
        },
    ),
    "training settings": other_setting("train", steps=9),
}


@pytest.mark.parametrize("name", KEEPS)
def test_what_changes_no_score_is_not_scored_again(opened: Opened, run: Run, name: str) -> None:
    KEEPS[name](opened)
    found = run(opened)
    assert (found.parts, found.kept) == (0, set(MODELS))


def test_a_base_with_a_damaged_weight_is_refused_though_its_scores_are_kept(opened: Opened) -> None:
    (file,) = (opened.at.cache / "bases").glob("*-float32/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BaseMismatchError, match=r"the weights in .* have digest"):
        run_stages(opened, evaluate)


def test_an_adapter_of_another_base_is_refused_though_scores_of_it_are_kept(opened: Opened) -> None:
    identity = opened.at.folder("train") / "adapter" / "graftline.json"
    kept_for_it = evaluate_kept(opened)
    record = json.loads(identity.read_text(encoding="utf-8"))
    identity.unlink()
    identity.write_text(json.dumps(record | {"base_digest": f"sha256:{'0' * 64}"}), encoding="utf-8")
    assert kept_for_it
    with pytest.raises(BaseMismatchError):
        run_stages(opened, evaluate)


def evaluate_kept(opened: Opened) -> list[Path]:
    return sorted((opened.at.cache / "scores").glob("*/record.json"))


def test_other_code_and_other_libraries_score_again_and_a_comment_does_not(
    opened: Opened, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project has graftline's source, as this repository has."""
    shutil.copytree(ROOT / "graftline", opened.at.root / "graftline", ignore=shutil.ignore_patterns("__pycache__"))
    assert run(opened).kept == set(MODELS)
    for name, text, kept in (
        ("evaluate/scoring.py", "\n# A comment.\n", set(MODELS)),
        ("registry/channel.py", "\n_UNUSED = 1\n", set(MODELS)),
        ("evaluate/scoring.py", "\n_UNUSED = 1\n", set()),
        ("adapters/lora.py", "\n_UNUSED = 1\n", set()),
        ("weights/quant/linear.py", "\n_UNUSED = 1\n", set()),
        ("data/template.py", "\n_UNUSED = 1\n", set()),
    ):
        path = opened.at.root / "graftline" / name
        path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
        assert run(opened).kept == kept, name
    version = code._version
    monkeypatch.setattr(code, "_version", lambda package: "0.1" if package == "transformers" else version(package))
    assert run(opened).kept == set()


# Base and candidate share a model in memory where they share a base.


def start(folder: Path, **sections: Any) -> Opened:
    """A trained pipeline that has not been scored yet."""
    make_tiny_llama(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)))
    pipeline = tiny_settings()
    pipeline["data"] |= {"evaluation_rows": 12}
    pipeline["train"] |= {"steps": 2, "batch_size": 4, "checkpoint_every": 0}
    pipeline["gates"]["accuracy"] |= {"margin": 0.9, "min_items": 1}
    pipeline |= sections
    write_yaml(folder, {"pipelines": {"pets": pipeline}, "channels": {"production": {"anchor": "off"}}})
    opened = open_pipeline("pets", folder)
    run_stages(opened, resolve, *UNTIL_SCORES[:-1])
    return opened


_LOFTQ = {"method": "loftq", "rank": 4, "alpha": 8}
BASES: dict[str, tuple[dict[str, Any], bool]] = {
    "not quantized": ({}, True),
    "PiSSA": ({"adapter": {"method": "pissa", "rank": 4, "alpha": 4}}, True),
    "all weights trained": ({"adapter": {"method": "full"}}, True),
    "quantized": ({"quantize": {"method": "nf4"}}, False),
    "LoftQ": ({"quantize": {"method": "nf4", "init": "loftq"}, "adapter": _LOFTQ}, False),
}


@pytest.mark.parametrize("name", BASES)
def test_the_base_is_loaded_once_and_for_the_candidate_only_if_that_has_another(
    tmp_path: Path, run: Run, name: str
) -> None:
    sections, is_shared = BASES[name]
    opened = start(tmp_path / "project", **sections)
    found = run(opened)
    original, trained = original_base(opened.pipeline.base, opened.at), trained_base(opened.pipeline.base, opened.at)
    assert found.loads == ([original.name] if is_shared else [original.name, trained.name])
    # Each alone gives the same numbers.
    for model, base in (("base", original), ("candidate", trained)):
        in_memory = models.ModelInMemory(template="none", device="cpu")
        adapter = opened.at.folder("train") / "adapter" if model == "candidate" else None
        alone = evaluate_model(*in_memory.get(models.Model(base, of_json(model), adapter)), plan(opened))
        scores = read_scores(scored.scores_folder(opened.at) / f"{model}.jsonl")
        assert (alone.items, alone.documents) == (scores.items, scores.documents)


def plan(opened: Opened) -> EvaluationPlan:
    rows = read_rows(opened.at.folder("fetch") / EVALUATION)
    return EvaluationPlan(rows, "none", opened.pipeline.data.labels or (), (), opened.pipeline.evaluate)


# An evaluation in parts.

KILLED = """
import os, signal, sys

from pathlib import Path

import psutil

from graftline.evaluate.kept import KeptScores
from tasks import evaluate
from tests.workflow.opened import open_pipeline

if __name__ == "__main__":
    write, written = KeptScores.write_part, []

    def write_and_die(*part):
        write(*part)
        written.append(part)
        children = psutil.Process().children(recursive=True)
        Path(sys.argv[3]).write_text(" ".join(str(one.pid) for one in children))
        if len(written) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    KeptScores.write_part = write_and_die
    evaluate.run(*open_pipeline("pets", Path(sys.argv[1])))
"""


def run_and_kill(opened: Opened, folder: Path, *, after: int) -> list[int]:
    """The stage in another process, which is killed when so many batches are kept; process ids of its children."""
    script, children = folder / "killed.py", folder / "children"
    script.write_text(KILLED, encoding="utf-8")
    command = [sys.executable, str(script), str(opened.at.root), str(after), str(children)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return [int(pid) for pid in children.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)  # where nobody asks how it ended
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_evaluation_continues_at_the_missing_batches_to_the_same_bytes(
    opened: Opened, run: Run, tmp_path: Path, processes: int
) -> None:
    forget(opened)
    record = opened.at.runs / "resolved.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"champion": {"version": None}}))
    whole = run(opened)
    assert whole.parts > 12
    forget(opened)
    change(opened.at.root, "evaluate", processes=processes)
    # In the second model: the first is done.
    children = run_and_kill(opened, tmp_path, after=whole.parts - 3)
    assert bool(children) is (processes > 1)
    while any(map(is_running, children)):  # They end by themselves; the test's limit of time ends this.
        time.sleep(0.05)
    found = run(opened)
    assert (found.kept, found.parts) == ({"base"}, 3)
    assert found.files == whole.files
    assert len(found.loads) == (1 if processes == 1 else 0)  # Here; each process loads its own.
    assert not list((opened.at.cache / "scores").glob("*/*-*.jsonl"))


def test_a_process_that_is_ended_from_outside_is_an_error_that_says_what_to_do(opened: Opened) -> None:
    forget(opened)
    change(opened.at.root, "evaluate", processes=2)
    write = KeptScores.write_part
    with pytest.MonkeyPatch.context() as patch:

        def write_and_kill(*part: Any) -> None:
            write(*part)
            for child in psutil.Process().children(recursive=True):
                child.kill()

        patch.setattr(KeptScores, "write_part", write_and_kill)
        with pytest.raises(EvaluationError, match=r"one of the 2 processes .*evaluate\.processes"):
            run_stages(open_pipeline("pets", opened.at.root), evaluate)
    assert list((opened.at.cache / "scores").glob("*/items-*.jsonl"))
