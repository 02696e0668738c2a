"""Rows of classes, and their loss: transformers' loss and gradients for classification, in every layout."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.class_head import add_class_head
from graftline.data.class_rows import class_rows
from graftline.data.rows import read_rows
from graftline.data.template import encode_prompt
from graftline.errors import DataError, TrainError
from graftline.settings.objective import Objective
from graftline.train.batches import MicroBatch, pack_rows, pad_rows, shared_prefix
from graftline.train.preferences import loss_of
from graftline.train.trainer import train
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.linear import load_model
from tests.sections import adapter_section, train_section

LABELS = ("cat", "dog", "cow")
CLASSIFY = Objective(kind="classify")
ROWS = [
    {"prompt": "which animal is it that purrs", "completion": " cat"},
    {"prompt": "which animal is it that barks at night", "completion": " dog"},
    {"prompt": "which animal is it that gives milk", "completion": " cow"},
]


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    found = load_model(tiny_llama)
    add_class_head(found, LABELS, seed=1)
    return found


@pytest.fixture
def rows(tiny_llama: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return read_rows(tmp_path / "rows.jsonl"), load_tokenizer(tiny_llama)


@pytest.mark.parametrize("template", ["none", "chatml"])
def test_a_row_is_its_served_prompt_and_the_number_of_its_class(rows, template: str):
    read, tokenizer = rows
    found = class_rows(read, tokenizer, template=template, labels=LABELS)
    for at, row in enumerate(found):
        assert row.input_ids == [*encode_prompt(read[at], tokenizer, template=template), at]
        assert row.supervised == [False] * (len(row.input_ids) - 1) + [True]
    assert found.lines.tolist() == [row.source_line for row in read]


def test_an_answer_that_is_no_label_is_refused_with_its_line(rows):
    with pytest.raises(DataError, match="line 3: the answer is 'cow' by assistant; expected one of cat, dog"):
        class_rows(rows[0], rows[1], template="none", labels=LABELS[:2])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared prefix"])
def test_loss_and_gradients_are_those_of_transformers(tiny_llama: Path, model: PreTrainedModel, rows, layout: str):
    read, tokenizer = rows
    encoded = list(class_rows(read, tokenizer, template="none", labels=LABELS))
    shared = shared_prefix(encoded)
    assert shared > 4
    batch: MicroBatch = {
        "padded": lambda: pad_rows(encoded),
        "packed": lambda: pack_rows(encoded),
        "shared prefix": lambda: pad_rows(encoded, shared_prefix=shared),
    }[layout]()
    attach(model, adapter_section("lora", rank=4), seed=0)
    loss = loss_of(model, CLASSIFY)
    assert loss.count(batch) == 3
    ours = loss(batch, num_supervised=torch.tensor(3))
    ours.backward()
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3, dtype=torch.float32).eval()
    theirs.score.weight.data.copy_(model.score.weight)
    losses = [
        theirs(torch.tensor([row.input_ids[:-1]]), labels=torch.tensor([at])).loss for at, row in enumerate(encoded)
    ]
    expected = torch.stack(losses).mean()
    expected.backward()
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(model.score.weight.grad, theirs.score.weight.grad, atol=1e-5, rtol=1e-4)
    # B is zero at first: its gradient is the gradient of the layer's output times what A gives.
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    A = next(parameter for key, parameter in layer.named_parameters() if key.endswith("A"))
    B = next(parameter for key, parameter in layer.named_parameters() if key.endswith("B"))
    scale = 16.0 / 4
    of_weight = theirs.get_submodule(name).weight.grad
    torch.testing.assert_close(B.grad, scale * of_weight @ A.detach().T, atol=1e-5, rtol=1e-3)


def test_the_head_is_trained_with_the_adapter(model: PreTrainedModel, rows, tmp_path: Path):
    ends = {"cat": "a", "dog": "b", "cow": "c"}
    pets = [{"prompt": f"number {at} {ends[label]}", "completion": label} for at in range(40) for label in LABELS]
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pets))
    encoded = class_rows(read_rows(tmp_path / "pets.jsonl"), rows[1], template="none", labels=LABELS)
    attach(model, adapter_section("lora", rank=4), seed=0)
    assert "score.weight" in trainable_parameters(model)
    settings = train_section(steps=40, batch_size=16, learning_rate=3e-3, checkpoint_every=0, objective=CLASSIFY)
    result = train(model, encoded, settings=settings, work=tmp_path / "work")
    assert result.losses[0] == pytest.approx(1.0986, abs=0.2)
    assert sum(result.losses[-5:]) / 5 < 0.4


def test_without_a_head_the_objective_says_what_is_missing(tiny_llama: Path, rows, tmp_path: Path):
    encoded = class_rows(rows[0], rows[1], template="none", labels=LABELS)
    model = load_model(tiny_llama)
    attach(model, adapter_section("lora", rank=4), seed=0)
    settings = train_section(steps=1, batch_size=3, checkpoint_every=0, objective=CLASSIFY)
    with pytest.raises(TrainError, match="has no head for classes; add one before its adapter"):
        train(model, encoded, settings=settings, work=tmp_path / "work")
