"""An adapter's two JSON files: PEFT's ``adapter_config.json``, and ``graftline.json``, which names its base."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from graftline.adapters.base import Method
from graftline.adapters.class_head import HEAD
from graftline.digest import Digest, write_json
from graftline.errors import AdapterError, BaseMismatchError, GraftlineError
from graftline.settings.model import Adapter, ExpertFactors
from graftline.weights.identity import BaseIdentity, check_pair

# ``adapter_config.json``: fields as in peft 0.21, ``tuners/lora/config.py`` and ``tuners/vera/config.py``. Targets are
# written resolved, never as ``all-linear``. A method that PEFT lacks gets a ``peft_type`` that PEFT refuses.

CONFIG_FILE = "adapter_config.json"
PEFT_VERSION = "0.21.2"
"""The release that the interchange tests run against."""

# Settings of peft 0.21 that change what an adapter computes and that no method here has.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def to_config(
    spec: Adapter,
    method: Method,
    *,
    targets: list[str],
    saved_modules: tuple[str, ...],
    transposed: bool,
    parameters: Collection[str] = (),
) -> dict[str, Any]:
    """The JSON object for ``adapter_config.json``.

    ``targets`` name exactly the adapted layers, ``parameters`` those of them that are experts. ``saved_modules`` are
    the full paths of the modules that are trained whole, because PEFT accepts any suffix of a path: ``norm`` would also
    mean ``input_layernorm``. ``transposed``: the base stores its weights as (I, O), as GPT-2 does.
    """
    config: dict[str, Any] = {
        "base_model_name_or_path": None,
        "bias": spec.bias,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "modules_to_save": sorted(saved_modules) or None,
        "peft_type": method.peft_type or f"GRAFTLINE_{method.name.upper()}",
        "peft_version": PEFT_VERSION,
        "r": spec.rank,
        "target_modules": sorted(name for name in targets if name not in parameters),
        "task_type": "SEQ_CLS" if HEAD in saved_modules else "CAUSAL_LM",
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
    if method.peft_type == "VERA":
        config |= {
            "d_initial": 0.1,
            "init_weights": True,
            "projection_prng_key": spec.projection_seed,
            "save_projection": True,
            "vera_dropout": spec.dropout,
        }
    else:
        config |= {
            "alpha_pattern": dict(spec.alpha_pattern),
            "init_lora_weights": True,
            "lora_alpha": spec.alpha,
            "lora_bias": False,
            "lora_dropout": spec.dropout,
            "rank_pattern": dict(spec.rank_pattern),
            "use_dora": method.name == "dora",
            "use_rslora": method.name == "rslora",
        }
    if spec.bias == "adapter_only":
        config["bias"] = "vera_only" if method.peft_type == "VERA" else "lora_only"
    return config


def method_of(config: dict[str, Any]) -> str:
    """The method's name for a file without ``graftline.json``.

    Raises:
        AdapterError: the method, or a setting of it, is not supported here.
    """
    peft_type = config.get("peft_type")
    if peft_type == "VERA":
        return "vera"
    if isinstance(peft_type, str) and peft_type.startswith("GRAFTLINE_"):
        return peft_type.removeprefix("GRAFTLINE_").lower()
    if peft_type != "LORA":
        raise AdapterError(f"adapter_config.json has peft_type {peft_type!r}; LORA and VERA can be loaded")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise AdapterError(
            f"adapter_config.json uses {', '.join(used)}, which no method here computes; merge it with PEFT "
            "(merge_and_unload) and take the result as a base"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        raise AdapterError(
            f"adapter_config.json has init_lora_weights {init!r}: its base is not the original but what that "
            "initialization left of it; save it with path_initial_model_for_weight_conversion, or save that base "
            "and write init_lora_weights: true"
        )
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def to_spec(
    config: dict[str, Any], *, method: str, layer_names: tuple[str, ...], extra_names: Iterable[str]
) -> Adapter:
    """The section of an adapter on disk, with full paths as targets and modules_to_save.

    ``layer_names`` are the layers that the file has tensors for, ``extra_names`` its other tensors, in which the saved
    modules are looked for.

    Raises:
        AdapterError: a value is missing, of the wrong type or out of range.
    """
    try:
        bias: Any = config.get("bias") or "none"
        spec = Adapter(
            method="lora",
            rank=config.get("r", 256 if method == "vera" else 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("vera_dropout" if method == "vera" else "lora_dropout", 0.0),
            targets=layer_names,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            bias="adapter_only" if str(bias).endswith("_only") else bias,
            modules_to_save=_saved_modules(config.get("modules_to_save") or (), extra_names),
            projection_seed=config.get("projection_prng_key", 0),
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise AdapterError(
            f"adapter_config.json: {place} is {first['input']!r}: {first['msg']}; correct the file, or save it again"
        ) from error
    except (TypeError, AttributeError) as error:
        raise AdapterError(f"adapter_config.json holds a value of the wrong type: {error}") from error
    if config.get("use_dora") and config.get("use_rslora"):
        raise AdapterError(
            "adapter_config.json has use_dora and use_rslora; DoRA is computed here with alpha / rank only"
        )
    # Some methods cannot be chosen in pipelines.yaml: `pissa` becomes QPiSSA on a quantized base.
    return spec.model_copy(update={"method": method})


def _saved_modules(suffixes: Iterable[str], extra_names: Iterable[str]) -> tuple[str, ...]:
    # PEFT's rule (utils/other.py, _set_trainable): a module is saved if its path ends in the text, even inside a name.
    suffixes, found = tuple(suffixes), set()
    for name in extra_names:
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts)))
        found.update(next(([path] for path in paths if path.endswith(suffixes)), []))
    return tuple(sorted(found))


# ``graftline.json`` records the base's digest, because an adapter on another base, or on the same base quantized
# differently, silently computes something else (peft #2105, #2270).

IDENTITY_FILE = "graftline.json"
_FORMAT = 1
_KEYS = {"format", "base_digest", "quantizer", "template_digest", "method", "training_run", "initial_digest"}
_OPTIONAL = {"labels", "experts"}


@dataclass(frozen=True, kw_only=True)
class AdapterIdentity:
    """What an adapter was trained on."""

    base_digest: Digest
    """Of the base in training (`graftline.weights.identity`); in older adapters of its weights alone."""
    quantizer: dict[str, Any] | None = None
    """The settings that made a quantized base; None for a dense one."""
    template_digest: Digest | None = None
    """Of the chat template and special tokens; None if the rows had none."""
    training_run: str | None = None
    """Names the run, for people."""
    initial_digest: Digest | None = None
    """Of the initial factors that it was started from, if the base was made together with them (LoftQ, QPiSSA)."""
    labels: tuple[str, ...] = ()
    """The classes of its head, in the order of its outputs; empty for an adapter that writes text."""
    experts: ExpertFactors = "each"
    """How its factors on experts were trained. PEFT's file does not say: it has a copy of a shared one for each."""

    def check(self, base: BaseIdentity, template_digest: Digest | None) -> None:
        """Refuse a base or a template that the adapter was not trained on.

        Raises:
            BaseMismatchError: both digests are named.
        """
        if not base.is_called(self.base_digest):
            raise BaseMismatchError(
                f"the adapter was trained on the base {self.base_digest} ({_describe(self.quantizer)}) and was "
                f"given the base {base.digest} ({_describe(base.quantizer)}); give it the base that it was trained on "
                "(weights, config.json and tokenizer as they were then), or train it again"
            )
        if template_digest is not None and self.template_digest not in (None, template_digest):
            raise BaseMismatchError(
                f"the adapter was trained with the chat template {self.template_digest} and was given "
                f"{template_digest}; "
                "use the tokenizer of its base, or train it again"
            )
        check_pair(base, self.initial_digest)


def write_identity(folder: Path, identity: AdapterIdentity, *, method: str) -> None:
    """Write ``graftline.json``."""
    record = {
        "format": _FORMAT,
        "base_digest": str(identity.base_digest),
        "quantizer": identity.quantizer,
        "template_digest": _text(identity.template_digest),
        "method": method,
        "training_run": identity.training_run,
        "initial_digest": _text(identity.initial_digest),
    }
    if identity.labels:  # other adapters' files stay as they always were
        record["labels"] = list(identity.labels)
    if identity.experts != "each":
        record["experts"] = identity.experts
    write_json(folder / IDENTITY_FILE, record)


def read_identity(folder: Path) -> tuple[AdapterIdentity, str] | None:
    """The identity and the method's name; None for an adapter of another tool. AdapterError if damaged."""
    file = folder / IDENTITY_FILE
    if not file.exists():
        return None
    record = read_object(file)
    if record.keys() - _OPTIONAL != _KEYS or record["format"] != _FORMAT or not isinstance(record["method"], str):
        raise AdapterError(
            f"{file} has format {record.get('format')!r} and the keys {', '.join(sorted(record))}; expected format "
            f"{_FORMAT} "
            f"with {', '.join(sorted(_KEYS))}; save the adapter again"
        )
    try:
        identity = AdapterIdentity(
            base_digest=Digest.parse(record["base_digest"]),
            quantizer=record["quantizer"],
            template_digest=_parse(record["template_digest"]),
            training_run=record["training_run"],
            initial_digest=_parse(record["initial_digest"]),
            labels=tuple(str(label) for label in record.get("labels", ())),
            experts=_parse_experts(record.get("experts", "each")),
        )
    except (GraftlineError, TypeError) as error:
        raise AdapterError(f"{file}: {error}; save the adapter again") from error
    return identity, record["method"]


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file; AdapterError if it is missing or something else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {file}: {error}; an adapter's JSON file was expected there") from error
    if not isinstance(record, dict):
        raise AdapterError(f"{file} holds a {type(record).__name__}; a JSON object was expected")
    return record


def _describe(quantizer: dict[str, Any] | None) -> str:
    return "dense" if quantizer is None else "quantized: " + ", ".join(f"{k}={v}" for k, v in sorted(quantizer.items()))


def _parse(text: str | None) -> Digest | None:
    return None if text is None else Digest.parse(text)


def _parse_experts(text: object) -> ExpertFactors:
    known: tuple[ExpertFactors, ...] = get_args(ExpertFactors)
    for kind in known:
        if text == kind:
            return kind
    raise AdapterError(f"experts is {text!r}; expected one of {', '.join(known)}")


def _text(digest: Digest | None) -> str | None:
    return None if digest is None else str(digest)
