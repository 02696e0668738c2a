from pathlib import Path

import pytest
from transformers import PreTrainedModel

from graftline.merge.parity import ParityLimits, ParityReport, compare_with_recorded, record
from graftline.weights.quant.folder import quantize_folder
from tests.sections import quantize_section


@pytest.fixture(scope="session")
def nf4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, quantized. Read-only."""
    folder = tmp_path_factory.mktemp("nf4") / "base"
    quantize_folder(tiny_llama, folder, quantize=quantize_section())
    return folder


def compare(
    unmerged: PreTrainedModel, merged: PreTrainedModel, sequences: list[list[int]], *, limits: ParityLimits
) -> ParityReport:
    """Two models that both fit into memory; every token is part of an answer."""
    answers = [[True] * len(tokens) for tokens in sequences]
    recorded = record(unmerged, sequences)
    return compare_with_recorded(recorded, merged, sequences, limits=limits, answers=answers)
