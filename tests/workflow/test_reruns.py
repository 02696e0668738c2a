"""What makes DVC run a stage again: real graph, real resolving, real DVC; only the stages' work is stood in for."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftline.workflow.stages import STAGES
from tests.line.project import environment
from tests.workflow.tiny_project import PIPELINE, change, make_repository

pytestmark = pytest.mark.slow

STAND_IN = """\
import json, sys
from pathlib import Path
stage, name = sys.argv[1:]
outs = json.loads(Path("outs.json").read_text())[stage]
for out in outs:
    path = Path(out.replace("${key}", name))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.write_text("[]" if path.name == "history.json" else "{}")
    else:
        path.mkdir(exist_ok=True)
        for file in ("done", "base.json", "train.jsonl", "report.json", "parity.json"):
            (path / file).write_text(stage)
        for side in ("training", "evaluation"):
            (path / "encoded" / side).mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose line has run once, with stand-ins that write every declared output."""
    from ruamel.yaml import YAML

    root = make_repository(tmp_path_factory.mktemp("reruns") / "project")
    text = (root / "dvc.yaml").read_text().replace("wordnet-animal-or-plant", PIPELINE)
    text = text.replace("python -m tasks.", "python stand_in.py ")
    (root / "dvc.yaml").write_text(text)
    outs: dict[str, list[str]] = {}
    for stage, body in YAML(typ="safe").load(text)["stages"].items():
        given = body["do"]
        outs[stage] = [*given["outs"], *(next(iter(x)) for x in given.get("metrics", []) + given.get("plots", []))]
    (root / "outs.json").write_text(json.dumps(outs))
    (root / "stand_in.py").write_text(STAND_IN)
    run(root, "-m", "dvc", "init", "-q", "-f")
    resolve(root)
    run(root, "-m", "dvc", "repro", "-q", f"release@{PIPELINE}")
    assert outdated(root) == []
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def run(root: Path, *arguments: str) -> str:
    # The interpreter of the tests, also where DVC starts `python`.
    settings = environment(root, root / ".cache" / "graftline")
    settings["PATH"] = f"{Path(sys.executable).parent}:{settings['PATH']}"
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def resolve(root: Path) -> None:
    run(root, "-m", "graftline.workflow.resolve", PIPELINE)


def outdated(root: Path) -> list[str]:
    """The stages that DVC itself would run, the later ones only if their own inputs differ."""
    found = json.loads(run(root, "-m", "dvc", "status", "--json"))
    return [stage for stage in STAGES if f"{stage}@{PIPELINE}" in found]


def planned(root: Path) -> Any:
    return json.loads(run(root, "-m", "graftline.workflow.upcoming", "--json"))["pipelines"][PIPELINE]


def edited(root: Path, path: str, edit: Callable[[str], str]) -> None:
    file = root / path
    before = file.read_text(encoding="utf-8")
    file.write_text(edit(before), encoding="utf-8")
    assert file.read_text(encoding="utf-8") != before


def find(root: Path, definition: str) -> str:
    """The file of graftline that has a definition, wherever it lies today."""
    (path,) = [path for path in (root / "graftline").rglob("*.py") if f"\n{definition}" in path.read_text()]
    return str(path.relative_to(root))


def test_a_changed_message_runs_nothing_again(root: Path) -> None:
    edited(root, "graftline/errors.py", lambda text: text + "\n\nMORE = 1\n")
    for definition in ("def plan_layers(", "class CheckpointReader"):
        edited(root, find(root, definition), lambda text: re.sub(r'(Error\(\s*f")', r"\1now ", text))
    assert planned(root) == {"stages": [], "reasons": {}}
    resolve(root)
    assert outdated(root) == []


NEW = """class Train(Section):
    momentum: Ratio = 0.9
    '''Share of the last step that is kept.'''

"""


def test_a_new_setting_with_its_default_runs_nothing_again(root: Path) -> None:
    edited(root, "graftline/settings/model.py", lambda text: text.replace("class Train(Section):\n", NEW, 1))
    assert planned(root) == {"stages": [], "reasons": {}}
    resolve(root)
    assert outdated(root) == []
    # And once it is given another value, training and what follows run again.
    change(root, "train", momentum=0.5)
    assert planned(root)["reasons"]["train"] == ["train.momentum (none) → 0.5"]
    resolve(root)
    assert outdated(root) == ["train", "gate"]


def test_a_changed_quantizer_runs_init_again_and_what_follows(root: Path) -> None:
    edited(root, find(root, "def quantize("), lambda text: text + "\n\nLARGEST = 1\n")
    plan = planned(root)
    assert plan["stages"] == list(STAGES[STAGES.index("init") :])
    assert plan["reasons"]["init"][0].startswith("code of graftline.weights.quant.")
    resolve(root)
    assert outdated(root)[0] == "init"
    assert not {"fetch", "validate", "release"} & set(outdated(root))


@pytest.mark.long
def test_a_default_that_changes_runs_what_takes_it_again(root: Path) -> None:
    edited(root, "graftline/settings/model.py", lambda text: text.replace("seed: Seed = 0\n", "seed: Seed = 1\n"))
    resolve(root)
    assert "train" in outdated(root)


@pytest.mark.long
def test_a_value_that_is_written_down_as_it_was_by_default_runs_nothing_again(root: Path) -> None:
    change(root, "train", seed=0)
    resolve(root)
    assert outdated(root) == []


def test_a_stage_s_own_file_counts(root: Path) -> None:
    edited(root, "tasks/merge.py", lambda text: text + "\n\nMORE = 1\n")
    resolve(root)
    assert outdated(root) == ["merge"]
