from pathlib import Path

import pytest

from graftline.errors import CheckpointError
from graftline.weights.writer import check_free_space, writing


def test_enough_space_passes_also_for_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)


def test_too_little_space_names_path_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/out takes {10**18} bytes"):
        check_free_space(tmp_path / "out", 10**18)


def test_refusal_of_the_operating_system_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"cannot write {tmp_path}: Is a directory"), writing(tmp_path):
        tmp_path.write_text("x")
