from pathlib import Path

import pytest

from graftline.weights.quant.folder import quantize_folder
from tests.sections import quantize_section


@pytest.fixture(scope="session")
def nf4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, quantized. Read-only."""
    folder = tmp_path_factory.mktemp("nf4") / "base"
    quantize_folder(tiny_llama, folder, quantize=quantize_section())
    return folder
