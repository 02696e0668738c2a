"""From a request's body to an answer in OpenAI's form, whole or as a stream of events."""

import asyncio
import codecs
import contextlib
import json
import secrets
import string
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from starlette.concurrency import run_in_threadpool

from graftline.data.answer_parts import AnswerReader, Call, Said, joined
from graftline.errors import ServingError
from graftline.serve.catalog import ServedModel
from graftline.serve.generation import Delta, Generation, SampledToken, Sampler, TextStream
from graftline.serve.guidance import guide
from graftline.serve.middleware import Ended, error_body
from graftline.serve.protocol import COMPLETION_TOKENS, MAX_NEW_TOKENS, ChatRequest, CompletionRequest, Generate
from graftline.serve.rollouts import REFUSAL_CHARACTERS
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


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, taken apart; the last one says why the answer ends."""

    said: Said
    tokens: tuple[SampledToken, ...]
    finish_reason: str | None


@dataclass
class RunningRequest:
    """A running request, and the pieces of its answer as they come."""

    generation: Generation
    served: ServedModel
    reader: AnswerReader
    deltas: "asyncio.Queue[Delta]"
    id: str
    created: int
    ended: Ended = "left"
    """``left`` until the last delta has come."""
    beginning: str = ""
    """Of the answer's words."""
    finish_reason: str | None = None
    kept: list[Said] | None = None
    """All of the answer so far, where it is logged."""

    @property
    def usage(self) -> dict[str, int]:
        """Token counts in OpenAI's form."""
        num_prompt, num_new = len(self.generation.prompt), len(self.generation.tokens)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}

    async def pieces(self, is_gone: Callable[[], Any]) -> AsyncIterator[Piece]:
        """Pieces until the last one; ends early when ``await is_gone()`` says that the client has disconnected.

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
                said = self.reader.push(delta.text, final=delta.finish_reason is not None)
                if len(self.beginning) < REFUSAL_CHARACTERS:
                    self.beginning += said.words
                if self.kept is not None:
                    self.kept.append(said)
                if delta.finish_reason is not None:
                    has_called = delta.finish_reason == "stop" and self.reader.num_calls > 0
                    self.ended, self.finish_reason = "answered", "tool_calls" if has_called else delta.finish_reason
                yield Piece(said, delta.choices, self.finish_reason)
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
        guidance = await run_in_threadpool(guide, body, prompt, served)
        generation = Generation(
            model=model,
            prompt=tuple(prompt),
            max_tokens=body.num_new_tokens or _default_tokens(body, prompt, served, scheduler),
            sampler=Sampler(body.sampling(body.num_logprobs), prompt, guidance.constraint),
            text=TextStream(served.base.token_bytes, body.stop, guidance.shown),
            stop_tokens=guidance.stop_tokens,
            emit=emit,
        )
        scheduler.submit(generation)
        kind = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        try:
            number = f"{kind}-{uuid.uuid4().hex}"
            yield RunningRequest(generation, served, guidance.reader, deltas, number, int(time.time()))
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

    def whole(self, exchange: RunningRequest, answer: Piece) -> dict[str, Any]:
        """The answer in one body."""
        choice = self._whole_choice(exchange, answer)
        return _envelope(exchange, self.kind, [choice]) | {"usage": exchange.usage}

    def first(self, exchange: RunningRequest) -> dict[str, Any] | None:  # noqa: B027 # completions have none
        """An event before the first token, or none."""

    def event(self, exchange: RunningRequest, piece: Piece) -> dict[str, Any] | None:
        """The event for one piece; None if it says nothing, as while a call is held back until it is complete."""
        has_tokens = piece.tokens and (self.with_logprobs or exchange.reader.is_plain)
        if not (piece.said or piece.finish_reason or has_tokens):
            return None
        return _envelope(exchange, self.event_kind, [self._event_choice(exchange, piece)])

    def usage(self, exchange: RunningRequest) -> dict[str, Any]:
        """The event with token counts."""
        return _envelope(exchange, self.event_kind, []) | {"usage": exchange.usage}

    @abstractmethod
    def _whole_choice(self, exchange: RunningRequest, answer: Piece) -> dict[str, Any]: ...

    @abstractmethod
    def _event_choice(self, exchange: RunningRequest, piece: Piece) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ChatForm(AnswerForm):
    """``/v1/chat/completions``."""

    with_reasoning: bool = True
    kind, event_kind = "chat.completion", "chat.completion.chunk"

    def first(self, exchange: RunningRequest) -> dict[str, Any]:
        """The event that opens the assistant's turn."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return _envelope(exchange, self.event_kind, [choice])

    def _whole_choice(self, exchange: RunningRequest, answer: Piece) -> dict[str, Any]:
        said = answer.said
        words = said.words or (None if said.reasoning or said.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": words, "refusal": None}
        if said.calls:
            message["tool_calls"] = [_call(call) for call in said.calls]
        return {
            "index": 0,
            "message": message | self._reasoning(said),
            "finish_reason": answer.finish_reason,
            "logprobs": self._logprobs(exchange, answer.tokens),
        }

    def _event_choice(self, exchange: RunningRequest, piece: Piece) -> dict[str, Any]:
        said, delta = piece.said, self._reasoning(piece.said)
        if said.words or not (said or piece.finish_reason):
            delta["content"] = said.words
        if said.calls:
            delta["tool_calls"] = [{"index": call.index} | _call(call) for call in said.calls]
        return {
            "index": 0,
            "delta": delta,
            "finish_reason": piece.finish_reason,
            "logprobs": self._logprobs(exchange, piece.tokens),
        }

    def _reasoning(self, said: Said) -> dict[str, Any]:
        return {"reasoning_content": said.reasoning} if said.reasoning and self.with_reasoning else {}

    def _logprobs(self, exchange: RunningRequest, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
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

    def _event_choice(self, exchange: RunningRequest, piece: Piece) -> dict[str, Any]:
        return self._whole_choice(exchange, piece)

    def _whole_choice(self, exchange: RunningRequest, answer: Piece) -> dict[str, Any]:
        logprobs, tokens = None, answer.tokens
        if self.with_logprobs:
            token_bytes = exchange.served.base.token_bytes
            logprobs = {
                "tokens": [token_bytes.text(one.token) for one in tokens],
                "token_logprobs": [_finite(one.logprob) for one in tokens],
                "top_logprobs": [_by_text(token_bytes, one) for one in tokens],
                "text_offset": [self.offsets.before(token_bytes, one.token) for one in tokens],
            }
        return {"index": 0, "text": answer.said.words, "finish_reason": answer.finish_reason, "logprobs": logprobs}


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
    said: list[Said] = []
    tokens: list[SampledToken] = []
    async for piece in exchange.pieces(is_gone):
        said.append(piece.said)
        tokens += piece.tokens
    return form.whole(exchange, Piece(joined(said), tuple(tokens), exchange.finish_reason or "stop"))


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
        async for piece in exchange.pieces(is_gone):
            if (event := form.event(exchange, piece)) is not None:
                yield _event(event | no_usage)
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


def _call(call: Call) -> dict[str, Any]:
    # Nine letters and digits: the only form that Mistral's templates accept when the call is sent back.
    number = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return {"id": number, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


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
