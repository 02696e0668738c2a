"""Trainings side by side: how much sooner are adapters of one base trained in one process than one after another?

speed     blocks of the demo base's shape (random, NF4, 4 of 30 blocks), LoRA of other ranks, rates and seeds each, rows
          of 20 to 34 tokens: four trainings in turns (`graftline.train.together`) over one after another, both in
          one process that has the base in memory. Processor seconds; and whether every file is the same to the byte
memory    the most that a process of four trainings holds, both ways
stacked   the bound of the other way, one batch with the rows of all: a micro-batch of four times the rows over four,
          forward and backward with one adapter. Its products are of another shape, so its results are others
"""

from functools import partial
from pathlib import Path
from shutil import rmtree

import torch

from graftline.adapters.attach import attach
from graftline.adapters.peft_config import AdapterIdentity
from graftline.data.template import Encoded
from graftline.digest import of_folder
from graftline.settings import Adapter, Quantize, Train
from graftline.train.adapter import Folders, train_adapter
from graftline.train.batches import MicroBatch, pad_rows, use_row_attention
from graftline.train.devices import cpu_threads
from graftline.train.loss import SupervisedLoss
from graftline.train.together import Training, train_together
from graftline.weights.identity import read_identity
from graftline.weights.kept_base import keep_bases, load_base
from graftline.weights.model_folder import read_config
from graftline.weights.quant.folder import quantize_folder
from studies.harness import Json, Setting, cpu_seconds, peak_megabytes, ratio, turns
from studies.models import make_random, make_tokenizer

SHAPE = {"hidden": 576, "intermediate": 1536, "vocabulary": 8192, "blocks": 4}
TINY = {"hidden": 96, "intermediate": 128, "vocabulary": 512, "blocks": 2}
STEPS, TRAININGS = 5, 4
BATCHES = (1, 4, 16)


def speed(setting: Setting) -> Json:
    """Ratios by rows of a batch."""
    keep_bases()
    base = _base(setting)
    found: Json = {}
    for batch in setting.size(BATCHES, (4,)):
        folders = {side: setting.folder(f"{side}-{batch}") for side in ("alone", "beside")}
        sides = {side: partial(_seconds, side, base, out, batch) for side, out in folders.items()}
        with cpu_threads(setting.threads):
            seconds = turns(sides, setting.turns(5), seed=setting.seed)
        alone, beside = map(_adapters, folders.values())
        found[f"{batch} rows"] = {
            "beside_over_alone": ratio(seconds["beside"], seconds["alone"]),
            "seconds_alone": [round(each, 2) for each in seconds["alone"]],
            "same_bytes": alone == beside,
        }
    return {"trainings": TRAININGS, "steps": STEPS, **found}


def memory(setting: Setting) -> Json:
    """MB of both ways, each in a process of its own."""
    base = _base(setting)
    found = {side: setting.apart(_held, side, base, setting.folder(f"memory-{side}")) for side in ("alone", "beside")}
    return {"trainings": TRAININGS, "rows": 16, "megabytes": found}


def stacked(setting: Setting) -> Json:
    """Ratios by rows of a batch, for four trainings."""
    keep_bases()
    model = load_base(_base(setting))
    use_row_attention(model)
    attach(model, Adapter(method="lora", rank=8, alpha=16), seed=0)
    loss, found = SupervisedLoss(model.train()), {}
    with cpu_threads(setting.threads):
        for batch in setting.size(BATCHES, (4,)):
            rows = _rows(TRAININGS * batch, model.config.vocab_size)
            apart = [pad_rows(rows[start : start + batch]) for start in range(0, len(rows), batch)]
            sides = {
                name: partial(cpu_seconds, partial(_forward_and_backward, loss, micro_batches))
                for name, micro_batches in {"apart": apart, "at once": [pad_rows(rows)]}.items()
            }
            seconds = turns(sides, setting.turns(7), seed=setting.seed)
            found[f"{batch} rows"] = ratio(seconds["at once"], seconds["apart"])
    return {"trainings": TRAININGS, "at_once_over_apart": found}


def _forward_and_backward(loss: SupervisedLoss, micro_batches: list[MicroBatch]) -> None:
    for micro_batch in micro_batches:
        loss(micro_batch, num_supervised=torch.tensor(1)).backward()


def _base(setting: Setting) -> Path:
    folder = setting.work / "nf4"
    if not folder.exists():
        dense = make_random(setting.work / "dense", **setting.size(SHAPE, TINY))
        make_tokenizer(dense)
        quantize_folder(dense, folder, quantize=Quantize(method="nf4", double_quant=True))
    return folder


def _rows(count: int, vocabulary: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 35, (count,), generator=draw).tolist()
    return [
        Encoded(torch.randint(vocabulary, (length,), generator=draw).tolist(), [False] * (length - 2) + [True] * 2)
        for length in lengths
    ]


def _trainings(base: Path, out: Path, batch: int) -> list[Training]:
    """Trainings that are not done yet: ``out`` is a new folder each time."""
    identity, rows = AdapterIdentity(base_digest=read_identity(base).digest), _rows(96, read_config(base).vocab_size)
    return [
        partial(
            train_adapter,
            rows,
            [],
            settings=Train(steps=STEPS, batch_size=batch, learning_rate=1e-4 * number, seed=number, threads=1),
            adapter=Adapter(method="lora", rank=4 * number, alpha=16),
            identity=identity,
            folders=Folders(base=base, out=out / f"{number}", work=out / f"{number}-work", trackers=out / "trackers"),
            planned={},
        )
        for number in range(1, TRAININGS + 1)
    ]


def _seconds(side: str, base: Path, out: Path, batch: int) -> float:
    rmtree(out)
    return cpu_seconds(partial(_run, side, _trainings(base, out, batch)))


def _run(side: str, trainings: list[Training]) -> None:
    for group in [trainings] if side == "beside" else [[each] for each in trainings]:
        for error in train_together(group):
            if error:
                raise error


def _held(side: str, base: Path, out: Path) -> int:
    keep_bases()
    torch.set_num_threads(1)
    _run(side, _trainings(base, out, 16))
    return peak_megabytes()


def _adapters(folder: Path) -> list[str]:
    """Digests of the adapters' files."""
    return [str(digest) for path in sorted(folder.glob("*/adapter")) for digest in of_folder(path).values()]


PARTS = {"speed": speed, "memory": memory, "stacked": stacked}
