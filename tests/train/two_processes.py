"""What two processes under torchrun do in `test_distributed`: every base, replicated and sharded, in one start.

torchrun --nproc-per-node 2 -m tests.train.two_processes BASE [BASE …] OUT
"""

import json
import sys
from pathlib import Path
from typing import Literal

from graftline.adapters.attach import attach
from graftline.adapters.peft_format import AdapterIdentity, save_adapter
from graftline.settings.model import Adapter
from graftline.train.distributed import is_main, save_verified
from graftline.train.results import TrainResult
from graftline.train.trainer import train
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from tests.sections import train_section
from tests.train.rows import make_rows


def train_one(
    base: Path, work: Path, *, batch_size: int, sharding: bool, compile: Literal["auto", "always"] = "auto"
) -> TrainResult:
    """A LoRA adapter on a base, saved to ``work/adapter``."""
    model = load_model(base)
    attach(model, Adapter(method="lora", rank=4, alpha=8), seed=1)
    settings = train_section(
        steps=4,
        batch_size=batch_size,
        learning_rate=1e-2,
        checkpoint_every=2,
        device="cpu",
        sharding=sharding,
        compile=compile,
    )
    result = train(model, make_rows(40), settings=settings, work=work)
    known = read_identity(base)
    identity = AdapterIdentity(base_digest=known.digest, quantizer=known.quantizer)
    save_verified(lambda folder: save_adapter(model, folder, identity=identity), work / "adapter")
    return result


def main() -> None:
    *bases, out = map(Path, sys.argv[1:])
    for base in bases:
        for layout in ("replicated", "sharded"):
            work = out / f"{base.name}-{layout}"
            result = train_one(base, work, batch_size=4, sharding=layout == "sharded")
            if is_main():
                (work / "losses.json").write_text(json.dumps(result.losses))


if __name__ == "__main__":
    main()
