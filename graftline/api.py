"""The library's functions for Python scripts and notebooks: folders and rows in; an adapter, scores and a verdict out.

They need neither pipelines.yaml nor Prefect, DVC or S3. `graftline` exports each of them (``graftline.train_adapter``);
their names have two words because ``graftline.train`` and the like are packages.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters import attach, peft_format
from graftline.adapters.class_head import add_class_head, class_head_of
from graftline.adapters.peft_format import AdapterIdentity
from graftline.data.class_rows import class_rows
from graftline.data.encoding import encode_rows as _encode_rows
from graftline.data.rows import Row
from graftline.data.split import Split
from graftline.data.split import split_rows as _split_rows
from graftline.data.template import Encoded, check_template, template_digest
from graftline.digest import Digest
from graftline.errors import AdapterError, CheckpointError, TrainError
from graftline.evaluate import evaluation
from graftline.evaluate.scores import Scores
from graftline.export import targets
from graftline.export.targets import Compatibility, Target
from graftline.merge.fold import MergeReport, merge_folder
from graftline.plan import preflight
from graftline.plan.preflight import TrainingPlan
from graftline.settings.data import Overlength
from graftline.settings.model import Adapter, Device, Evaluate, FloatType, Precision, Quantize, Train
from graftline.train import trainer
from graftline.train.best import held_out_loss
from graftline.train.devices import DTYPES, resolve_device, resolve_precision, weight_dtype
from graftline.train.init import factors_of
from graftline.train.results import TrainResult
from graftline.weights.identity import BaseIdentity, check_pair, read_identity
from graftline.weights.model_folder import load_tokenizer, max_positions, read_config
from graftline.weights.quant.folder import initialize
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.low_rank import factors_digest, read_factors
from graftline.weights.quant.report import InitReport
from graftline.weights.quant.scheme import plan_of

AnyPath = str | Path


@dataclass(frozen=True)
class Model:
    """A model folder to work on, made by `open_model`. Weights are loaded when they are first needed."""

    folder: Path
    template: str
    """Chat template of its rows: ``none``, ``tokenizer`` or ``chatml``."""
    device: str
    """``cpu`` or ``cuda``."""
    precision: Precision
    """Number type of the base's dense weights in memory."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        return load_tokenizer(self.folder)

    @cached_property
    def network(self) -> PreTrainedModel:
        """The PyTorch module; adapters are attached to it in place."""
        return load_model(self.folder, device=self.device, dtype=DTYPES[self.precision])

    @cached_property
    def identity(self) -> BaseIdentity:
        """Digest of the base's weights; adapters carry it."""
        return read_identity(self.folder)


def open_model(
    folder: AnyPath, *, template: str = "tokenizer", device: Device = "auto", precision: Precision = "auto"
) -> Model:
    """Open a model folder: safetensors with config.json and a tokenizer, dense or made by `quantize_model`.

    Args:
        folder: the model folder.
        template: how a row is rendered: ``tokenizer`` uses the tokenizer's own chat template, ``chatml`` the common
            <|im_start|> form, ``none`` joins prompt and completion.
        device: ``auto`` uses a CUDA device if there is one.
        precision: number type of the dense weights in memory; ``auto`` is fp32 on a CPU and bf16 on CUDA.

    Raises:
        CheckpointError: there is no such folder.
        DataError: an unknown template, or one that does not fit the tokenizer.
        TrainError: a device or precision that this machine does not have.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a model: config.json, weights, tokenizer")
    kind = resolve_device(device)
    model = Model(Path(folder), template, kind, resolve_precision(precision, kind))
    check_template(model.tokenizer, template)
    return model


def split_rows(rows: Sequence[Row], evaluation_rows: int, *, seed: int = 0) -> Split:
    """Set rows aside for evaluation, so that no row has a duplicate or near-duplicate on the other side.

    Args:
        rows: rows from `read_rows`.
        evaluation_rows: how many to set aside.
        seed: selects which rows are set aside.

    Returns:
        ``training`` and ``evaluation``.

    Raises:
        DataError: there are not enough rows, or not enough without duplicates.
    """
    return _split_rows(rows, evaluation_rows, seed=seed, setting="evaluation_rows")


def encode_rows(
    model: Model, rows: Sequence[Row], *, max_tokens: int | None = None, overlength: Overlength = "error"
) -> tuple[Encoded, ...]:
    """Rows as token ids with a mask of the learned tokens: the answers and the token that ends them.

    Args:
        model: its tokenizer and template are used, its weights are not loaded.
        rows: rows from `read_rows` or `split_rows`.
        max_tokens: maximum length of a row; by default the model's context length.
        overlength: how to handle longer rows: ``error``, ``drop`` or ``truncate``.

    Raises:
        DataError: a row is too long, none is left, or the template does not fit a row.
    """
    if max_tokens is None:
        max_tokens = max_positions(read_config(model.folder))
    found = _encode_rows(rows, model.tokenizer, template=model.template, max_tokens=max_tokens, overlength=overlength)
    return tuple(found.encoded)


def plan_training(
    model: Model, rows: Sequence[Row], *, adapter: Adapter, train: Train, quantize: Quantize | None = None
) -> TrainingPlan:
    """Estimate a training run on this machine: trained parameters, memory by part, time, and what would fit instead.

    Args:
        model: the dense base. Its weights are not loaded.
        rows: training rows.
        adapter: the adapter to train.
        train: the training settings.
        quantize: how the base will be quantized; None: it stays dense.

    Returns:
        The plan; ``print(plan.text())`` shows it, ``plan.fits`` says whether the memory is free now.

    Raises:
        DataError, AdapterError, TrainError: the errors that the training would raise.
    """
    return preflight.plan(
        read_config(model.folder),
        encode_rows(model, rows),
        settings=train,
        adapter=adapter,
        quantization=plan_of(quantize).default if quantize and quantize.method != "none" else None,
    )


def quantize_model(
    source: AnyPath,
    out: AnyPath,
    quantize: Quantize,
    *,
    adapter: Adapter | None = None,
    seed: int = 0,
    rows: Sequence[Encoded] = (),
) -> InitReport:
    """Quantize a model folder, one tensor at a time; an interrupted call resumes where it stopped.

    Args:
        source: a dense model folder.
        out: the folder to create.
        quantize: the quantization settings.
        adapter: the adapter that will be attached; required for init ``loftq`` and ``qpissa``, which compute base and
            adapter together.
        seed: seed of the random projections of these two.
        rows: encoded training rows to calibrate on, some 128, where ``quantize.init`` has a weighting.

    Returns:
        Bits per weight and the error of every layer.

    Raises:
        CheckpointError: a damaged or unknown source, too little disk, ``out`` exists.
        QuantizeError: nothing to quantize, a source that is quantized already, ``adapter`` is missing.
    """
    factors = factors_of(adapter, Path(source)) if adapter and quantize.init_kind != "plain" else None
    ids = [row.input_ids for row in rows]
    return initialize(Path(source), Path(out), quantize=quantize, seed=seed, factors=factors, rows=ids)


def attach_adapter(model: Model, adapter: Adapter, *, seed: int = 0, labels: Iterable[str] = ()) -> attach.Coverage:
    """Freeze the model and add a new adapter to the layers that ``adapter.targets`` names.

    Args:
        model: changed in place; unchanged on any error.
        adapter: method, size and layers.
        seed: seed of the adapter's initial values.
        labels: classes; the adapter then gets a head that chooses one of them, for objective ``classify``.

    Returns:
        The covered layers; ``print(coverage.table())`` shows them.

    Raises:
        AdapterError: a target matches nothing, a rank exceeds a layer, the model already has an adapter, fewer than
            two labels.
        BaseMismatchError: the base was quantized together with another adapter.
    """
    if model.precision != "fp32" and weight_dtype(DTYPES[model.precision], adapter) is torch.float32:
        raise AdapterError(
            f"this adapter trains weights of the base, and the base is held in {model.precision}; "
            "open it with open_model(..., precision='fp32')"
        )
    initial = read_factors(model.folder) if model.identity.pair else None
    check_pair(model.identity, _initial_digest(model))
    if classes := tuple(labels):
        add_class_head(model.network, classes, seed=seed)
    return attach.attach(model.network, adapter, seed=seed, initial=initial)


def train_adapter(
    model: Model,
    rows: Sequence[Row],
    settings: Train,
    *,
    held_out: Sequence[Row] = (),
    work: AnyPath | None = None,
) -> TrainResult:
    """Train the attached adapter on the rows' answers. The base is unchanged.

    Args:
        model: with an adapter from `attach_adapter` or ``load_adapter(..., trainable=True)``. Changed in place.
        rows: training rows; `encode_rows` shows which tokens are learned.
        settings: steps or epochs, rows per step, learning rate and so on.
        held_out: rows that choose the best step, with ``settings.evaluate_every``.
        work: checkpoint folder: a killed run resumes from the newest checkpoint and ends with the same bytes. Without
            it nothing is written and a killed run starts over.

    Returns:
        Losses by step, tokens, seconds, peak memory.

    Raises:
        DataError: a row cannot be encoded or is longer than the model's context.
        TrainError: no adapter, a non-finite loss, checkpoints of another training run, too little memory.
    """
    precision = resolve_precision(settings.precision, resolve_device(settings.device))
    if model.precision not in ("fp32", precision):
        raise TrainError(
            f"train.precision is {precision}, but the model is held in {model.precision}; leave precision out, or "
            f"open the model with open_model(..., precision={precision!r})"
        )
    encoded = _learned_rows(model, rows, settings)
    score = held_out_loss(_learned_rows(model, held_out, settings), settings) if held_out else None
    if work is not None:
        return trainer.train(model.network, encoded, settings=settings, work=Path(work), evaluate=score)
    with tempfile.TemporaryDirectory(prefix="graftline-") as folder:
        settings = settings.replace(checkpoint_every=0)
        return trainer.train(model.network, encoded, settings=settings, work=Path(folder), evaluate=score)


def _learned_rows(model: Model, rows: Sequence[Row], settings: Train) -> Sequence[Encoded]:
    """Rows with the answers to write, or with the classes to choose."""
    if not settings.objective.classifies:
        return encode_rows(model, rows)
    head = class_head_of(model.network)
    if head is None:
        raise TrainError(
            "objective classify, and the model has no head; attach the adapter with attach_adapter(..., labels=...)"
        )
    return class_rows(rows, model.tokenizer, template=model.template, labels=head.labels)


def evaluate_model(
    model: Model,
    rows: Sequence[Row],
    *,
    labels: Iterable[str] = (),
    texts: Sequence[str] = (),
    settings: Evaluate | None = None,
) -> Scores:
    """Score the model on rows that it was not trained on.

    Args:
        model: with or without an adapter.
        rows: each is one item.
        labels: every allowed answer, for the metric ``accuracy``, chosen by the adapter's head if it has one; without
            them the rows' own answers are scored (metric ``nll``).
        texts: general text, one document each, for the metric ``forgetting_nll``.
        settings: what else to measure: free answers, general tasks.

    Returns:
        Scores per item; `judge` compares two such results.

    Raises:
        EvaluationError: nothing to score, an answer that is not among the labels, non-finite scores.
        BaseMismatchError: the base was quantized together with an adapter, and none is attached.
    """
    if not attach.has_adapter(model.network):
        check_pair(model.identity, None)
    section = settings or Evaluate(metric="accuracy")
    plan = evaluation.EvaluationPlan(rows, model.template, tuple(labels), texts, section)
    return evaluation.evaluate_model(model.network, model.tokenizer, plan)


def save_adapter(model: Model, folder: AnyPath) -> Digest:
    """Write the adapter: PEFT's two files, and graftline.json, which says which base it belongs to.

    Args:
        model: with an adapter.
        folder: created if missing; adapter files in it are replaced.

    Returns:
        Digest of the adapter's weights.

    Raises:
        AdapterError: the model has no adapter, or its values are not finite.
    """
    identity = AdapterIdentity(
        base_digest=model.identity.digest,
        quantizer=model.identity.quantizer,
        template_digest=template_digest(model.tokenizer, model.template),
        initial_digest=_initial_digest(model),
    )
    return peft_format.save_adapter(model.network, Path(folder), identity=identity)


def load_adapter(model: Model, folder: AnyPath, *, trainable: bool = False) -> None:
    """Load an adapter onto the model: one that `save_adapter` wrote, or PEFT's ``save_pretrained``.

    Args:
        model: without an adapter. Changed in place.
        folder: the adapter's folder.
        trainable: whether it will be trained further; otherwise it is frozen.

    Raises:
        BaseMismatchError: it was trained on another base or with another template.
        AdapterError: its files are damaged or do not fit.
    """
    digest = template_digest(model.tokenizer, model.template)
    peft_format.load_adapter(
        model.network, Path(folder), base=model.identity, template_digest=digest, trainable=trainable
    )


def merge_adapter(base: AnyPath, adapter: AnyPath, out: AnyPath, *, dtype: FloatType = "bfloat16") -> MergeReport:
    """Write a model folder with the adapter folded into its base, one tensor at a time.

    Args:
        base: the folder that the adapter was trained on, dense or quantized.
        adapter: the adapter's folder.
        out: the folder to create. It appears when it is complete.
        dtype: number type of the merged weights.

    Raises:
        MergeError: ``out`` exists, the method cannot be folded in, or a folded weight is not finite.
        BaseMismatchError: the adapter belongs to another base.
    """
    return merge_folder(Path(base), Path(adapter), Path(out), dtype=getattr(torch, dtype))


def export_adapter(base: AnyPath, adapter: AnyPath, out: AnyPath, *, target: Target) -> Compatibility:
    """Write an adapter for other software. ``graftline export`` also knows ``gguf`` and ``onnx``.

    Args:
        base: the folder that the adapter was trained on.
        adapter: the adapter's folder.
        out: a new folder.
        target: ``vllm``, ``peft`` or ``transformers``.

    Returns:
        What was changed, and the command that loads the adapter there.

    Raises:
        ExportError: the target cannot load it (all reasons are given), or ``out`` exists.
    """
    return targets.export_adapter(Path(adapter), Path(out), target=target, shape_of=targets.shapes_of(Path(base)))


def _initial_digest(model: Model) -> Digest | None:
    """Digest of the initial adapter values that the base was quantized with, if any."""
    return factors_digest(model.folder) if model.identity.pair else None
