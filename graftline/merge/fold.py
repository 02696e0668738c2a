"""Fold an adapter into its base, one tensor at a time.

    W' = fold(W)  in fp32; LoRA: W + s·B·A; DoRA: (m / ‖W + s·B·A‖) ⊙ (W + s·B·A); the others: see their modules

One tensor is in memory at a time, so the peak is a few times the largest tensor. A 4-bit base is dequantized first,
because those are the weights that the adapter was trained on. The sum is rounded once, to the stored type (peft rounds
ΔW and the sum).

Dimensions: O = output features, I = input features.
"""

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graftline.adapters.peft_format import AdapterWeights
from graftline.digest import Digest, write_json
from graftline.errors import BaseMismatchError, MergeError
from graftline.logs import OnProgress, silent
from graftline.weights.cast import cast, is_finite, type_name
from graftline.weights.experts import slot_of
from graftline.weights.identity import BaseIdentity, read_identity
from graftline.weights.quant.folder import DequantizingReader
from graftline.weights.reader import read_json_object
from graftline.weights.writer import CheckpointWriter, copy_sidecars

logger = logging.getLogger(__name__)

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge."""

    digest: Digest
    """Digest of the merged weights."""
    base_digest: Digest
    """Digest of the folder that was folded into."""
    base_choice: Literal["dense", "dequantized", "original"]
    """What W is: the dense base, the 4-bit base dequantized, or the weights that it was quantized from."""
    dtype: str
    num_tensors: int
    num_folded: int
    untied: bool
    """Whether the base tied its embedding to its head and the merged model cannot."""
    largest_tensor_bytes: int
    """Size of the largest tensor in fp32; the working memory is at most four times this."""
    seconds: float


def merge_folder(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    original: Path | None = None,
    on_progress: OnProgress = silent,
) -> MergeReport:
    """Write the model folder ``out``: ``base`` with ``adapter`` folded in, as ``dtype``.

    Args:
        base: the model folder that the adapter was trained on, dense or 4-bit.
        adapter: a folder in PEFT's format with ``graftline.json``.
        out: the folder to make, which appears when it is complete.
        dtype: float32, float16 or bfloat16.
        original: fold into this folder instead, which the 4-bit ``base`` was quantized from.
        on_progress: called with (tensors done, all tensors).

    Raises:
        MergeError: ``out`` exists, a module of the adapter is not in the base, or a folded weight is not finite.
        NumberTypeError: a folded weight does not fit ``dtype``.
        BaseMismatchError: adapter, ``base`` and ``original`` do not belong together.
    """
    started = time.perf_counter()
    if dtype not in _FLOAT_TYPES:
        raise MergeError(f"cannot merge to {dtype}; give one of {', '.join(map(type_name, _FLOAT_TYPES))}")
    weights = AdapterWeights.open(adapter)
    if weights.head is not None:
        raise MergeError(
            f"{adapter} has a head for classes, for which a merged language model has no place; serve base and adapter "
            "(graftline serve), or export it (graftline export --target peft)"
        )
    source = _choose_base(base, weights, original)
    weights = weights.without_copies(source.reader.find)
    plan = _make_plan(source, weights)
    logger.info(
        "folding %d of %d tensors; working memory at most %.0f MB",
        len(plan.folded),
        len(plan.names),
        4 * plan.largest_tensor_bytes / 1e6,
    )
    with _writing(out) as writer:
        merged = _one_ahead(lambda name: _merged_tensor(name, plan, weights, dtype), plan.names)
        for done, (name, tensor) in enumerate(zip(plan.names, merged, strict=True), start=1):
            writer.add(source.reader.architecture.stored_name(name), tensor)
            on_progress(done, len(plan.names))
        _write_sidecars(source, writer.stage, dtype=dtype, untied=plan.untied)
        digest = writer.finish()
    return MergeReport(
        digest=digest,
        base_digest=source.identity.digest,
        base_choice=source.choice,
        dtype=type_name(dtype),
        num_tensors=len(plan.names),
        num_folded=len(plan.folded),
        untied=plan.untied,
        largest_tensor_bytes=plan.largest_tensor_bytes,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Source:
    reader: DequantizingReader
    folder: Path
    identity: BaseIdentity
    choice: Literal["dense", "dequantized", "original"]


def _choose_base(base: Path, weights: AdapterWeights, original: Path | None) -> _Source:
    identity = read_identity(base)
    weights.check_base(identity)
    if original is None:
        choice: Literal["dense", "dequantized"] = "dequantized" if identity.quantizer else "dense"
        return _Source(DequantizingReader(base), base, identity, choice)
    if identity.pair is not None:
        raise MergeError(
            f"{base} was made together with its adapter (LoftQ, QPiSSA): W ≈ Q + B·A holds only for that Q, so it "
            "cannot be folded into the weights before quantization; merge without `original`"
        )
    of_original = read_identity(original)
    if not of_original.is_called(identity.source_digest):
        raise BaseMismatchError(
            f"{original} has digest {of_original.digest}, but {base} was quantized from {identity.source_digest}; "
            "give the folder that it was quantized from"
        )
    return _Source(DequantizingReader(original), original, of_original, "original")


@dataclass(frozen=True)
class _Plan:
    """Which tensors are written, where each comes from, and what is folded into it."""

    reader: DequantizingReader
    names: tuple[str, ...]
    read_from: Mapping[str, str]
    """Name of the base's tensor, by the name that is written."""
    folded: Mapping[str, str]
    """Module of the adapter, by the name that is written."""
    replacements: Mapping[str, Tensor]
    """Whole tensors that the adapter holds, by the name that is written."""
    untied: bool
    largest_tensor_bytes: int


def _make_plan(source: _Source, weights: AdapterWeights) -> _Plan:
    """Raises MergeError if the adapter names a tensor that the base does not have."""
    names = source.reader.names()
    read_from = {name: name for name in names}
    folded = _folded_names(names, weights)
    replacements = weights.replacements()
    changed = set(folded) | set(replacements)
    architecture = source.reader.architecture
    if architecture.scales_embedding and weights.method.name == "dora" and architecture.embedding in weights.states:
        raise MergeError(
            f"{architecture.name} scales its embedding, and DoRA on it is defined in two ways (PEFT's answers before "
            "and after a merge differ); train it again with LoRA, or without the embedding"
        )
    head, embedding = f"{architecture.head}.weight", f"{architecture.embedding}.weight"
    tied = source.reader.config.tie_word_embeddings
    untied = tied and not weights.keeps_ties and not changed.isdisjoint({head, embedding})
    if untied:
        # The two names share one tensor, and only one of them changes: each gets its own tensor.
        read_from[head] = embedding
        names = list(dict.fromkeys([*names, head]))
    elif tied:
        # Some folders hold a copy of the embedding as the head, which would not follow a change of the embedding.
        names = [name for name in names if name != head]
    missing = sorted(changed - set(names))
    if missing:
        raise MergeError(
            f"{source.folder} has no tensor {missing[0]} ({len(missing)} of {len(changed)} tensors that the adapter "
            "changes are missing); the adapter was made for another architecture"
        )
    for name, tensor in replacements.items():
        shape = source.reader.info(read_from[name]).shape
        if tensor.shape != shape:
            raise MergeError(
                f"{name} has shape {tuple(tensor.shape)} in the adapter and {shape} in {source.folder}; the adapter "
                "was made for another base"
            )
    largest = max(4 * math.prod(source.reader.info(read_from[name]).shape) for name in names)
    return _Plan(source.reader, tuple(names), read_from, folded, replacements, untied, largest)


def _folded_names(names: Sequence[str], weights: AdapterWeights) -> dict[str, str]:
    """The module that is folded into each tensor: into one each, but of experts into the matrix of every expert."""
    by_expert = {name: slot.stack for name in names if (slot := slot_of(name)) and slot.stack in weights.experts}
    matrices = Counter(by_expert.values())
    for stack, found in matrices.items():
        expected = weights.num_experts(stack)
        if found not in (expected, 2 * expected):
            raise MergeError(
                f"{stack} has matrices of {found} tensors in the base, and the adapter is for {expected} experts; it "
                "was made for another base, or its rank is not the configuration's"
            )
    whole = {f"{module}.weight": module for module in weights.modules() if module not in matrices}
    return whole | by_expert


def _one_ahead(make: Callable[[str], Tensor], names: Sequence[str]) -> Iterator[Tensor]:
    """Each name's tensor in order; the next is computed while the caller hashes and writes this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(make, names[0])
        for following in names[1:]:
            tensor, pending = pending.result(), pool.submit(make, following)
            yield tensor
        yield pending.result()


def _merged_tensor(name: str, plan: _Plan, weights: AdapterWeights, dtype: torch.dtype) -> Tensor:
    tensor = plan.replacements.get(name)
    if tensor is None:
        tensor = plan.reader.read(plan.read_from[name])
    if not tensor.is_floating_point():
        return tensor
    module = plan.folded.get(name)
    if module is not None:
        tensor = weights.fold_weight(module, tensor.float(), slot_of(name))
    merged = cast(tensor, dtype, name)
    # A folded weight was checked in fp32.
    if module is None and not is_finite(merged):
        raise MergeError(
            f"{name} has values that are not finite in the base or the adapter; the training diverged: train again "
            "with a lower learning rate"
        )
    return merged


def _write_sidecars(source: _Source, folder: Path, *, dtype: torch.dtype, untied: bool) -> None:
    """Copy the tokenizer, template and generation settings, and write a config for the merged weights."""
    copy_sidecars(source.folder, folder)
    config = read_json_object(source.folder / "config.json")
    for name in ("quantization_config", "torch_dtype"):  # the latter is the old name of dtype
        config.pop(name, None)
    config |= {"dtype": type_name(dtype), "architectures": [source.reader.architecture.name]}
    if untied or not source.reader.config.tie_word_embeddings:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


@contextmanager
def _writing(out: Path) -> Iterator[CheckpointWriter]:
    """A writer whose staging folder is removed if the merge fails: merges are repeated, not resumed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out} exists; a merge overwrites nothing: remove it or choose another folder")
    with CheckpointWriter(out) as writer:
        try:
            yield writer
        finally:
            shutil.rmtree(writer.stage, ignore_errors=True)
