"""A pipeline is told what to train, why, and what it says otherwise now."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from graftline.data.encoding import encode_rows
from graftline.data.rows import read_rows
from graftline.data.split import hold_out
from graftline.errors import ConfigError, TrainError
from graftline.plan import evidence
from graftline.plan.advice import snippet, with_arm
from graftline.plan.evidence import Arm, Evidence, read_evidence
from graftline.plan.recommend import Budget
from graftline.settings import parse_config
from graftline.weights.model_folder import load_tokenizer
from graftline.workflow import resolve
from graftline.workflow.recommend import make
from graftline.workflow.workspace import Workspace
from tasks import fetch
from tests.line.project import write_yaml
from tests.settings.documents import RIGHT, changed, read
from tests.tiny import make_tiny_llama, tiny_llama_config
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings

ROOT = Path(__file__).parents[2]
_FULL = {
    "name": "full",
    "adapter": {"method": "full"},
    "bits": 16,
    "learning_rate": 2e-05,
    "learning_rates_tried": [2e-05, 0.0001],
    "found": "accuracy 0.80 [0.77, 0.83], three seeds",
    "claims": [1, 10],
}
_QLORA = _FULL | {"name": "qlora", "adapter": {"method": "lora", "rank": 4, "alpha": 8}, "bits": 4, "claims": [6]}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    """A study that prefers full fine-tuning to QLoRA, and knows nothing else."""
    made = Evidence.model_validate_json(json.dumps({"format": 1, "page": "docs/evidence.md", "arms": [_FULL, _QLORA]}))
    monkeypatch.setattr("graftline.plan.advice.read_evidence", lambda: made)
    return made


@pytest.fixture
def base_config(tmp_path: Path) -> Path:
    tiny_llama_config().save_pretrained(tmp_path)
    return tmp_path / "config.json"


def _open(folder: Path, **changes: object) -> Opened:
    return Opened(read(changed(**changes)).pipeline("demo"), Workspace(folder, "demo"))


@pytest.mark.usefixtures("study")
def test_the_page_has_the_choice_its_cost_its_reason_and_what_differs(tmp_path: Path, base_config: Path) -> None:
    opened = _open(tmp_path, **{"demo.adapter.dropout": 0.1})
    text = make(*opened, budget=Budget(), config_file=base_config).text()
    for expected in (
        "demo: take full (full, 16-bit base, learning rate 2e-05)",
        "free on this cpu now (--memory GB for another)",
        "no limit (--minutes M for one)",
        "rows    not fetched",
        "accuracy 0.80 [0.77, 0.83], three seeds",
        "learning rate 2e-05: the best of 2e-05, 0.0001",
        "docs/evidence.md#claim-1",
        "docs/evidence.md#claim-10",
        "less preferred, not looked at: qlora",
        "adapter.method: lora, recommended full",
        "adapter.dropout: 0.1, recommended 0 (by default: leave the key out)",
        "train.learning_rate: 0.001, recommended 2e-05",
    ):
        assert expected in text
    assert "quantize.method: none, recommended" not in text
    assert len(text.splitlines()) < 50


@pytest.mark.usefixtures("study")
def test_what_is_passed_over_has_its_reason_and_a_budget_where_it_is_from(tmp_path: Path, base_config: Path) -> None:
    opened = _open(tmp_path)
    full = make(*opened, budget=Budget(), config_file=base_config).made.choice
    assert full is not None
    assert full.memory is not None
    budget = Budget(memory_bytes=full.memory.total.expected - 1, seconds=7200)
    made = make(*opened, budget=budget, config_file=base_config)
    assert made.made.choice is not None
    assert made.made.choice.arm.name == "qlora"
    for expected in ("passed over\n  full: takes", "GB: --memory\n", "time    2.0 h: --minutes"):
        assert expected in made.text()
    assert [look["arm"] for look in json.loads(json.dumps(made.document()))["passed_over"]] == ["full"]


@pytest.mark.usefixtures("study")
def test_where_nothing_fits_the_page_says_what_to_change(tmp_path: Path, base_config: Path) -> None:
    made = make(*_open(tmp_path), budget=Budget(memory_bytes=1.0), config_file=base_config)
    for expected in (
        "demo: nothing that the study tried fits",
        "nearest: qlora",
        "it comes closer with train.gradient_checkpointing: true",
        "take a smaller base or a larger device",
        "quantize.method: none, recommended nf4",
    ):
        assert expected in made.text()
    assert make(*_open(tmp_path), budget=Budget(memory_bytes=1e15), config_file=base_config).made.choice is not None


@pytest.mark.usefixtures("study")
def test_an_arm_that_the_rest_of_the_pipeline_refuses_is_passed_over(tmp_path: Path, base_config: Path) -> None:
    opened = _open(tmp_path, **{"demo.quantize.method": "nf4", "demo.package.requantize": True})
    made = make(*opened, budget=Budget(), config_file=base_config)
    assert made.made.choice is not None
    assert made.made.choice.arm.name == "qlora"
    assert made.made.passed_over[0].against == (
        "package.requantize: given, but only a quantized base reads it; remove it"
    )


@pytest.mark.usefixtures("study")
def test_fetched_rows_and_base_are_looked_at_as_they_are_trained(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(200)))
    pipeline = tiny_settings()
    pipeline["train"] |= {"evaluate_every": 2, "held_out_rows": 30, "epochs": 2}
    del pipeline["train"]["steps"]
    write_yaml(tmp_path, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    opened = open_pipeline(PIPELINE, tmp_path)
    for each in (resolve, fetch):
        each.run(*opened)
    rows = read_rows(opened.at.folder("fetch") / "train.jsonl")
    held_out = set(hold_out(rows, 30, seed=0).tolist())
    training = [row for number, row in enumerate(rows) if number not in held_out]
    trained = encode_rows(
        training, load_tokenizer(tmp_path / "base"), template="none", max_tokens=64, overlength="error"
    ).encoded
    made = make(*opened, budget=Budget())
    assert made.made.num_steps == -(-2 * len(trained) // 16)
    assert made.made.tokens_per_step == pytest.approx(16 * sum(len(row.input_ids) for row in trained) / len(trained))
    assert "not fetched" not in made.text()


@pytest.mark.parametrize("arm", read_evidence().arms, ids=lambda arm: arm.name)
def test_the_snippet_of_every_shipped_arm_is_what_the_pipeline_then_is(arm: Arm) -> None:
    document: dict[str, Any] = json.loads(json.dumps(RIGHT))
    pasted = YAML(typ="safe").load("\n".join(snippet(arm)))
    demo = document["pipelines"]["demo"]
    demo |= {"quantize": pasted["quantize"], "adapter": pasted["adapter"], "train": demo["train"] | pasted["train"]}
    loaded = parse_config(json.dumps(document).encode(), Path("pipelines.yaml")).pipeline("demo")
    assert loaded == with_arm(read(changed()).pipeline("demo"), arm)


def test_before_anything_is_fetched_a_config_json_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run `graftline fetch demo`, or give the base's config\.json"):
        make(*_open(tmp_path), budget=Budget())


def test_evidence_that_cannot_be_read_is_named(
    tmp_path: Path, base_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "graftline.plan.advice.read_evidence", lambda: evidence.read_evidence(tmp_path / "evidence.json")
    )
    with pytest.raises(TrainError, match=r"evidence\.json cannot be read"):
        make(*_open(tmp_path), budget=Budget(), config_file=base_config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--memory", "0.000001", "--json"], 1, ""),
        pytest.param(["--memory", "1000", "--json"], 0, "", marks=pytest.mark.long),
        (["--memory", "0"], 2, "error: the budget of memory is 0 GB; expected a number above 0"),
        pytest.param(["--minutes", "soon"], 2, "invalid float value", marks=pytest.mark.long),
    ],
)
def test_the_exit_code_says_whether_something_fits_or_the_input_is_bad(
    tmp_path: Path, base_config: Path, options: list[str], code: int, said: str
) -> None:
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    command = [sys.executable, "-m", "graftline.workflow.recommend", "demo", "--config", str(base_config), *options]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (code, True, False)
    if "--json" in options:
        assert (json.loads(done.stdout)["choice"] is None) == (code == 1)
