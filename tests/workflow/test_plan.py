"""A pipeline is planned from its rows, or from a config.json alone."""

import json
from pathlib import Path

import pytest

from graftline.errors import ConfigError
from graftline.workflow.plan import make
from graftline.workflow.workspace import Workspace
from studies.models import KNOWN as MODELS
from tests.settings.documents import changed, read
from tests.tiny import tiny_llama_config
from tests.workflow.opened import Opened


def _open(folder: Path, **changes: object) -> Opened:
    return Opened(read(changed(**changes)).pipeline("demo"), Workspace(folder, "demo"))


def test_a_config_json_alone_says_what_is_covered_needed_and_served(tmp_path: Path) -> None:
    opened = _open(tmp_path, **{"demo.adapter.targets": ["q_proj", "v_proj"]})
    tiny_llama_config().save_pretrained(tmp_path)
    made = make(*opened, config_file=tmp_path / "config.json")
    assert made.training.memory.num_trained == 2 * 8 * ((64 + 64) + (64 + 32))
    assert made.training.fits
    for expected in ("q_proj", "rows are not fetched", "activations", "steps of about", "vllm: vllm serve"):
        assert expected in made.text()
    document = json.loads(json.dumps(made.document()))
    assert document["fetched"] is None
    assert [target["loads"] for target in document["targets"]] == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Llama 2 7B", "Llama 2 13B", "Qwen2.5 32B", "Llama 2 70B"])
def test_models_that_never_fit_here_are_planned_from_their_config(tmp_path: Path, model: str) -> None:
    MODELS[model].save_pretrained(tmp_path)
    opened = _open(tmp_path, **{"demo.train.batch_size": 1, "demo.data.max_tokens": 64})
    made = make(*opened, config_file=tmp_path / "config.json")
    billions = float(model.split()[-1].rstrip("B"))
    assert made.training.memory.num_parameters == pytest.approx(1e9 * billions, rel=0.05)
    assert made.training.fits or made.training.changes


def test_before_anything_is_fetched_a_config_json_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run `graftline fetch demo`, or give the base's config\.json"):
        make(*_open(tmp_path))


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        make(*_open(tmp_path), config_file=tmp_path / "config.json")
