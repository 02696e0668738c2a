"""Classification heads: the files are PEFT's for SEQ_CLS in both directions, with equal logits."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from graftline.adapters.attach import attach, attachment_of
from graftline.adapters.class_head import add_class_head, class_head_of
from graftline.adapters.peft_format import AdapterIdentity, AdapterWeights, attach_trained, load_adapter, save_adapter
from graftline.data.template import Encoded
from graftline.digest import of_bytes, write_json
from graftline.errors import AdapterError
from graftline.settings.model import Adapter
from graftline.train.batches import hidden_states, pad_rows
from graftline.weights.identity import BaseIdentity
from graftline.weights.quant.linear import load_model
from graftline.weights.reader import read_json_object
from tests.adapters.test_peft_interchange import assert_equal_logits, disturb
from tests.tiny import make_tiny_llama

BASE = BaseIdentity(of_bytes(b"base"))
LABELS = ("animal", "plant", "person")
IDS = torch.tensor([[5, 80, 31, 200, 7, 9, 11]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("head") / "base")


def class_logits(model) -> torch.Tensor:
    head = class_head_of(model)
    assert head is not None
    return head(model.base_model(input_ids=IDS, use_cache=False).last_hidden_state[:, -1])


def theirs_on(base: Path):
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS), dtype=torch.float32)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "vera", "pissa"])
def test_our_file_loads_in_peft(base: Path, method: str, tmp_path: Path):
    model = load_model(base)
    add_class_head(model, LABELS, seed=1)
    coverage = attach(model, Adapter(method=method, rank=4, alpha=8), seed=0)
    assert ("score",) in [row.modules for row in coverage.rows]
    assert not any("score" in row.modules for row in coverage.rows if row.target == "all-linear")
    disturb(model)
    save_adapter(model, tmp_path / "adapter", identity=AdapterIdentity(base_digest=BASE.digest))
    config = read_json_object(tmp_path / "adapter" / "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    config["base_model_name_or_path"] = str(base)
    write_json(tmp_path / "adapter" / "adapter_config.json", config)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=len(LABELS), dtype=torch.float32
    ).eval()
    assert_equal_logits(class_logits(model), theirs(IDS).logits)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_file_of_peft_loads_here(base: Path, method: str, tmp_path: Path):
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, use_dora=method == "dora", target_modules="all-linear"
    )
    theirs = peft.get_peft_model(theirs_on(base), config).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(base)
    load_adapter(model, tmp_path / "adapter", base=BASE)
    assert class_head_of(model).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert_equal_logits(theirs(IDS).logits, class_logits(model))


def test_labels_survive_and_a_head_is_no_weight_of_the_base(base: Path, tmp_path: Path):
    model = load_model(base)
    add_class_head(model, LABELS)
    num_base = attach(model, Adapter(method="lora", rank=2), seed=0).num_base
    save_adapter(model, tmp_path / "adapter", identity=AdapterIdentity(base_digest=BASE.digest))
    weights = AdapterWeights.open(tmp_path / "adapter")
    assert (weights.labels, weights.identity.labels) == (LABELS, LABELS)
    assert not weights.holds_base_weights
    assert weights.replacements() == {}
    again = load_model(base)
    load_adapter(again, tmp_path / "adapter", base=BASE, trainable=True)
    assert_equal_logits(class_logits(model), class_logits(again))
    assert attachment_of(again).saved_modules == ("score",)
    assert attachment_of(again).coverage.num_base == num_base == sum(p.numel() for p in load_model(base).parameters())


def test_a_training_goes_on_from_a_head_for_the_same_classes_alone(base: Path, tmp_path: Path):
    spec, model = Adapter(method="lora", rank=2), load_model(base)
    add_class_head(model, LABELS, seed=5)
    attach(model, spec, seed=0)
    save_adapter(model, tmp_path / "adapter", identity=AdapterIdentity(base_digest=BASE.digest))
    weights = AdapterWeights.open(tmp_path / "adapter")
    again = load_model(base)
    add_class_head(again, LABELS)
    attach_trained(again, spec, weights)
    torch.testing.assert_close(class_logits(again), class_logits(model))
    for labels in (tuple(reversed(LABELS)), ()):
        other = load_model(base)
        if labels:
            add_class_head(other, labels)
        with pytest.raises(AdapterError, match=r"expected the same|is for another base"):
            attach_trained(other, spec, weights)


@pytest.mark.parametrize("labels", [(), ("one",), ("a", "a")])
def test_classes_are_several_and_different(base: Path, labels: tuple[str, ...]):
    with pytest.raises(AdapterError, match="at least two, each once"):
        add_class_head(load_model(base), labels)


def test_a_head_of_another_width_leaves_the_model_as_it_was(base: Path, tmp_path: Path):
    narrow = load_model(make_tiny_llama(tmp_path / "narrow", hidden_size=32))
    add_class_head(narrow, LABELS)
    attach(narrow, Adapter(method="lora", rank=2, targets=("q_proj",)), seed=0)
    save_adapter(narrow, tmp_path / "adapter", identity=AdapterIdentity(base_digest=BASE.digest))
    model = load_model(base)
    with pytest.raises(AdapterError, match=r"score.weight has shape \(3, 32\), expected \(3, 64\)"):
        load_adapter(model, tmp_path / "adapter", base=BASE)
    assert class_head_of(model) is None


def test_hidden_states_of_padded_rows_end_where_peft_pools(base: Path):
    """The right class stands where the prompt's next token would: it is predicted from the prompt's last token."""
    rows = [Encoded([5, 80, 31, 2], [False] * 3 + [True]), Encoded([5, 9, 0], [False] * 2 + [True])]
    batch, model = pad_rows(rows), load_model(base)
    head = add_class_head(model, LABELS, seed=1)
    ours = head(hidden_states(model, batch).flatten(0, 1)[batch["predict_at"]])
    theirs = theirs_on(base).eval()
    theirs.score.weight.data.copy_(head.weight)
    for at, row in enumerate(rows):
        assert_equal_logits(ours[at : at + 1], theirs(torch.tensor([row.input_ids[:-1]])).logits)
    assert batch["targets"].tolist() == [2, 0]
