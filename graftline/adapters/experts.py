"""Adapters on experts in PEFT's files (``target_parameters``, peft 0.21, ``tuners/lora/layer.py``, ParamWrapper).

    A  (E·R, I)    the experts' A one below the other
    B  (O, R·E)    column r·E + e is column r of expert e's B

PEFT wraps the module of the experts once for each adapted parameter, the first innermost. Keys say how deep, not what:
of two, ``experts.base_layer.lora_A.weight`` is that of gate_up_proj and ``experts.lora_A.weight`` that of down_proj;
one alone is ``experts.lora_A.weight``, and ``target_parameters`` says whose.

Dimensions: E = experts, R = rank, O = output features, I = input features.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from graftline.errors import AdapterError
from graftline.settings.model import ExpertFactors
from graftline.weights.experts import STACKS, Slot

_WRAPPED = ".base_layer"
_SHARED: dict[ExpertFactors, dict[str, str]] = {
    "each": {},
    "shared_a": dict.fromkeys(STACKS, "A"),
    "shared_outer": dict(zip(STACKS, "AB", strict=True)),
}
"""By stack, the factor that all of its experts share. Files have a copy of it for every expert."""


def to_matrices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A (E, R, I) and B (E, O, R) as the matrices of a file."""
    A_ERI, B_EOR = state["A"], state["B"]
    return {"A": A_ERI.flatten(0, 1), "B": B_EOR.permute(1, 2, 0).flatten(1)}


def from_matrices(state: Mapping[str, Tensor], rank: int, name: str) -> dict[str, Tensor]:
    """A (E, R, I) and B (E, O, R) from the matrices of a file; AdapterError if the rank does not divide them."""
    A, B = state["A"], state["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
        raise AdapterError(
            f"{name}: the file holds A {tuple(A.shape)} and B {tuple(B.shape)} for rank {rank}; expected (experts x "
            "rank, in) and (out, rank x experts): the adapter is damaged, or its rank is not the configuration's"
        )
    return {"A": A.unflatten(0, (-1, rank)), "B": B.unflatten(1, (rank, -1)).permute(2, 0, 1)}


def shared_factor(kind: ExpertFactors, name: str) -> str | None:
    """``A`` or ``B`` if all experts of the stack at path ``name`` have one together; None if each has its own."""
    return _SHARED[kind].get(name.rpartition(".")[2])


def one_for_all(state: Mapping[str, Tensor], factor: str | None, name: str) -> dict[str, Tensor]:
    """The state of a stack, (E, R, I) and (E, O, R), with a shared factor once instead of E times.

    Raises:
        AdapterError: the experts' copies of it differ.
    """
    if factor is None:
        return dict(state)
    copies = state[factor]
    different = [expert for expert, copy in enumerate(copies) if not torch.equal(copy, copies[0])]
    if different:
        raise AdapterError(
            f"{name}: {len(different)} experts, such as {different[0]}, have another {factor} than expert 0, and "
            f"graftline.json says that all have one; expected equal copies: another tool changed the file. Save the "
            "adapter again, or remove graftline.json, and it loads as experts: each"
        )
    return {**state, factor: copies[0]}


def fold_experts(weight: Tensor, state: Mapping[str, Tensor], scale: float, slot: Slot | None) -> Tensor:
    """W + s·B·A in fp32 for the matrix of one expert (O / parts, I), or for all at once (E, I, O), where slot is None.

    ``state`` is that of the whole stack, A (E, R, I) and B (E, O, R).
    """
    A_ERI, B_EOR = state["A"].float(), state["B"].float()
    if slot is None:
        # Only gpt-oss keeps them in one tensor, (E, I, O).
        return torch.baddbmm(weight.float(), A_ERI.transpose(1, 2), B_EOR.transpose(1, 2), alpha=scale)
    rows = slice(slot.part * len(weight), (slot.part + 1) * len(weight))
    return torch.addmm(weight.float(), B_EOR[slot.expert, rows], A_ERI[slot.expert], alpha=scale)


def paths_in_file(names: Iterable[str]) -> dict[str, str]:
    """Where each stack's factors are in a file: ``….experts.gate_up_proj`` to ``….experts.base_layer``."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_module[name.rpartition(".")[0]].append(name)
    paths: dict[str, str] = {}
    for module, own in by_module.items():
        own.sort(key=lambda name: STACKS.index(name.rpartition(".")[2]), reverse=True)
        paths |= {name: module + depth * _WRAPPED for depth, name in enumerate(own)}
    return paths


def names_in_file(paths: Iterable[str], parameters: Sequence[str]) -> dict[str, str]:
    """The stack whose factors are at each path of a file; paths of other layers are left out.

    ``parameters`` are the file's ``target_parameters``: ends of paths, as in PEFT.

    Raises:
        AdapterError: they name other parameters than the two that experts have, or not those that the file holds.
    """
    unknown = sorted(name for name in parameters if name.rpartition(".")[2] not in STACKS)
    if unknown:
        raise AdapterError(
            f"adapter_config.json has the target_parameters {', '.join(unknown)}; adapters on {' and '.join(STACKS)} "
            "of experts can be loaded: merge it with PEFT (merge_and_unload) and take the result as a base"
        )
    known = set(paths)
    found: dict[str, str] = {}
    for module in sorted(path for path in known if path.rpartition(".")[2] == "experts"):
        wanted = [f"{module}.{kind}" for kind in STACKS]
        names = [name for name in wanted if any(name == p or name.endswith(f".{p}") for p in parameters)]
        placed = {path: name for name, path in paths_in_file(names).items()}
        if not placed or not placed.keys() <= known or f"{module}{len(placed) * _WRAPPED}" in known:
            raise AdapterError(
                f"the adapter's tensors at {module} are not those of its target_parameters {list(parameters)}; it is "
                "incomplete: save it again"
            )
        found |= placed
    return found
