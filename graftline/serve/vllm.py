"""vLLM instead of this server: a folder with base and adapters as vLLM needs them, and the exact command.

    OUT/base/                 the base's weights (hard links where the disk allows it) and tokenizer
    OUT/adapters/NAME/        each adapter, rewritten so that it computes the same there (`graftline.export.targets`)
    OUT/chat_template.jinja   where the adapters were trained with another template than the tokenizer's
    OUT/serve.sh              the command

vLLM loads every ``*.safetensors`` of a folder without an index, even the initial factors of LoftQ and QPiSSA, so the
base gets a folder with its weights only. It stops at the ids of ``generation_config.json``, which are set to those of
the adapters' template. What vLLM cannot serve is refused before anything is written.
"""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from graftline.adapters.peft_format import AdapterWeights
from graftline.data.answer_parts import answer_format, opens_reasoning
from graftline.data.chat import template_text
from graftline.data.template import stop_ids
from graftline.digest import rename_synced, write_json, write_text
from graftline.errors import ServingError
from graftline.export.targets import check_target, export_adapter, shapes_of, vllm_rank_class
from graftline.serve.served_base import check_template, default_template
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.reader import INDEX_FILE, CheckpointReader, read_architecture, read_json_object
from graftline.weights.writer import copy_sidecars, writing

MAX_LORAS = 8
"""Adapters in one batch of vLLM: it reserves memory for each, at the largest rank."""
_GENERATION_CONFIG = "generation_config.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,199}")
_CALL_PARSERS = {"<tool_call>": "hermes", "<|tool_call|>": "granite", "[TOOL_CALLS]": "mistral", "": "llama3_json"}
"""vLLM's parser of calls by the tag that opens one (vLLM's page on tool calling)."""
_NO_CHAT = "{{ raise_exception('the adapters were trained without a chat template: ask on /v1/completions') }}\n"


@dataclass(frozen=True)
class VllmServing:
    """What was written for vLLM."""

    command: str
    """Serves the folder."""
    changes: tuple[str, ...]
    """What was rewritten in which adapter, without changing its outputs."""


def write_vllm_folder(out: Path, base: tuple[str, Path], adapters: Sequence[tuple[str, Path]]) -> VllmServing:
    """Write the new folder ``out``, which appears when it is complete, from (name, folder) of a base and its adapters.

    Raises:
        ServingError: vLLM cannot serve this (every reason is given), or ``out`` exists.
        BaseMismatchError: an adapter is for another base, or a template that the base's tokenizer does not have.
        AdapterError, CheckpointError: a folder is damaged.
    """
    if out.exists():
        raise ServingError(f"{out} exists; name a new folder")
    name, folder = base
    opened = [(adapter_name, AdapterWeights.open(path)) for adapter_name, path in adapters]
    tokenizer = load_tokenizer(folder)
    template = _check(folder, tokenizer, [name, *(adapter_name for adapter_name, _ in adapters)], opened)
    parsers = _parsers(tokenizer, template)
    changes = [f"{n}: {change}" for n, weights in opened for change in check_target(weights, "vllm").changes]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        making = Path(temporary) / "folder"
        _write_base(folder, making / "base", stop_ids(tokenizer, template=template))
        for adapter_name, path in adapters:
            export_adapter(path, making / "adapters" / adapter_name, target="vllm", shape_of=shapes_of(folder))
        if opened and template != default_template(tokenizer):
            text = _NO_CHAT if template == "none" else template_text(tokenizer, template)
            write_text(making / "chat_template.jinja", text)
        _write_script(making, name, parsers)
        rename_synced(making, out)
    return VllmServing(shlex.join(_command(out, name, parsers)), tuple(changes))


def _check(
    folder: Path, tokenizer: PreTrainedTokenizerBase, names: list[str], adapters: list[tuple[str, AdapterWeights]]
) -> str:
    """Refuse what vLLM cannot serve, with every reason; returns the template that all adapters were trained with."""
    identity = read_identity(folder)
    reasons = [f"{name!r} cannot be a model's name there" for name in names if not _NAME.fullmatch(name)]
    reasons += [f"the name {name!r} is given twice" for name in sorted(set(names)) if names.count(name) > 1]
    if _quantization(folder) == "graftline":
        reasons.append(f"vLLM has no code for the weights of {folder}; merge the adapter, or quantize to nf4 only")
    elif _quantization(folder) and (architecture := read_architecture(folder)).experts:
        reasons.append(
            f"vLLM does not read {folder}, a {architecture.name} as graftline quantizes it; merge the adapter, or "
            "train on the dense base"
        )
    templates: dict[str, str] = {}
    for name, weights in adapters:
        weights.check_base(identity)
        templates[name] = check_template(weights, tokenizer)
        reasons += [f"{name}: {reason}" for reason in check_target(weights, "vllm").reasons]
    if len(set(templates.values())) > 1:
        which = ", ".join(f"{name} with {template}" for name, template in templates.items())
        reasons.append(f"vLLM renders one chat template a server, the adapters were trained {which}; serve them apart")
    if reasons:
        raise ServingError("vLLM cannot serve this: " + "; ".join(reasons))
    return next(iter(templates.values()), default_template(tokenizer))


def _write_base(base: Path, out: Path, stops: Sequence[int]) -> None:
    out.mkdir(parents=True)
    copy_sidecars(base, out)
    reader = CheckpointReader(base)
    files = {reader.info(name).file for name in reader.names()}
    for file in sorted(files | {file for file in [base / INDEX_FILE] if file.is_file()}):
        with writing(out / file.name):
            _link(file, out / file.name)
    generation = read_json_object(out / _GENERATION_CONFIG) if (out / _GENERATION_CONFIG).is_file() else {}
    write_json(out / _GENERATION_CONFIG, generation | {"eos_token_id": list(stops)})


def _link(source: Path, target: Path) -> None:
    """Hard link where both are on one disk, otherwise copy (weights are never changed in place)."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _parsers(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """The flags with which vLLM takes this template's calls and reasoning apart; none for what it would read otherwise.

    vLLM takes an answer that closes no reasoning for reasoning alone, so every answer must close it.
    """
    form, vocabulary, words = answer_format(tokenizer, template), tokenizer.get_vocab(), list[str]()
    if (calls := form.calls) is not None:
        name = _CALL_PARSERS[calls.tags.opens]
        before, between, after = calls.written or ("", "", "")
        if name == "hermes" and "<function=" in template_text(tokenizer, template, with_tools=True):
            name = "qwen3_xml"
        # Phi-4-mini's calls begin as Granite's and are closed; newer ones of Mistral are not JSON.
        is_other = (name == "granite" and calls.tags.closes in after) or (
            name == "mistral" and not ('"name"' in before and '"arguments"' in between and "[TOOL_CALLS]" in vocabulary)
        )
        words += [] if is_other else ["--enable-auto-tool-choice", "--tool-call-parser", name]
    if form.reasoning is not None and {"<think>", "</think>"} <= vocabulary.keys():
        opener = opens_reasoning(tokenizer, template, form.reasoning)
        words += ["--reasoning-parser", {"prompt": "deepseek_r1", "answer": "qwen3"}[opener]] if opener else []
    return words


def _write_script(folder: Path, name: str, parsers: Sequence[str]) -> None:
    command = shlex.join(_command(folder, name, parsers, shown=Path()))
    file = folder / "serve.sh"
    write_text(file, f'#!/bin/sh\ncd "$(dirname "$0")" || exit 1\nexec {command} "$@"\n')
    file.chmod(0o755)


def _command(folder: Path, name: str, parsers: Sequence[str], *, shown: Path | None = None) -> list[str]:
    """The command's words for a folder; ``parsers``: see `_parsers`. ``shown``: the folder as the command writes it."""
    root = folder if shown is None else shown
    words = ["vllm", "serve", str(root / "base"), "--served-model-name", name]
    if _quantization(folder / "base") is not None:
        words += ["--quantization", "bitsandbytes"]
    if (folder / "chat_template.jinja").is_file():
        words += ["--chat-template", str(root / "chat_template.jinja")]
    words += parsers
    adapters = sorted((folder / "adapters").glob("*"))
    if not adapters:
        return words
    rank = max(AdapterWeights.open(adapter).spec.rank for adapter in adapters)
    num_slots = min(len(adapters), MAX_LORAS)
    words += ["--enable-lora", "--max-loras", str(num_slots), "--max-lora-rank", str(vllm_rank_class(rank))]
    if len(adapters) > num_slots:
        words += ["--max-cpu-loras", str(len(adapters))]
    return [*words, "--lora-modules", *(f"{a.name}={root / 'adapters' / a.name}" for a in adapters)]


def _quantization(folder: Path) -> str | None:
    """How the weights in a model folder are quantized, as its config.json says."""
    config = read_json_object(folder / "config.json").get("quantization_config")
    return str(config.get("quant_method")) if config else None
