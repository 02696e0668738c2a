"""Read pipelines.yaml: all problems at once, each with its line, and every value with its origin."""

import difflib
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from graftline.address import mask_secrets, store_address
from graftline.errors import ConfigError
from graftline.plain_text import one_line
from graftline.settings.channels import Channel, Document, RequestLog
from graftline.settings.gate_metrics import is_anchored
from graftline.settings.model import Pipeline
from graftline.settings.rules import Problem, find_problems
from graftline.settings.tree import Path, Tree, check_read_alike, key_of, read_tree

# Names of settings in other tools, and what to write here instead.
#
# PEFT, Axolotl, LLaMA-Factory, TRL and transformers spell the same settings differently. Their keys are errors, like
# any unknown key, but the error says what to write.

_TARGETS = "`adapter.targets`: all-linear, a list of name endings, or a regular expression"
_FIXED_OUTPUT = "nothing: outputs always lie under runs/<pipeline>/"
_MASKING = "nothing: the loss is always over completions only"
_REPORT = "nothing: every run writes its metrics and one HTML report"

ALIASES: dict[str, str] = {
    # model
    "base_model": "`base.source`",
    "model": "`base.source`",
    "model_name": "`base.source`",
    "model_name_or_path": "`base.source`",
    "torch_dtype": "`base.dtype`",
    "trust_remote_code": "nothing: code from a model folder is never run",
    "chat_template": "`base.template`",
    # quantization
    "load_in_4bit": "`quantize.method: nf4`",
    "load_in_8bit": "`quantize.method: fp8` (8 bits in another code) or nf4",
    "quantization": "`quantize`",
    "quantization_bit": "`quantize.method: nf4` (4 bits), nf3, nf2 or fp8 (8 bits)",
    "quantization_method": "`quantize.method`",
    "bnb_4bit_quant_type": "`quantize.method: nf4`",
    "bnb_4bit_use_double_quant": "`quantize.double_quant`",
    "double_quantization": "`quantize.double_quant`",
    "bnb_4bit_compute_dtype": "`train.precision`",
    "loftq_config": "`adapter.method: loftq` and `quantize.init: loftq`",
    "loftq_bits": "`quantize.method`: nf4, nf3 or nf2",
    "loftq_iter": "`quantize.loftq_iterations`",
    # adapter
    "finetuning_type": "`adapter.method`",
    "peft_type": "`adapter.method`",
    "lora": "`adapter`",
    "r": "`adapter.rank`",
    "lora_r": "`adapter.rank`",
    "lora_rank": "`adapter.rank`",
    "lora_alpha": "`adapter.alpha`",
    "lora_dropout": "`adapter.dropout`",
    "vera_dropout": "`adapter.dropout`",
    "lora_target": _TARGETS,
    "lora_target_linear": "`adapter.targets: all-linear`",
    "lora_target_modules": _TARGETS,
    "target_modules": _TARGETS,
    "use_dora": "`adapter.method: dora`",
    "peft_use_dora": "`adapter.method: dora`",
    "use_rslora": "`adapter.method: rslora`",
    "peft_use_rslora": "`adapter.method: rslora`",
    "pissa_init": "`adapter.method: pissa`",
    "init_lora_weights": "`adapter.method: pissa` or `loftq`; lora starts with a zero update",
    "peft_init_lora_weights": "`adapter.method: pissa` or `loftq`; lora starts with a zero update",
    "projection_prng_key": "`adapter.projection_seed`",
    "reduction_factor": "`adapter.rank`, the bottleneck's width",
    # data
    "dataset": "`data.source`",
    "datasets": "`data.sources`, a list of sources",
    "train_file": "`data.source`",
    "cutoff_len": "`data.max_tokens`",
    "sequence_len": "`data.max_tokens`",
    "max_length": "`data.max_tokens`",
    "max_seq_length": "`data.max_tokens`",
    "model_max_length": "`data.max_tokens`",
    "max_samples": "`data.max_rows`",
    "val_size": "`data.evaluation_rows`, a number of rows",
    "val_set_size": "`data.evaluation_rows`, a number of rows",
    "sample_packing": "`train.packing`",
    "neat_packing": "`train.packing`",
    "padding_free": "`train.packing`",
    "pad_to_sequence_len": "nothing: batches are padded to their longest row",
    "train_on_inputs": _MASKING,
    "assistant_only_loss": _MASKING,
    "completion_only_loss": _MASKING,
    # training
    "micro_batch_size": "`train.batch_size`",
    "per_device_train_batch_size": "`train.batch_size`",
    "gradient_accumulation_steps": "`train.gradient_accumulation`",
    "lr": "`train.learning_rate`",
    "num_epochs": "`train.epochs`",
    "num_train_epochs": "`train.epochs`",
    "max_steps": "`train.steps`",
    "num_steps": "`train.steps`",
    "lr_scheduler": "`train.scheduler`",
    "lr_scheduler_type": "`train.scheduler`",
    "warmup_ratio": "`train.warmup_steps`, a number of steps",
    "optim": "`train.optimizer`",
    "bf16": "`train.precision: bf16`",
    "fp16": "`train.precision: fp16`",
    "save_steps": "`train.checkpoint_every`",
    "save_total_limit": "nothing: the last checkpoint is kept",
    "logging_steps": "nothing: every step is logged",
    "eval_steps": "`train.evaluate_every`",
    "early_stopping_patience": "`train.patience`",
    "loraplus_lr_ratio": "`train.lr_ratio_b`",
    "resume_from_checkpoint": "nothing: a killed training always resumes",
    "flash_attn": "nothing: PyTorch chooses the attention kernel",
    "per_device_eval_batch_size": "`evaluate.batch_tokens`, a number of tokens",
    "eval_batch_size": "`evaluate.batch_tokens`, a number of tokens",
    # output
    "output_dir": _FIXED_OUTPUT,
    "export_dir": _FIXED_OUTPUT,
    "logging_dir": "nothing: trackers write under runs/<pipeline>/trackers",
    "plot_loss": _REPORT,
}
"""Another tool's key to what to write instead; text after "write "."""


DEFAULT_FILE = "pipelines.yaml"


@dataclass(frozen=True)
class Setting:
    """One value of a pipeline for display, with secrets masked. ``origin`` is ``<file>:<line>`` or ``default``."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Config:
    """A checked pipelines.yaml. ``root`` is its folder, where relative paths in it start."""

    path: FilePath
    document: Document
    lines: dict[Path, int]

    @property
    def root(self) -> FilePath:
        """Folder of pipelines.yaml."""
        return self.path.parent

    @property
    def channels(self) -> dict[str, Channel]:
        """Channel policies by name."""
        return self.document.channels

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the pipelines, in the file's order."""
        return tuple(self.document.pipelines)

    def pipeline(self, name: str) -> Pipeline:
        """The pipeline of that name.

        Raises:
            ConfigError: there is none; the closest name is suggested.
        """
        if name not in self.document.pipelines:
            near = difflib.get_close_matches(name, self.names, n=1)
            advice = f"did you mean {near[0]}?" if near else f"add it to {self.path.name}"
            raise ConfigError(
                f"pipeline {name!r} is not in {self.path.name}; expected one of {', '.join(self.names)}; {advice}"
            )
        return self.document.pipelines[name]

    def known_channel(self, name: str, others: Sequence[str] = ()) -> str:
        """Return ``name`` if it is a declared channel or one of ``others``.

        Raises:
            ConfigError: it is neither; the closest name is suggested.
        """
        known = [*self.channels, *(other for other in others if other not in self.channels)]
        if name in known:
            return name
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"channel {name!r} is not in {self.path.name}; expected one of {', '.join(map(one_line, known))}{advice}"
        )

    def is_anchored(self, name: str) -> bool:
        """Whether a pipeline's candidates are compared with its channel's anchor."""
        pipeline = self.pipeline(name)
        return is_anchored(self.channels[pipeline.release.channel], pipeline.gates)

    def store_url(self, name: str) -> str:
        """The release store of a pipeline: s3:// and file:// unchanged, a folder as an absolute path."""
        return store_address(self.pipeline(name).release.store, self.root)

    def request_log(self, channel: str) -> RequestLog | None:
        """A channel's request log, its store as from `store_url`; None: nothing is kept."""
        section = self.channels[channel].request_log
        return section and section.replace(store=store_address(section.store, self.root))

    def show(self, name: str) -> list[Setting]:
        """Every value of a pipeline and where it came from."""
        values = self.pipeline(name).model_dump(mode="json")
        return list(self._settings(values, ("pipelines", name), depth=2))

    def _settings(self, value: Any, path: Path, *, depth: int) -> Iterator[Setting]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from self._settings(item, (*path, key), depth=depth)
            return
        key = ".".join(str(part) for part in path[depth:])
        yield Setting(key, _masked(value), self.origin(path))

    def origin(self, path: Path) -> str:
        """The origin of a value: ``<file>:<line>``, or ``default`` if the file does not give it."""
        line = self.lines.get(path)
        return "default" if line is None else f"{self.path.name}:{line}"


def _masked(value: Any) -> Any:
    if isinstance(value, list):
        return [_masked(item) for item in value]
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    return mask_secrets(value) if isinstance(value, str) else value


def load(path: str | FilePath = DEFAULT_FILE) -> Config:
    """Read and check pipelines.yaml.

    Raises:
        ConfigError: with every problem: its line, key, what was given, what was expected, what to do.
    """
    path = FilePath(path)
    check_folder_name(path.absolute().parent)
    try:
        with path.open("rb") as stream:
            data = stream.read(10_000_000)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror or error}; run in the project's folder, or make one: "
            "`graftline init NAME`"
        ) from error
    return parse_config(data, path)


def check_folder_name(folder: FilePath) -> None:
    """Refuse a project's folder whose name is not UTF-8: git, DVC and JSON could not write it down.

    Raises:
        ConfigError: with the bytes that are not.
    """
    if sys.getfilesystemencoding() != "utf-8":
        return  # Names are then read as something else; a flow refuses that itself.
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the project's folder {one_line(str(folder))} has a name with bytes that are not UTF-8; rename it (convmv "
            "-f latin1 -t utf8 renames many)"
        ) from error


def parse_config(data: bytes, path: FilePath) -> Config:
    """`load` for bytes that were already read; ``path`` names them in errors."""
    tree = read_tree(data, path.name)
    check_read_alike(data, tree, path.name)
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{path.name}:1: given {_short(tree.value)}; expected the keys `pipelines` and `channels`")
    try:
        # JSON's rules: lists become tuples and text becomes times, but "8" is not a number and 1.5 is not an integer.
        document = Document.model_validate_json(json.dumps(tree.value))
    except ValidationError as error:
        raise _config_error(list(_field_problems(error, tree)), tree, path.name) from error
    problems = find_problems(document)
    if problems:
        raise _config_error(problems, tree, path.name)
    return Config(path.resolve(), document, tree.lines)


def schema() -> dict[str, Any]:
    """JSON Schema of pipelines.yaml, for editors."""
    return Document.model_json_schema()


def _config_error(problems: Sequence[Problem], tree: Tree, name: str) -> ConfigError:
    ordered = sorted(problems, key=lambda problem: tree.line(problem.path))
    texts = [f"{name}:{tree.line(p.path)}: {key_of(p.path)}: {p.message}" for p in ordered]
    return ConfigError(texts[0] if len(texts) == 1 else f"{len(texts)} problems\n  " + "\n  ".join(texts))


def _field_problems(error: ValidationError, tree: Tree) -> Iterator[Problem]:
    """Pydantic's errors in our words; several errors at one place (from a union of types) become one."""
    merged: dict[Path, list[Any]] = {}
    for item in error.errors(include_url=False):
        location = tuple(item["loc"])
        path = location if item["type"] in ("missing", "extra_forbidden") else tree.written(location)
        merged.setdefault(path, []).append(item)
    for path, items in merged.items():
        yield Problem(path, _explain(path, items))


def _explain(path: Path, items: list[Any]) -> str:
    kind = items[0]["type"]
    field = _find_field(path)
    purpose = " ".join((field.description or "").split()) if field else ""
    if kind == "missing":
        return f"missing; expected: {purpose}"
    if kind == "extra_forbidden":
        return f"unknown key; {_suggest(path)}"
    if items[0]["loc"][-1] == "[key]" and kind == "literal_error":
        near = difflib.get_close_matches(str(path[-1]), _names(path[:-1]), n=1)
        advice = f"; did you mean {near[0]}?" if near else ""
        return f"given {path[-1]!r}; expected {_expectation(items[0])}{advice}"
    if items[0]["loc"][-1] == "[key]":
        return f"given {path[-1]!r} as a name; expected small letters, digits and single hyphens between them"
    expected = " or ".join(dict.fromkeys(_expectation(item) for item in items))
    return f"given {_short(items[0]['input'])}; expected {expected}" + (f". {purpose}" if purpose else "")


def _expectation(item: Any) -> str:
    context = item.get("ctx", {})
    texts = {
        "too_short": f"at least {context.get('min_length')} of them",
        "too_long": f"at most {context.get('max_length')} of them",
        "string_pattern_mismatch": f"text of the form {context.get('pattern')}",
        "model_type": "a mapping (key: value lines)",
        "dict_type": "a mapping (key: value lines)",
        "tuple_type": "a list",
        "string_type": "text",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
    }
    return texts.get(item["type"], str(item["msg"]).removeprefix("Input should be ").removeprefix("Input should "))


def _suggest(path: Path) -> str:
    key, parent = str(path[-1]), path[:-1]
    known = _keys(parent)
    if key in ALIASES:
        return f"that is another tool's name; write {ALIASES[key]}"
    owners = [name for name, field in Pipeline.model_fields.items() if key in _model_fields(field.annotation)]
    if owners:
        return f"it belongs to the section `{owners[0]}`"
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"expected one of {', '.join(known)}"


def _find_field(path: Path) -> FieldInfo | None:
    """The model field that a path leads to, or None (a name that the user chose, an item of a list)."""
    annotation: Any = Document
    field: FieldInfo | None = None
    for part in path:
        fields = _model_fields(annotation)
        if fields:
            field = fields.get(str(part))
            annotation = field.annotation if field else None
        else:
            field, annotation = None, _element(annotation)
    return field


def _keys(path: Path) -> list[str]:
    annotation: Any = Document
    for part in path:
        fields = _model_fields(annotation)
        annotation = fields[str(part)].annotation if fields and str(part) in fields else _element(annotation)
    return list(_model_fields(annotation))


def _names(path: Path) -> list[str]:
    """The allowed keys of a mapping that restricts them, as `resources` does."""
    field = _find_field(path)
    return [str(name) for name in typing.get_args(typing.get_args(field.annotation)[0])] if field else []


def _model_fields(annotation: Any) -> dict[str, FieldInfo]:
    """Fields of a model or an optional model; empty for anything else."""
    for candidate in (annotation, *typing.get_args(annotation)) if _is_union(annotation) else (annotation,):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate.model_fields
    return {}


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _element(annotation: Any) -> Any:
    """Type of the values of ``dict[K, V]`` or of the items of ``tuple[V, ...]``."""
    arguments = typing.get_args(annotation)
    if not arguments:
        return None
    return arguments[1] if typing.get_origin(annotation) is dict else arguments[0]


def _short(value: Any) -> str:
    text = mask_secrets(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."
