"""The files of a model folder that are not weights: config, tokenizer, chat template, licence."""

import shutil
from pathlib import Path

from graftline.weights.disk import writing
from graftline.weights.identity import IDENTITY_FILE
from graftline.weights.reader import INDEX_FILE

# A list of what is copied, not of what is left: code (*.py) and pickles from a source never travel along.
_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".tiktoken"}
_STEMS = ("LICENSE", "LICENCE", "NOTICE")
_WRITTEN_ANEW = {INDEX_FILE, IDENTITY_FILE, "adapter_config.json", "graftline.json", "quantization.json"}


def sidecars(folder: Path) -> list[Path]:
    """Config, tokenizer, chat template and licence files of a model folder, sorted."""
    return sorted(file for file in folder.iterdir() if file.is_file() and _travels(file))


def copy_sidecars(source: Path, out: Path) -> list[str]:
    """Copy them byte for byte into ``out``; returns their names.

    Raises:
        CheckpointError: the disk refuses.
    """
    files = sidecars(source)
    for file in files:
        with writing(out / file.name):
            shutil.copyfile(file, out / file.name)
    return [file.name for file in files]


def _travels(file: Path) -> bool:
    return file.name not in _WRITTEN_ANEW and (file.suffix in _SUFFIXES or file.name.startswith(_STEMS))
