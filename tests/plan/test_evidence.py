"""The study's defaults: read, checked, written as YAML."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from graftline.errors import TrainError
from graftline.plan.evidence import EVIDENCE, Evidence, read_evidence, yaml_lines

_SHIPPED: dict[str, Any] = json.loads(EVIDENCE.read_text())


def test_what_is_shipped_can_be_read_and_has_links() -> None:
    evidence = read_evidence()
    assert [arm.name for arm in evidence.arms] == [arm["name"] for arm in _SHIPPED["arms"]]
    for arm in evidence.arms:
        assert all(link.startswith(evidence.page) for link in evidence.links(arm))
        assert evidence.links(arm)


def test_an_arm_links_every_claim_that_it_rests_on() -> None:
    document = {**_SHIPPED, "arms": [{**_SHIPPED["arms"][0], "claims": [1, 6]}]}
    evidence = Evidence.model_validate_json(json.dumps(document))
    assert evidence.links(evidence.arms[0]) == ("docs/evidence.md#claim-1", "docs/evidence.md#claim-6")


@pytest.mark.parametrize(
    ("method", "bits", "quantize"),
    [
        ("lora", 16, {"method": "none"}),
        ("lora", 3, {"method": "nf3"}),
        ("pissa", 16, {"method": "none"}),
        ("pissa", 4, {"method": "nf4", "init": "qpissa"}),
        ("loftq", 2, {"method": "nf2", "init": "loftq"}),
    ],
)
def test_bits_and_method_say_how_the_base_is_made(method: str, bits: int, quantize: dict[str, str]) -> None:
    arm = {**_SHIPPED["arms"][0], "adapter": {"method": method, "rank": 4}, "bits": bits}
    made = Evidence.model_validate_json(json.dumps({**_SHIPPED, "arms": [arm]})).arms[0].sections()
    assert (made["quantize"], made["adapter"]) == (quantize, {"method": method, "rank": 4})


def _without_arms(document: dict[str, Any]) -> None:
    document["arms"] = []


def _one_name_twice(document: dict[str, Any]) -> None:
    document["arms"] = [document["arms"][0]] * 2


def _unknown_method(document: dict[str, Any]) -> None:
    document["arms"][0]["adapter"]["method"] = "magic"


def _rate_as_text(document: dict[str, Any]) -> None:
    document["arms"][0]["learning_rate"] = "fast"


def _next_format(document: dict[str, Any]) -> None:
    document["format"] = 2


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (_without_arms, r"arms: .*at least 1"),
        (_one_name_twice, r"the file: .*two arms have one name: "),
        (_unknown_method, r"arms\.0\.adapter\.method"),
        (_rate_as_text, r"arms\.0\.learning_rate"),
        (_next_format, r"format: Input should be 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], None], place: str) -> None:
    document = json.loads(EVIDENCE.read_text())
    damage(document)
    file = tmp_path / "evidence.json"
    file.write_text(json.dumps(document))
    with pytest.raises(TrainError, match=rf"{place}.*python -m studies survey defaults"):
        read_evidence(file)


def test_a_file_that_is_none_or_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "evidence.json").write_text("{")
    with pytest.raises(TrainError, match=r"evidence\.json: the file: Invalid JSON"):
        read_evidence(tmp_path / "evidence.json")
    with pytest.raises(TrainError, match=r"absent\.json cannot be read: No such file"):
        read_evidence(tmp_path / "absent.json")


def test_a_later_study_may_write_more() -> None:
    arm = {**_SHIPPED["arms"][0], "hours": 3}
    assert (
        Evidence.model_validate_json(json.dumps({**_SHIPPED, "made": "today", "arms": [arm]})).arms[0].bits
        == arm["bits"]
    )


_TEXT = st.text(st.characters(exclude_categories=["C"]))  # what a person can type into pipelines.yaml
_VALUES = st.one_of(
    st.integers(0, 10**6), st.floats(1e-9, 1e9), st.booleans(), _TEXT, st.sampled_from(["no", "null", "nf4", "1e3"])
)


@given(
    st.dictionaries(st.from_regex(r"[a-z_]{2,9}x", fullmatch=True), st.one_of(_VALUES, st.lists(_VALUES)), min_size=1)
)
def test_lines_of_yaml_say_what_the_section_says(section: dict[str, Any]) -> None:
    assert YAML(typ="safe").load("\n".join(yaml_lines(section))) == section
