"""Bring a base from outside into the form that the rest works on: a dense safetensors folder in one dtype."""

from pathlib import Path

import torch

from graftline.digest import Digest, write_json
from graftline.errors import CheckpointError
from graftline.progress import OnProgress, silent
from graftline.weights.arch import read_architecture
from graftline.weights.disk import check_free_space
from graftline.weights.gguf import convert_gguf
from graftline.weights.reader import CheckpointReader, read_json_object
from graftline.weights.sidecars import copy_sidecars
from graftline.weights.writer import CheckpointWriter


def import_base(path: Path, out: Path, *, dtype: torch.dtype, on_progress: OnProgress = silent) -> Digest:
    """Write the base at ``path``, a GGUF file or a safetensors folder, to ``out`` with floats in ``dtype``.

    Config, tokenizer, chat template and licence come along; ``graftline-base.json`` records the digest, which is
    returned. Memory: about twice the largest tensor.

    Raises:
        CheckpointError: neither of the two kinds, damaged, quantized, of an unknown architecture, too little disk.
    """
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path, out, dtype=dtype, on_progress=on_progress)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a base; a .gguf file or a folder with safetensors files was expected")
    return _cast_folder(path, out, dtype, on_progress)


def _cast_folder(source: Path, out: Path, dtype: torch.dtype, on_progress: OnProgress) -> Digest:
    reader, config = CheckpointReader(source), read_json_object(source / "config.json")
    read_architecture(source)
    if "quantization_config" in config:
        method = config["quantization_config"]
        raise CheckpointError(
            f"{source} is quantized ({method.get('quant_method') if isinstance(method, dict) else method}); "
            "a dense base was expected: quantization is a later stage, with its own record"
        )
    names = reader.names()
    check_free_space(
        out, sum(reader.info(name).num_bytes * dtype.itemsize // reader.info(name).dtype.itemsize for name in names)
    )
    with CheckpointWriter(out) as writer:
        for done, name in enumerate(names, start=1):
            tensor = reader.read(name)
            writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
            on_progress(done, len(names))
        copy_sidecars(source, writer.stage)
        config.pop("torch_dtype", None)  # the old name of the key
        write_json(writer.stage / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        return writer.finish()
