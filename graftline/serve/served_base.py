"""A base model ready to serve: graph, tokenizer, adapters; and how a conversation becomes token ids.

Prompts are rendered with the template of training. With another one an adapter can lose all that it learned
(LLaMA-Factory #5232: 82 % before an export and 0 % after it).
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from filelock import FileLock
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from graftline.adapters.peft_config import CONFIG_FILE
from graftline.adapters.peft_format import AdapterWeights
from graftline.adapters.weights import WEIGHTS_FILE
from graftline.data.answer_parts import AnswerFormat, answer_format
from graftline.data.chat import template_options
from graftline.data.rows import Message
from graftline.data.template import TEMPLATES, encode_conversation, encode_text, stop_ids, template_digest
from graftline.digest import Digest, of_file, of_json
from graftline.errors import BaseMismatchError, DataError, ServingError
from graftline.export.onnx_export import (
    cached_graph,
    check_precision,
    graph_digest,
    graph_parameters,
    ort_values,
    read_parameters,
    write_parameters,
)
from graftline.export.onnx_session import GraphSession, Precision, Runner, Step
from graftline.export.served_models import check_supported
from graftline.plain_text import one_line
from graftline.serve.body import FieldError
from graftline.serve.generation import BusyError, LoadedModel
from graftline.serve.grammar import Grammars
from graftline.serve.token_bytes import TokenBytes
from graftline.weights.identity import BaseIdentity, read_identity
from graftline.weights.model_folder import load_tokenizer, read_config

Device = Literal["cpu", "cuda"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFile:
    """An ``.onnx_adapter`` file and the digest of everything that it was made of."""

    file: Path
    digest: Digest
    labels: tuple[str, ...] = ()
    """The classes of its head; empty for an adapter that writes text."""


@dataclass
class _Entry:
    loaded: "Future[tuple[Runner, int]]" = field(default_factory=Future)
    """The runner and its bytes, once they are read."""
    num_users: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in memory; 0 while they are being read."""
        return self.loaded.result()[1] if self.loaded.done() and not self.loaded.exception() else 0


class AdapterCache:
    """Adapters in memory, a limited number: the least recently used is dropped first, never one in use. Thread-safe.

    A new version of an adapter is another file and another entry, so running requests finish on the old one. The lock
    is not held while a file is read: only those that need the same adapter wait for it.

    Args:
        session: the graph.
        key: identifies the graph; requests with equal keys share batches.
        max_adapters: the most adapters in memory.
    """

    def __init__(self, session: GraphSession, *, key: str, max_adapters: int) -> None:
        self._key = key
        self.session, self.max_adapters = session, max_adapters
        self.num_loads = 0
        self._plain = session.runner()
        self._entries: OrderedDict[Digest, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, adapter: AdapterFile | None) -> Iterator[LoadedModel]:
        """The model with an adapter (None: the base alone), kept in memory while inside.

        Raises:
            BusyError: the cache is full of adapters in use.
            ExportError: the file cannot be read.
        """
        if adapter is None:
            yield LoadedModel(self._key, self.session, self._plain)
            return
        entry, is_new = self._take(adapter)
        try:
            if is_new:
                self._load(adapter, entry)
            runner, _ = entry.loaded.result()
            yield LoadedModel(f"{self._key}+{adapter.digest}", self.session, runner)
        finally:
            with self._lock:
                entry.num_users -= 1

    @property
    def num_bytes(self) -> int:
        """Memory of the loaded adapters."""
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries.values())

    def _take(self, adapter: AdapterFile) -> tuple[_Entry, bool]:
        """The entry of an adapter, with one more user, and whether it is new and has to be read."""
        with self._lock:
            entry = self._entries.get(adapter.digest)
            is_new = entry is None
            if entry is None:
                self._make_place()
                entry = self._entries[adapter.digest] = _Entry()
            self._entries.move_to_end(adapter.digest)
            entry.num_users += 1
            return entry, is_new

    def _load(self, adapter: AdapterFile, entry: _Entry) -> None:
        """Read the file of a new entry; on failure the entry is removed, and the next user tries again."""
        try:
            parameters = read_parameters(adapter.file)
            num_bytes = sum(value.tensor_size_in_bytes() for value in parameters.values())
            runner = self.session.runner(parameters)
        except BaseException as error:
            with self._lock:
                del self._entries[adapter.digest]
            entry.loaded.set_exception(error)
            raise
        entry.loaded.set_result((runner, num_bytes))
        with self._lock:
            self.num_loads += 1

    def _make_place(self) -> None:
        if len(self._entries) < self.max_adapters:
            return
        unused = next((digest for digest, entry in self._entries.items() if not entry.num_users), None)
        if unused is None:
            raise BusyError(f"all {self.max_adapters} places for adapters are in use; try again later", 1)
        del self._entries[unused]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How bases are run."""

    graphs: Path
    """Folder of exported graphs and adapter files."""
    precision: Precision = "fp32"
    num_threads: int = 0
    """Threads of one step; 0: the runtime chooses."""
    device: Device = "cpu"
    max_adapters: int = 16
    """Adapters of one base in memory."""


class Base:
    """A loaded base (or merged model), from a dense or 4-bit model folder; its graph is exported the first time.

    Raises:
        ExportError: the model has no serving graph.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder, self._runtime = folder, runtime
        check_precision(runtime.precision, runtime.device)
        check_supported(read_config(folder))  # before the weights are read
        self.identity: BaseIdentity = read_identity(folder)
        self.key = str(graph_digest(self.identity.digest, runtime.precision))
        """Identifies this base at this precision."""
        self.session = GraphSession(
            cached_graph(
                folder,
                runtime.graphs,
                precision=runtime.precision,
                device=runtime.device,
                base_digest=self.identity.digest,
            ),
            num_threads=runtime.num_threads,
            device=runtime.device,
        )
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self.token_bytes = TokenBytes(self.tokenizer)
        self.grammars = Grammars(self.tokenizer, self.session.layout.vocab_size)
        self._stop_tokens: dict[str, frozenset[int]] = {}
        self._formats: dict[str, AnswerFormat] = {}
        self.adapters = AdapterCache(self.session, key=self.key, max_adapters=runtime.max_adapters)

    def prepare_adapter(self, folder: Path) -> tuple[AdapterFile, str]:
        """Check an adapter folder and convert it for the graph; returns the file and the name of its template.

        The file is kept beside the graphs under the digest of everything that it depends on.

        Raises:
            BaseMismatchError: trained on another base, another quantizer or with another template.
            AdapterError, ExportError: the adapter is damaged or the graph cannot express it.
            ServingError: its logits are not finite.
        """
        weights = AdapterWeights.open(folder)
        weights.check_base(self.identity)
        template = check_template(weights, self.tokenizer)
        made_of = [str(of_file(folder / name)) for name in (WEIGHTS_FILE, CONFIG_FILE)]
        key = of_json([*made_of, self.key])
        file = self._runtime.graphs / f"{key.hex}.onnx_adapter"
        with FileLock(file.with_suffix(".lock")):  # of two simultaneous loads one converts and the other waits
            if not file.is_file():
                parameters = graph_parameters(weights, self.session.layout, self.folder)
                if not np.isfinite(self._probe(ort_values(parameters))).all():
                    raise ServingError(f"{folder}: the adapter's logits are not finite; train it again")
                write_parameters(parameters, file)
        return AdapterFile(file, key, weights.labels), template

    def encode_chat(
        self,
        turns: Sequence[Message],
        template: str,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        *,
        effort: str | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        ``options``: keyword arguments of the template; training and recorded answers give none. ``effort``: OpenAI's
        ``reasoning_effort``, which becomes one of them.

        Raises:
            FieldError: the template refuses such a conversation, does not show tools or does not read an option.
        """
        options = self._options(options or {}, effort, template, with_tools=bool(tools))
        called = any("tool_calls" in turn.fields for turn in turns)
        if (tools or called) and self.answer_format(template).calls is None:
            raise FieldError(
                "tools" if tools else "messages",
                "the model's chat template shows no tools, or no calls in a form that is known here; leave them out",
            )
        try:
            tokens = encode_conversation(turns, self.tokenizer, template=template, tools=tools, options=options)
        except Exception as error:  # templates are programs and may raise anything
            reason = error.__cause__ if isinstance(error, DataError) and error.__cause__ else error
            roles = ", ".join(turn.role for turn in turns[:10])
            raise FieldError(
                "messages", f"the model's chat template refuses a conversation of {roles}: {reason}"
            ) from error
        return self.check_tokens(tokens, name="messages")

    def _options(
        self, options: Mapping[str, Any], effort: str | None, template: str, *, with_tools: bool
    ) -> Mapping[str, Any]:
        """The template's keyword arguments; FieldError if it does not read one of them."""
        if not options and effort is None:
            return options
        known: frozenset[str] = frozenset()
        try:
            if template != "none":
                known = template_options(self.tokenizer, template, with_tools=with_tools)
        except (DataError, TemplateError) as error:
            raise FieldError("chat_template_kwargs", f"the model's chat template cannot be read: {error}") from error
        if unknown := sorted(set(options) - known):
            raise FieldError(
                "chat_template_kwargs",
                f"the model's chat template does not read {', '.join(map(one_line, unknown))}; it reads "
                f"{', '.join(sorted(known)) or 'no such arguments'}",
            )
        if effort is None:
            return options
        if "reasoning_effort" in known:
            return {"reasoning_effort": effort, **options}
        if effort == "none" and "enable_thinking" in known:
            return {"enable_thinking": False, **options}
        if effort == "medium":  # OpenAI's default, which clients send unasked
            return options
        raise FieldError(
            "reasoning_effort", f"the model's chat template does not read it, so {effort!r} has no effect; leave it out"
        )

    def answer_format(self, template: str) -> AnswerFormat:
        """How answers under a template are written: what encloses reasoning and calls of tools."""
        if template not in self._formats:
            self._formats[template] = answer_format(self.tokenizer, template)
        return self._formats[template]

    def encode_text(self, text: str, *, with_leading: bool = True) -> list[int]:
        """Token ids of a text to continue, after the tokenizer's leading special tokens if ``with_leading``."""
        return self.check_tokens(encode_text(text, self.tokenizer, with_leading=with_leading))

    def check_tokens(self, tokens: Sequence[int], *, name: str = "prompt") -> list[int]:
        """The token ids of the field ``name``; FieldError if one is not in the model's vocabulary."""
        wrong = next((token for token in tokens if not 0 <= token < self.session.layout.vocab_size), None)
        if wrong is not None:
            raise FieldError(name, f"token {wrong} is not in the vocabulary of {self.session.layout.vocab_size}")
        return list(tokens)

    def new_runner(self, adapter: AdapterFile | None) -> Runner:
        """A separate runner, for steps outside the scheduler."""
        return self.session.runner(None if adapter is None else read_parameters(adapter.file))

    def stop_tokens(self, template: str) -> frozenset[int]:
        """Tokens that end an answer: the template's, and the tokenizer's EOS.

        EOS alone where the template does not show how it ends an answer (some open answers with ``<think>``); none
        where the tokenizer has no EOS either, so that answers end by their length.
        """
        if template not in self._stop_tokens:
            try:
                found = stop_ids(self.tokenizer, template=template)
            except DataError as error:
                logger.warning("%s: answers end at EOS alone: %s", self.folder, error)
                found = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
            self._stop_tokens[template] = frozenset(found)
        return self._stop_tokens[template]

    def _probe(self, parameters: dict[str, object]) -> np.ndarray:
        tokens = [[token % self.session.layout.vocab_size for token in (1, 7, 42)]]
        runner = self.session.runner(parameters)
        return runner.step(self.session.new_cache(1, 4), Step(tokens, [3]))[0]


def best_device() -> Device:
    """``cuda`` if both ONNX Runtime, which computes, and torch, which holds keys and values, can use it."""
    has_provider = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return "cuda" if has_provider and torch.cuda.is_available() else "cpu"


def check_device(device: Device) -> None:
    """Raise ServingError if CUDA was asked for and ONNX Runtime or torch cannot use it."""
    if device == "cuda" and best_device() != "cuda":
        providers = ", ".join(onnxruntime.get_available_providers())
        raise ServingError(
            f"the device cuda was asked for; torch {'sees' if torch.cuda.is_available() else 'does not see'} a GPU, "
            f"ONNX Runtime has {providers}: install onnxruntime-gpu and its CUDA libraries, or serve on the cpu"
        )


def default_precision(device: Device) -> Precision:
    """``fp16`` on CUDA, whose attention does not support fp32; ``fp32`` on a CPU, which gives transformers' answers."""
    return "fp16" if device == "cuda" else "fp32"


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """``tokenizer`` if the tokenizer has a chat template, otherwise ``none``."""
    return "tokenizer" if tokenizer.chat_template else "none"


def check_template(weights: AdapterWeights, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of the template that an adapter was trained with; the default one if the adapter does not record it.

    Raises:
        BaseMismatchError: the tokenizer does not have it.
    """
    wanted = weights.identity.template_digest if weights.identity else None
    if wanted is None:
        return default_template(tokenizer)
    templates = _templates(tokenizer)
    if wanted not in templates:
        raise BaseMismatchError(
            f"the adapter was trained with the template {wanted}, the base's tokenizer gives "
            f"{', '.join(map(str, templates))}; serve it with the tokenizer that it was trained with"
        )
    return templates[wanted]


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[Digest, str]:
    """The templates that work with a tokenizer, by digest."""
    found: dict[Digest, str] = {}
    for name in TEMPLATES:
        try:
            found.setdefault(template_digest(tokenizer, name), name)
        except DataError:
            continue  # this tokenizer has no such template
    return found
