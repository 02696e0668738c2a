from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.settings.model import Train
from graftline.train.best import held_out_loss
from tests.sections import train_section
from tests.train.rows import lora_model, make_rows

_ROWS = make_rows(13, seed=3)


def _settings(batch_size: int = 4, **changes: str) -> Train:
    return train_section(steps=1, batch_size=batch_size, device="cpu", **changes)


def _by_row(model: PreTrainedModel) -> float:
    """The same number from transformers' logits, a row at a time."""
    total, count = 0.0, 0
    for row in _ROWS:
        ids, marks = torch.tensor(row.input_ids), torch.tensor(row.supervised)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")[marks[1:]]
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_it_is_the_mean_over_supervised_tokens_however_rows_are_batched(tiny_llama: Path, batch_size: int) -> None:
    model = lora_model(tiny_llama).eval()
    assert held_out_loss(_ROWS, _settings(batch_size))(model) == pytest.approx(_by_row(model), rel=1e-5)


def test_it_computes_in_the_training_s_precision(tiny_llama: Path) -> None:
    model = lora_model(tiny_llama).eval()
    low, high = (held_out_loss(_ROWS, _settings(precision=precision))(model) for precision in ("bf16", "fp32"))
    assert low != high
    assert low == pytest.approx(high, rel=1e-2)


def test_rows_without_supervised_tokens_are_refused() -> None:
    with pytest.raises(TrainError, match="row 0 has no supervised token"):
        held_out_loss([Encoded([1, 2], [False, False])], _settings())
