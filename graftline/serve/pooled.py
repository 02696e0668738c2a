"""Answers that are no text: a prompt's class by an adapter's head, and embeddings of texts.

Both read prompts and write nothing, so they need no turn in the scheduler: one request after the other, each in steps
of a few prompts, on a runner of its own beside generation. Classes are read where training put them, at the last token
of the prompt as training rendered it. Embeddings are the hidden states after the final norm, pooled and scaled to
length 1: of the last token (the default of an adapter with a head, whose classes are learned there), or their mean.

Bodies and answers have vLLM's form for ``/classify`` and OpenAI's for ``/v1/embeddings``.

Shapes: B prompts of a step, T tokens, H hidden size, L classes.
"""

import asyncio
import base64
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool

from graftline.data.rows import Message
from graftline.export.onnx_session import Step
from graftline.serve.body import Body, FieldError, Neutral, contradiction
from graftline.serve.catalog import ServedModel
from graftline.serve.conversation import ChatMessage
from graftline.serve.generation import BusyError

MAX_INPUTS = 256
STEP_TOKENS, STEP_ROWS = 2048, 32
"""Tokens, padding included, and prompts of one step, at most; a single prompt may be longer."""
Input = str | list[int]
Pooling = Literal["last", "mean"]


class _Reading(Body):
    """The fields that both requests share."""

    labels: ClassVar[Mapping[str, type]] = {"request_id": str, "metadata": dict, "user": str}
    neutral: ClassVar[Neutral] = {"priority": (0,), "add_special_tokens": (True,), "truncate_prompt_tokens": (-1,)}

    model: str = Field(min_length=1, max_length=500)
    input: list[Input] = Field([])

    @field_validator("input", mode="plain")
    @classmethod
    def _several(cls, value: Any) -> list[Input]:
        """One text or list of token ids, or several of them."""
        entries = [value] if isinstance(value, str) or _is_ids(value) else value
        if not isinstance(entries, list) or not 0 < len(entries) <= MAX_INPUTS or not all(map(_is_input, entries)):
            raise PydanticCustomError(
                "prompt", f"takes a text or a list of token ids, or a list of 1 to {MAX_INPUTS} of them, none empty"
            )
        return list(entries)


class EmbeddingRequest(_Reading):
    """Body of ``/v1/embeddings``."""

    input: list[Input]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling | None = None
    """None: ``last`` for an adapter with a head, else ``mean``."""


class ClassifyRequest(_Reading):
    """Body of ``/v1/classify``: texts, each a prompt or a user's turn as in training, or one conversation."""

    neutral: ClassVar[Neutral] = {**_Reading.neutral, "use_activation": (True,), "activation": (True,)}

    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.input) == (self.messages is not None):
            raise contradiction("input", "or messages is needed, one of them")
        return self


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _is_input(value: Any) -> bool:
    is_text = isinstance(value, str) and bool(value) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return is_text or _is_ids(value)


@dataclass(frozen=True)
class Read:
    """What one prompt gave: a vector (H,), and the classes' log-probabilities (L,) where there is a head."""

    vector: np.ndarray
    classes: np.ndarray | None


class Reader:
    """Lets requests read one after the other, so that their caches take the memory of one step."""

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting, self._waiting = max_waiting, 0
        self._turn: asyncio.Lock | None = None

    async def read(self, served: ServedModel, prompts: Sequence[Sequence[int]], pooling: Pooling) -> list[Read]:
        """`read_prompts`, in a thread; BusyError where too many wait."""
        if self._waiting >= self._max_waiting:
            raise BusyError(f"{self._waiting} requests wait already; try again later", 1)
        self._turn = self._turn or asyncio.Lock()
        self._waiting += 1
        try:
            async with self._turn:
                return await run_in_threadpool(read_prompts, served, prompts, pooling)
        finally:
            self._waiting -= 1


def read_prompts(served: ServedModel, prompts: Sequence[Sequence[int]], pooling: Pooling = "last") -> list[Read]:
    """What a model's last layer, and its head if it has one, say of prompts, in their order.

    Raises:
        FieldError: a prompt is empty, or longer than the model's positions.
        BusyError: all places for adapters are in use.
    """
    most = served.base.session.layout.max_positions
    for prompt in prompts:
        if not 0 < len(prompt) <= most:
            raise FieldError("input", f"a prompt has {len(prompt)} tokens; expected 1 to {most}, the model's positions")
    found: dict[int, Read] = {}
    with served.base.adapters.use(served.adapter) as loaded:
        runner = loaded.runner.another()
        for places in _steps(prompts):
            tokens = [list(prompts[place]) for place in places]
            lengths = [len(each) for each in tokens]
            cache = loaded.session.new_cache(len(tokens), max(lengths))
            hidden, classes = runner.read(cache, Step(tokens, lengths, every_position=pooling == "mean"))
            for row, place in enumerate(places):
                found[place] = _pooled(hidden[row], None if classes is None else classes[row], lengths[row])
    return [found[place] for place in range(len(prompts))]


def _steps(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of the prompts that share a step, of similar length; the longest first, where memory peaks."""
    step: list[int] = []
    for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place])):
        if step and ((len(step) + 1) * len(prompts[step[0]]) > STEP_TOKENS or len(step) == STEP_ROWS):
            yield step
            step = []
        step.append(place)
    yield step


def _pooled(hidden: np.ndarray, logits: np.ndarray | None, length: int) -> Read:
    """From (H,) and (L,) at the last token, or (T, H) and (T, L) at every position."""
    if hidden.ndim == 2:
        hidden, logits = hidden[:length].mean(axis=0), None if logits is None else logits[length - 1]
    classes = None if logits is None else logits - np.logaddexp.reduce(logits)
    norm = float(np.linalg.norm(hidden))
    return Read(hidden / norm if norm else hidden, classes)


async def classify(reader: Reader, served: ServedModel, body: ClassifyRequest) -> dict[str, Any]:
    """The answer to ``/v1/classify``, in vLLM's form.

    Raises:
        FieldError: the model has no head, or the prompt cannot be encoded.
    """
    if not served.labels:
        raise FieldError("model", f"{body.model[:100]!r} has no head for classes; ask a model that has `labels`")
    prompts = await run_in_threadpool(_prompts, served, body)
    data = []
    for at, each in enumerate(await reader.read(served, prompts, "last")):
        assert each.classes is not None
        probabilities = np.exp(each.classes)
        data.append(
            {
                "index": at,
                "label": served.labels[int(probabilities.argmax())],
                "probs": probabilities.tolist(),
                "num_classes": len(served.labels),
            }
        )
    usage = _usage(prompts) | {"completion_tokens": 0, "prompt_tokens_details": None}
    about = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
    return about | {"model": body.model, "data": data, "usage": usage}


async def embed(reader: Reader, served: ServedModel, body: EmbeddingRequest) -> dict[str, Any]:
    """The answer to ``/v1/embeddings``, in OpenAI's form."""
    prompts = await run_in_threadpool(lambda: [_plain(served, each) for each in body.input])
    pooling = body.pooling or ("last" if served.labels else "mean")
    found = await reader.read(served, prompts, pooling)
    data = [
        {"object": "embedding", "index": at, "embedding": _written(each.vector, body.encoding_format)}
        for at, each in enumerate(found)
    ]
    return {"object": "list", "data": data, "model": body.model, "usage": _usage(prompts)}


def _usage(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    num_tokens = sum(map(len, prompts))
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _written(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "float":
        numbers: list[float] = vector.tolist()
        return numbers
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _prompts(served: ServedModel, body: ClassifyRequest) -> list[list[int]]:
    if body.messages is not None:
        return [served.base.encode_chat([message.turn for message in body.messages], served.template)]
    return [_as_trained(served, each) for each in body.input]


def _as_trained(served: ServedModel, given: Input) -> list[int]:
    if isinstance(given, str) and served.template != "none":
        return served.base.encode_chat([Message("user", given, supervised=False)], served.template)
    return _plain(served, given)


def _plain(served: ServedModel, given: Input) -> list[int]:
    if isinstance(given, str):
        return served.base.encode_text(given)
    return served.base.check_tokens(given, name="input")
