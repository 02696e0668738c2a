"""Bring a base from outside into the form that the rest works on: a dense safetensors folder in one dtype."""

from pathlib import Path

import torch

from graftline.digest import Digest, write_json
from graftline.errors import CheckpointError
from graftline.progress import OnProgress, silent
from graftline.weights.cast import cast, type_name
from graftline.weights.config import is_quantized, read_config
from graftline.weights.disk import check_free_space
from graftline.weights.gguf import convert_gguf
from graftline.weights.model_reader import ModelReader
from graftline.weights.reader import read_json_object
from graftline.weights.sidecars import copy_sidecars
from graftline.weights.skeleton import check_tensors
from graftline.weights.writer import CheckpointWriter


def import_base(path: Path, out: Path, *, dtype: torch.dtype, on_progress: OnProgress = silent) -> Digest:
    """Write the base at ``path``, a GGUF file or a safetensors folder, to ``out`` with floats in ``dtype``.

    Config, tokenizer, chat template and licence come along; ``graftline-base.json`` records the weights' digest; the
    base's is returned. Tensors get the names that the model's class has (`ModelReader`). Memory: about twice the
    largest tensor.

    Raises:
        CheckpointError: neither of the two kinds, damaged, incomplete, quantized, of an unknown architecture, too
            little disk.
        NumberTypeError: a weight does not fit ``dtype``.
    """
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path, out, dtype=dtype, on_progress=on_progress)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a base; a .gguf file or a folder with safetensors files was expected")
    return _cast_folder(path, out, dtype, on_progress)


def _cast_folder(source: Path, out: Path, dtype: torch.dtype, on_progress: OnProgress) -> Digest:
    reader = ModelReader(source)
    if is_quantized(reader.config):
        method = getattr(reader.config, "quantization_config", None)
        raise CheckpointError(
            f"{source} is quantized ({method.get('quant_method') if isinstance(method, dict) else method}); "
            "a dense base was expected: quantization is a later stage, with its own record"
        )
    check_tensors(reader)
    names = reader.names()
    check_free_space(
        out, sum(reader.info(name).num_bytes * dtype.itemsize // reader.info(name).dtype.itemsize for name in names)
    )
    with CheckpointWriter(out) as writer:
        for done, name in enumerate(names, start=1):
            writer.add(name, cast(reader.read(name), dtype, name))
            on_progress(done, len(names))
        copy_sidecars(source, writer.stage)
        _write_config(reader, writer.stage, dtype)
        return writer.finish()


def _write_config(reader: ModelReader, folder: Path, dtype: torch.dtype) -> None:
    """The folder's own config.json with what was found out about it: class, number type, whether the head is tied."""
    config = read_json_object(reader.folder / "config.json")
    for name in ("torch_dtype", "quantization_config", "compression_config"):  # an old name; null
        config.pop(name, None)
    if read_config(reader.folder).tie_word_embeddings != reader.config.tie_word_embeddings:
        config["tie_word_embeddings"] = reader.config.tie_word_embeddings
    known = {"architectures": [reader.architecture.name], "dtype": type_name(dtype)}
    write_json(folder / "config.json", config | known)
