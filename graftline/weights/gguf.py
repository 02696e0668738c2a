"""Convert a GGUF file (llama.cpp) to a safetensors folder, one tensor at a time.

Names, permutations of query and key rows, config and tokenizer follow transformers' own GGUF reader, whose pieces are
used here without its loading of the whole model: its `save_pretrained` refuses a model that came from GGUF.
"""

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

from graftline.digest import Digest
from graftline.errors import CheckpointError
from graftline.progress import OnProgress, silent
from graftline.weights.arch import ARCHITECTURES
from graftline.weights.cast import cast
from graftline.weights.disk import check_free_space
from graftline.weights.writer import CheckpointWriter

# llama.cpp pre-tokenizers that split numbers into single digits before the GPT-2 pattern; transformers ignores the key.
_SINGLE_DIGITS = {"smollm"}
_LOG = logging.getLogger(__name__)


def convert_gguf(gguf_file: Path, out_folder: Path, *, dtype: torch.dtype, on_progress: OnProgress = silent) -> Digest:
    """Write the model in a GGUF file as safetensors with config, generation config, tokenizer and chat template.

    Weights are dequantized to fp32 and rounded once to ``dtype``. Memory: a few times the largest tensor in fp32.

    Raises:
        CheckpointError: not a GGUF file, an unsupported architecture, tensors missing, too little disk.
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
    """The config that transformers derives, with the class and dtype of what will be written."""
    try:
        config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{gguf_file}: transformers cannot derive a config from it: {error}") from error
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path  # the GGUF's title, not a path
    config.dtype = dtype
    return config


def _stored_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters that a checkpoint holds: of tied ones, only the one that the others point to."""
    tied = set(model.all_tied_weights_keys)
    return {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name not in tied}


def _processor(reader: GGUFReader, config: PreTrainedConfig) -> TensorProcessor:
    architecture = reader.fields["general.architecture"].contents()
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())


def _dense(tensor: Any, processor: TensorProcessor, shape: torch.Size) -> torch.Tensor:
    """One tensor in fp32, rows of queries and keys in transformers' order."""
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
    """config.json, generation_config.json, tokenizer files and chat template."""
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    pre = reader.fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() in _SINGLE_DIGITS:
        split = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.save_pretrained(folder)
