"""From a request's body to an answer in OpenAI's form, whole or as a stream of events."""

import asyncio
import codecs
import contextlib
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from starlette.concurrency import run_in_threadpool

from graftline.errors import ServingError
from graftline.serve.catalog import ServedModel
from graftline.serve.generation import Delta, Generation, SampledToken, Sampler, TextStream
from graftline.serve.middleware import Ended, error_body
from graftline.serve.protocol import COMPLETION_TOKENS, MAX_NEW_TOKENS, ChatRequest, CompletionRequest, Generate
from graftline.serve.scheduler import Scheduler
from graftline.serve.token_bytes import TokenBytes

_POLL_SECONDS = 0.5
_LEAST_LOGPROB = -9999.0
"""What OpenAI reports for an impossible token; JSON has no infinity."""
_FAILURES = {
    "error": "the server failed to compute this answer; its log says why",
    "cancelled": "the server stopped before this answer was complete; send the request again",
}


class GenerationFailedError(ServingError):
    """The server could not complete an answer."""


@dataclass
class RunningRequest:
    """A running request, and its deltas as they come."""

    generation: Generation
    served: ServedModel
    deltas: "asyncio.Queue[Delta]"
    id: str
    created: int
    ended: Ended = "left"
    """``left`` until the last delta has come."""

    @property
    def usage(self) -> dict[str, int]:
        """Token counts in OpenAI's form."""
        num_prompt, num_new = len(self.generation.prompt), len(self.generation.tokens)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}

    async def pieces(self, is_gone: Callable[[], Any]) -> AsyncIterator[Delta]:
        """Deltas until the last one; ends early when ``await is_gone()`` says that the client has disconnected.

        Raises:
            GenerationFailedError: a step failed, or the server stopped first.
        """
        last_look = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                delta = await asyncio.wait_for(self.deltas.get(), _POLL_SECONDS)
                if delta.finish_reason in ("error", "cancelled"):
                    self.ended = "failed"
                    raise GenerationFailedError(_FAILURES[delta.finish_reason])
                if delta.finish_reason is not None:
                    self.ended = "answered"
                yield delta
                if delta.finish_reason is not None:
                    return
            if time.monotonic() - last_look > _POLL_SECONDS:
                last_look = time.monotonic()
                if await is_gone():
                    return


@contextlib.asynccontextmanager
async def run(
    body: ChatRequest | CompletionRequest, prompt: list[int], served: ServedModel, scheduler: Scheduler
) -> AsyncIterator[RunningRequest]:
    """Submit a request; leaving the context cancels it if it still runs.

    Raises:
        BusyError: there is no room for the request or its adapter now.
        ServingError: the request can never fit.
    """
    loop, deltas = asyncio.get_running_loop(), asyncio.Queue[Delta]()

    def emit(delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, because the server has stopped
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

    with contextlib.ExitStack() as held:
        model = await run_in_threadpool(held.enter_context, served.base.adapters.use(served.adapter))
        asked = served.base.check_tokens(body.stop_token_ids, name="stop_token_ids")
        stop_tokens = served.base.stop_tokens(served.template) | frozenset(asked)
        constraint = None
        if (schema := body.schema_to_keep) is not None:
            constraint = await run_in_threadpool(served.base.grammars.constraint, schema, stop_tokens)
        generation = Generation(
            model=model,
            prompt=tuple(prompt),
            max_tokens=body.num_new_tokens or _default_tokens(body, prompt, served, scheduler),
            sampler=Sampler(body.sampling(body.num_logprobs), prompt, constraint),
            text=TextStream(served.base.token_bytes, body.stop),
            stop_tokens=stop_tokens,
            emit=emit,
        )
        scheduler.submit(generation)
        kind = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        try:
            yield RunningRequest(generation, served, deltas, f"{kind}-{uuid.uuid4().hex}", int(time.time()))
        finally:
            generation.cancelled = True


def _default_tokens(body: Generate, prompt: list[int], served: ServedModel, scheduler: Scheduler) -> int:
    room = scheduler.default_tokens(served.base.session.layout, len(prompt))
    return min(room, COMPLETION_TOKENS if isinstance(body, CompletionRequest) else MAX_NEW_TOKENS)


@dataclass(frozen=True)
class AnswerForm(ABC):
    """How one route writes answers; ``kind`` and ``event_kind``: OpenAI's names of a whole answer and of an event."""

    kind: ClassVar[str]
    event_kind: ClassVar[str]
    with_logprobs: bool

    def whole(self, exchange: RunningRequest, text: str, tokens: list[SampledToken], reason: str) -> dict[str, Any]:
        """The answer in one body; ``reason`` is why it ended."""
        choice = self._whole_choice(exchange, text, tokens, reason)
        return _envelope(exchange, self.kind, [choice]) | {"usage": exchange.usage}

    def first(self, exchange: RunningRequest) -> dict[str, Any] | None:  # noqa: B027 # completions have none
        """An event before the first token, or none."""

    def event(self, exchange: RunningRequest, delta: Delta) -> dict[str, Any]:
        """The event for one delta."""
        return _envelope(exchange, self.event_kind, [self._event_choice(exchange, delta)])

    def usage(self, exchange: RunningRequest) -> dict[str, Any]:
        """The event with token counts."""
        return _envelope(exchange, self.event_kind, []) | {"usage": exchange.usage}

    @abstractmethod
    def _whole_choice(
        self, exchange: RunningRequest, text: str, tokens: list[SampledToken], reason: str
    ) -> dict[str, Any]: ...

    @abstractmethod
    def _event_choice(self, exchange: RunningRequest, delta: Delta) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ChatForm(AnswerForm):
    """``/v1/chat/completions``."""

    kind, event_kind = "chat.completion", "chat.completion.chunk"

    def first(self, exchange: RunningRequest) -> dict[str, Any]:
        """The event that opens the assistant's turn."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return _envelope(exchange, self.event_kind, [choice])

    def _whole_choice(
        self, exchange: RunningRequest, text: str, tokens: list[SampledToken], reason: str
    ) -> dict[str, Any]:
        return {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": reason,
            "logprobs": self._logprobs(exchange, tokens),
        }

    def _event_choice(self, exchange: RunningRequest, delta: Delta) -> dict[str, Any]:
        return {
            "index": 0,
            "delta": {"content": delta.text} if delta.text or delta.finish_reason is None else {},
            "finish_reason": delta.finish_reason,
            "logprobs": self._logprobs(exchange, list(delta.choices)),
        }

    def _logprobs(self, exchange: RunningRequest, tokens: list[SampledToken]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            _token(exchange, one.token, one.logprob)
            | {"top_logprobs": [_token(exchange, token, logprob) for token, logprob in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}


@dataclass(frozen=True)
class CompletionForm(AnswerForm):
    """``/v1/completions``."""

    kind = event_kind = "text_completion"
    offsets: "TextOffsets" = field(default_factory=lambda: TextOffsets())

    def _event_choice(self, exchange: RunningRequest, delta: Delta) -> dict[str, Any]:
        return self._whole_choice(exchange, delta.text, list(delta.choices), delta.finish_reason)

    def _whole_choice(
        self, exchange: RunningRequest, text: str, tokens: list[SampledToken], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.with_logprobs:
            token_bytes = exchange.served.base.token_bytes
            logprobs = {
                "tokens": [token_bytes.text(one.token) for one in tokens],
                "token_logprobs": [_finite(one.logprob) for one in tokens],
                "top_logprobs": [_by_text(token_bytes, one) for one in tokens],
                "text_offset": [self.offsets.before(token_bytes, one.token) for one in tokens],
            }
        return {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}


class TextOffsets:
    """Characters of an answer before each of its tokens; a character counts once its last byte is there."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def before(self, token_bytes: TokenBytes, token: int) -> int:
        """Characters before the answer's next token."""
        count = self._num_characters
        if token_bytes.is_text(token):
            self._num_characters += len(self._decoder.decode(token_bytes.of(token)))
        return count


async def whole_answer(form: AnswerForm, exchange: RunningRequest, is_gone: Callable[[], Any]) -> dict[str, Any]:
    """Wait for the end of the answer; returns the body."""
    texts: list[str] = []
    choices: list[SampledToken] = []
    reason = "stop"
    async for delta in exchange.pieces(is_gone):
        texts.append(delta.text)
        choices += delta.choices
        reason = delta.finish_reason or reason
    return form.whole(exchange, "".join(texts), choices, reason)


async def events(
    form: AnswerForm, exchange: RunningRequest, body: Generate, is_gone: Callable[[], Any]
) -> AsyncIterator[str]:
    """Server-sent events, the last one ``[DONE]``; an error after the first event is an event too."""
    # With usage asked for, OpenAI sends it as null in every event but the last.
    no_usage = {"usage": None} if body.includes_usage else {}
    first = form.first(exchange)
    if first is not None:
        yield _event(first | no_usage)
    try:
        async for delta in exchange.pieces(is_gone):
            if delta.text or delta.choices or delta.finish_reason:
                yield _event(form.event(exchange, delta) | no_usage)
    except GenerationFailedError as error:
        yield _event(error_body(str(error), kind="server_error"))
    if body.includes_usage:
        yield _event(form.usage(exchange))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _envelope(exchange: RunningRequest, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": exchange.id,
        "object": kind,
        "created": exchange.created,
        "model": exchange.served.name,
        "choices": choices,
        "system_fingerprint": exchange.served.release,
    }


def _token(exchange: RunningRequest, token: int, logprob: float | None) -> dict[str, Any]:
    token_bytes = exchange.served.base.token_bytes
    return {
        "token": token_bytes.text(token),
        "logprob": _finite(logprob),
        "bytes": list(token_bytes.of(token)),
    }


def _by_text(token_bytes: TokenBytes, choice: SampledToken) -> dict[str, float | None]:
    """The alternatives by their text; where two have the same text, the more likely one."""
    return {token_bytes.text(token): _finite(logprob) for token, logprob in reversed(choice.top)}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)
