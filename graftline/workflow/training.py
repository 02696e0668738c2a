"""The train stage: rows are encoded, memory is planned, processes are started, checkpoints are found again.

Checkpoints are outside the stage's outputs, in ``runs/<pipeline>/.work/train-<digest of inputs>``, because DVC empties
the outputs before it runs a stage, and a killed training must be able to resume. Trackers write into
``runs/<pipeline>/trackers``.
"""

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from graftline import settings
from graftline.adapters.peft_format import AdapterIdentity
from graftline.address import store_address
from graftline.data.columns import EncodedColumns
from graftline.data.encoding import fit_declared, open_encoded
from graftline.data.row_file import RowFile
from graftline.data.template import template_digest
from graftline.digest import Digest, of_json
from graftline.errors import TrainError
from graftline.limits import usable_cores
from graftline.logs import Reporter
from graftline.plan.pipeline import classes_of, pairs_of, trained_and_held_out
from graftline.plan.preflight import check_fits
from graftline.registry import releases
from graftline.registry.store import open_store
from graftline.train.adapter import Folders, train_adapter
from graftline.train.checkpoint import newest_step
from graftline.train.devices import resolve_device
from graftline.train.distributed import launch, must_launch, num_processes, start_processes
from graftline.train.loop import NOT_LEARNED
from graftline.train.ray_workers import Cluster, train_with_ray
from graftline.weights.identity import BaseIdentity, check_pair, read_identity
from graftline.weights.model_folder import load_tokenizer, read_config
from graftline.weights.quant.low_rank import factors_digest
from graftline.weights.quant.scheme import plan_of
from graftline.workflow import resolve
from graftline.workflow.kept_checkpoints import kept_copies
from graftline.workflow.pinned_base import original_base, trained_base
from graftline.workflow.workspace import Workspace


def train_pipeline(pipeline: settings.Pipeline, at: Workspace, *, rows: Path, encoded: Path, out: Path) -> None:
    """Train the adapter, or resume a killed training; with several processes, start them with ``train.engine``.

    Args:
        pipeline: the settings.
        at: the pipeline's places.
        rows: the file of training rows.
        encoded: what the validate stage left of them.
        out: folder for the adapter and its figures (`graftline.train.adapter`).

    Raises:
        DataError: a row cannot be encoded.
        TrainError: the training cannot fit into memory, or its loss is not finite.
    """
    train = pipeline.train
    if num_processes() > 1:  # started by torchrun
        must_launch(train.processes)
        train_here(pipeline, at, rows=rows, encoded=encoded, out=out)
        return
    base = trained_base(pipeline.base, at)
    file = RowFile(rows)
    whole = _open_encoded(pipeline, at, load_tokenizer(base), file, encoded)
    trained_and_held_out(pipeline, file, whole, cache=at.encodings)  # so that not every process compares the rows
    start = parent_release(pipeline, at, read_identity(base))
    work = _checkpoints(pipeline, whole.origin, read_identity(base), at.runs / ".work", start)
    copies = partial(kept_copies, work, train.checkpoints, name=f"{at.name}/{work.name}")
    if train.engine == "ray":
        train_with_ray(
            partial(train_here, pipeline, at, rows=rows, encoded=encoded, out=out),
            name=f"{at.name}/{work.name}",
            cluster=Cluster(processes=train.processes, address=train.ray_address, device=train.device),
            folder=at.runs / ".work" / "ray",
            steps_kept=partial(newest_step, work),
            on_line=_tell,
            beside=copies,
        )
        return
    with copies():
        if must_launch(train.processes):
            launch(["tasks.train", at.name], processes=train.processes, on_line=_tell)
        else:
            train_here(pipeline, at, rows=rows, encoded=encoded, out=out)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def train_here(pipeline: settings.Pipeline, at: Workspace, *, rows: Path, encoded: Path, out: Path) -> None:
    """Train in this process, the only one or one of several that know each other; arguments as of `train_pipeline`."""
    train = pipeline.train
    # Each of several processes selects its own GPU before anything asks about one: free memory, capability, weights.
    start_processes(resolve_device(train.device))
    base = trained_base(pipeline.base, at)
    # Before the model is loaded: its initialization would otherwise take every core, whatever the pipeline says.
    torch.set_num_threads(train.threads or usable_cores())
    tokenizer = load_tokenizer(base)
    file = RowFile(rows)
    whole = _open_encoded(pipeline, at, tokenizer, file, encoded)
    training, held_out = (
        fit_declared(whole.take(part), pipeline.data).columns
        for part in trained_and_held_out(pipeline, file, whole, cache=at.encodings)
    )
    if train.objective.on_pairs:
        training = pairs_of(pipeline, file, training, tokenizer, Reporter("encode rejected", "rows"))
    if train.objective.classifies:
        training, held_out = (classes_of(pipeline, file, part, tokenizer) for part in (training, held_out))
    identity = read_identity(base)
    # LoftQ and QPiSSA made the base and the adapter's first values for each other.
    initial = factors_digest(base) if identity.pair else None
    check_pair(identity, initial)
    # Before anything is loaded: a training that cannot fit says what would.
    memory = check_fits(
        read_config(original_base(pipeline.base, at)),
        training,
        settings=train,
        adapter=pipeline.adapter,
        quantization=plan_of(pipeline.quantize).default if identity.quantizer else None,
    )
    start = parent_release(pipeline, at, identity)
    work = _checkpoints(pipeline, whole.origin, identity, at.runs / ".work", start)
    train_adapter(
        training,
        held_out,
        settings=train,
        adapter=pipeline.adapter,
        identity=AdapterIdentity(
            base_digest=identity.digest,
            quantizer=identity.quantizer,
            template_digest=template_digest(tokenizer, pipeline.base.template),
            training_run=f"{at.name}/{work.name}",
            initial_digest=initial,
            labels=pipeline.data.labels or () if train.objective.classifies else (),
        ),
        folders=Folders(
            base=base, out=out, work=work, trackers=at.runs / "trackers", start=start.adapter if start else None
        ),
        planned=memory.document(),
    )


def _open_encoded(
    pipeline: settings.Pipeline, at: Workspace, tokenizer: PreTrainedTokenizerBase, file: RowFile, encoded: Path
) -> EncodedColumns:
    return open_encoded(
        file,
        tokenizer,
        pipeline.data,
        template=pipeline.base.template,
        made=encoded,
        cache=at.encodings,
        on_progress=Reporter("encode", "rows"),
    )


@dataclass(frozen=True)
class ParentRelease:
    """The release that a training starts from: its version, its manifest's digest and its adapter's folder."""

    version: str
    digest: Digest
    adapter: Path


def parent_release(pipeline: settings.Pipeline, at: Workspace, base: BaseIdentity) -> ParentRelease | None:
    """The release that this run was resolved to start from, fetched; None for a fresh start.

    Raises:
        TrainError: it is for another base, or its manifest is not the one that was resolved.
    """
    if pipeline.train.start_from is None:
        return None
    found = resolve.load(at)["settings"]["train"][resolve.START]
    if found["version"] is None:
        return None
    version, digest = found["version"], Digest.parse(found["release"])
    folder = at.cache / "releases" / at.name / version
    store = open_store(store_address(pipeline.release.store, at.root))
    manifest = releases.fetch(store, at.name, version, folder, on_progress=Reporter(f"fetch {version}", "bytes"))
    if manifest.digest != digest:
        raise TrainError(
            f"train.start_from: {version} has the digest {manifest.digest}, {digest} was resolved: it was changed "
            "since; start the run again"
        )
    if not base.is_called(manifest.lineage.base_digest):
        raise TrainError(
            f"train.start_from: {version} was trained on the base {manifest.lineage.base_digest}, this pipeline's base "
            f"is {base.digest}; an adapter fits its own base alone: remove train.start_from for one fresh start"
        )
    return ParentRelease(version, digest, folder / "adapter")


def _checkpoints(
    pipeline: settings.Pipeline, rows: Digest, base: BaseIdentity, work: Path, start: ParentRelease | None
) -> Path:
    """The folder of this training's checkpoints, named by its inputs; those of other inputs are removed."""
    data = [pipeline.base.template, pipeline.data.max_tokens, pipeline.data.overlength]
    objective = pipeline.train.objective
    unread = {*NOT_LEARNED, "start_from", *(["objective"] if objective.kind == "supervised" else [])}
    train = pipeline.train.model_dump(exclude=unread)
    inputs = [str(base.digest), str(rows), pipeline.adapter.model_dump(), train, *data]
    inputs += [str(start.digest)] if start else []
    inputs += [{"labels": list(pipeline.data.labels or ())}] if objective.classifies else []
    own = work / f"train-{of_json(inputs).short}"
    for other in work.glob("train-*"):
        if other != own:
            shutil.rmtree(other, ignore_errors=True)  # another process of this training may be at it too
    return own
