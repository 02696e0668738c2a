"""Initial adapter factors that were made together with a quantized base, beside its weights.

``adapter_init.safetensors`` holds ``<module>.lora_A`` (rank, in) and ``<module>.lora_B`` (out, rank), fp32. Their
digest is the base's ``pair``: `identity.check_pair` compares it with what an adapter was started from.
"""

from pathlib import Path

from torch import Tensor

from graftline.digest import Digest
from graftline.errors import CheckpointError
from graftline.weights.header import read_header
from graftline.weights.identity import combine, tensor_digest
from graftline.weights.reader import read_tensor

FACTORS_FILE = "adapter_init.safetensors"


def read_factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The factors in a model folder: module -> {"A": (rank, in), "B": (out, rank)}.

    Raises:
        CheckpointError: the folder has none, or the file is damaged.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for info in read_header(folder / FACTORS_FILE):
        module, _, kind = info.name.rpartition(".lora_")
        factors.setdefault(module, {})[kind] = read_tensor(info)
    incomplete = [module for module, parts in factors.items() if parts.keys() != {"A", "B"}]
    if incomplete:
        raise CheckpointError(
            f"{folder / FACTORS_FILE}: {incomplete[0]!r} has not exactly lora_A and lora_B; make it again"
        )
    return factors


def factors_digest(folder: Path) -> Digest:
    """Digest of the factors in a model folder, as `BaseIdentity.pair` records it.

    Raises:
        CheckpointError: as `read_factors`.
    """
    return combine([tensor_digest(info) for info in read_header(folder / FACTORS_FILE)])
