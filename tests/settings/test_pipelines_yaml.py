"""The file in the repository, the starter and the examples."""

import runpy
from collections import Counter
from pathlib import Path

import pytest

from graftline.plan.evidence import read_evidence
from graftline.scaffold.starter import starter
from graftline.settings import load, parse_config

ROOT = Path(__file__).parents[2]
NOUNS = """\
  1 This is the licence.  \n\
00001 05 n 01 dog 0 000 @ | a domesticated animal that barks at strangers; "the dog barked all night"
00002 05 n 01 cat 0 000 @ | a small animal that is kept for catching mice
00003 05 n 01 tom 0 000 @ | a small animal that is kept for catching mice
00004 20 n 01 oak 0 000 @ | a large tree with lobed leaves and acorns; "a great oak"; "an old oak"
00005 18 n 01 cook 0 000 @ | a person who prepares meals for other people
00006 99 n 01 thing 0 000 @ | something of a topic that is not asked for
00007 20 n 01 herb 0 000 @ | too short
"""


def test_the_demo_pipelines_are_right() -> None:
    config = load(ROOT / "pipelines.yaml")

    assert config.names == ("wordnet-category", "wordnet-animal-or-plant")
    demo = config.pipeline("wordnet-category")
    assert (demo.quantize.method, demo.quantize.double_quant, demo.adapter.method) == ("nf4", True, "lora")
    assert (demo.adapter.rank, demo.adapter.alpha, demo.train.steps, demo.train.batch_size) == (8, 16, 84, 16)
    small = config.pipeline("wordnet-animal-or-plant")
    assert (small.quantize.method, small.base.source) == ("none", demo.base.source)


def test_every_file_that_the_pipelines_name_exists() -> None:
    config = load(ROOT / "pipelines.yaml")
    named = [config.pipeline(name).data.prepare for name in config.names]
    named += [p.evaluate.forgetting.prepare for p in map(config.pipeline, config.names) if p.evaluate.forgetting]

    assert len(named) == 3
    for path in named:
        assert path is not None
        assert (ROOT / path).is_file()


def test_the_starter_is_right() -> None:
    assert parse_config(starter(read_evidence()).encode(), Path("pipelines.yaml")).names == ("my-task",)


@pytest.fixture
def nouns(tmp_path: Path) -> Path:
    file = tmp_path / "data.noun"
    file.write_text(NOUNS, encoding="latin-1")
    return file


def test_the_category_rows_are_unique_definitions_of_known_topics(nouns: Path) -> None:
    rows = list(runpy.run_path(str(ROOT / "examples/wordnet-category/rows.py"))["rows"](nouns))

    assert Counter(row["completion"] for row in rows) == {" animal": 2, " plant": 1, " person": 1}
    assert {
        "prompt": "Definition: a large tree with lobed leaves and acorns\nCategory:",
        "completion": " plant",
    } in rows
    assert rows == list(runpy.run_path(str(ROOT / "examples/wordnet-category/rows.py"))["rows"](nouns))


def test_the_animal_or_plant_rows_have_two_labels(nouns: Path) -> None:
    rows = list(runpy.run_path(str(ROOT / "examples/wordnet-animal-or-plant/rows.py"))["rows"](nouns))

    assert Counter(row["completion"] for row in rows) == {" animal": 2, " plant": 1}


def test_general_text_gives_sentences_of_a_fair_length(tmp_path: Path) -> None:
    file = tmp_path / "doc-0.json"
    file.write_text('["Short.", "A sentence of a fair length, neither short nor endless.", "' + "x" * 500 + '"]')

    documents = list(runpy.run_path(str(ROOT / "examples/wordnet-category/general_text.py"))["documents"](file))

    assert documents == ["A sentence of a fair length, neither short nor endless."]
