"""Convert a base from outside into what the rest works on: a dense safetensors folder in one dtype."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from graftline.digest import Digest, write_json
from graftline.errors import CheckpointError
from graftline.logs import OnProgress, silent
from graftline.weights.cast import cast, type_name
from graftline.weights.model_folder import ModelReader, check_tensors, is_quantized, read_config
from graftline.weights.reader import ARCHITECTURES, read_json_object
from graftline.weights.writer import CheckpointWriter, check_free_space, copy_sidecars

# llama.cpp pre-tokenizers that split numbers into single digits before the GPT-2 pattern; transformers ignores the key.
_SINGLE_DIGITS = {"smollm"}
_LOG = logging.getLogger(__name__)


def convert_gguf(gguf_file: Path, out_folder: Path, *, dtype: torch.dtype, on_progress: OnProgress = silent) -> Digest:
    """Write the model in a GGUF file as safetensors with config, generation config, tokenizer and chat template.

    Uses the parts of transformers' GGUF reader without loading the whole model, which `save_pretrained` would refuse.
    Weights are dequantized to fp32 and rounded once to ``dtype``. Memory: a few times the largest tensor in fp32.

    Raises:
        CheckpointError: not a GGUF file, an unsupported architecture, tensors missing, too little disk space.
        NumberTypeError: a weight does not fit ``dtype``.
    """
    reader = _open(gguf_file)
    config = _read_config(gguf_file, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    _check_supported(gguf_file, config.architectures[0])
    parameters = _stored_parameters(model)
    check_free_space(out_folder, sum(p.numel() for p in parameters.values()) * dtype.itemsize)
    processor = _processor(reader, config)
    names = get_gguf_hf_weights_map(model, processor)
    missing = set(parameters)
    with CheckpointWriter(out_folder) as writer:
        for done, tensor in enumerate(reader.tensors, start=1):
            name = names.get(tensor.name)
            if name in missing:
                writer.add(name, cast(_dense(tensor, processor, parameters[name].shape), dtype, name))
                missing.remove(name)
            else:
                _LOG.info("GGUF tensor %s has no place in %s and is left out", tensor.name, type(model).__name__)
            on_progress(done, len(reader.tensors))
        if missing:
            raise CheckpointError(
                f"{gguf_file} lacks {len(missing)} tensors of {type(model).__name__}, for example {min(missing)}"
            )
        _write_sidecars(gguf_file, reader, config, writer.stage)
        return writer.finish()


def _open(gguf_file: Path) -> GGUFReader:
    try:
        return GGUFReader(gguf_file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{gguf_file} cannot be read as GGUF: {error}; fetch it again") from error


def _read_config(gguf_file: Path, dtype: torch.dtype) -> PreTrainedConfig:
    """The config that transformers derives, with the dtype that will be written."""
    try:
        config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{gguf_file}: transformers cannot derive a config from it: {error}") from error
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path  # the GGUF's title, not a path
    config.dtype = dtype
    return config


def _stored_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters that a checkpoint stores: of tied ones, one."""
    tied = set(model.all_tied_weights_keys)
    return {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name not in tied}


def _processor(reader: GGUFReader, config: PreTrainedConfig) -> TensorProcessor:
    architecture = reader.fields["general.architecture"].contents()
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())


def _dense(tensor: Any, processor: TensorProcessor, shape: torch.Size) -> torch.Tensor:
    """A tensor in fp32, query and key rows in transformers' order."""
    weights = dequantize(tensor.data, tensor.tensor_type)
    processed = processor.process(weights=weights, name=tensor.name).weights
    dense = torch.from_numpy(np.array(processed, dtype=np.float32))
    if dense.shape != shape:
        raise CheckpointError(
            f"GGUF tensor {tensor.name} has shape {tuple(dense.shape)}, its config asks for {tuple(shape)}"
        )
    return dense


def _check_supported(gguf_file: Path, name: str) -> None:
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{gguf_file} holds a {name}; expected one of {', '.join(sorted(ARCHITECTURES))}")


def _write_sidecars(gguf_file: Path, reader: GGUFReader, config: PreTrainedConfig, folder: Path) -> None:
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    pre = reader.fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() in _SINGLE_DIGITS:
        split = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.save_pretrained(folder)


def import_base(path: Path, out: Path, *, dtype: torch.dtype, on_progress: OnProgress = silent) -> Digest:
    """Write the base at ``path``, a GGUF file or a safetensors folder, to ``out`` with floats in ``dtype``.

    Config, tokenizer, chat template and licence are copied; ``graftline-base.json`` records the weights' digest; the
    base's is returned. Tensors get the names of the model's class (`ModelReader`). Memory: about twice the largest
    tensor.

    Raises:
        CheckpointError: neither of the two, damaged, incomplete, quantized, of an unknown architecture, or too little
            disk space.
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
            writer.add(reader.architecture.stored_name(name), cast(reader.read(name), dtype, name))
            on_progress(done, len(names))
        copy_sidecars(source, writer.stage)
        _write_config(reader, writer.stage, dtype)
        return writer.finish()


def _write_config(reader: ModelReader, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder's config.json with the class, the number type, and whether the head is tied."""
    config = read_json_object(reader.folder / "config.json")
    for name in ("torch_dtype", "quantization_config", "compression_config"):  # an old name; null
        config.pop(name, None)
    if read_config(reader.folder).tie_word_embeddings != reader.config.tie_word_embeddings:
        config["tie_word_embeddings"] = reader.config.tie_word_embeddings
    known = {"architectures": [reader.architecture.name], "dtype": type_name(dtype)}
    write_json(folder / "config.json", config | known)
