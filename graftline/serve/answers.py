"""From a request's body to an answer in OpenAI's form, whole or as a stream of events."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool

from graftline.errors import ServingError
from graftline.serve.catalog import ServedModel
from graftline.serve.generation import Delta, Generation
from graftline.serve.protocol import ChatRequest, CompletionRequest, Generate
from graftline.serve.sampling import Choice, Sampler
from graftline.serve.scheduler import Scheduler
from graftline.serve.text import TextStream

_POLL_SECONDS = 0.5


class GenerationFailedError(ServingError):
    """A step failed inside the server."""


@dataclass
class Exchange:
    """One request that runs, and its deltas as they come."""

    generation: Generation
    served: ServedModel
    deltas: "asyncio.Queue[Delta]"
    id: str
    created: int

    @property
    def usage(self) -> dict[str, int]:
        """Token counts in OpenAI's form."""
        num_prompt, num_new = len(self.generation.prompt), len(self.generation.tokens)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}

    async def pieces(self, is_gone: Callable[[], Any]) -> AsyncIterator[Delta]:
        """Deltas until the last one; ends early when ``await is_gone()`` says that the client left.

        Raises:
            GenerationFailedError: a step failed.
        """
        last_look = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                delta = await asyncio.wait_for(self.deltas.get(), _POLL_SECONDS)
                if delta.finish_reason == "error":
                    raise GenerationFailedError("the server failed to compute this answer; its log says why")
                yield delta
                if delta.finish_reason is not None:
                    return
            if time.monotonic() - last_look > _POLL_SECONDS:
                last_look = time.monotonic()
                if await is_gone():
                    return


@contextlib.asynccontextmanager
async def run(body: Generate, prompt: list[int], served: ServedModel, scheduler: Scheduler) -> AsyncIterator[Exchange]:
    """Submit a request; leaving the context drops it if it still runs.

    Raises:
        BusyError: no place for the request or its adapter.
        ServingError: it can never fit.
    """
    loop, deltas = asyncio.get_running_loop(), asyncio.Queue[Delta]()

    def emit(delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

    with contextlib.ExitStack() as held:
        model = await run_in_threadpool(held.enter_context, served.base.adapters.use(served.adapter))
        assert isinstance(body, ChatRequest | CompletionRequest)
        generation = Generation(
            model=model,
            prompt=tuple(prompt),
            max_tokens=body.num_new_tokens,
            sampler=Sampler(body.sampling(body.num_logprobs)),
            text=TextStream(served.base.tokenizer, body.stop_strings),
            stop_tokens=served.base.stop_tokens(served.template),
            emit=emit,
        )
        scheduler.submit(generation)
        kind = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        try:
            yield Exchange(generation, served, deltas, f"{kind}-{uuid.uuid4().hex}", int(time.time()))
        finally:
            generation.cancelled = True


class Form(Protocol):
    """How one route writes answers."""

    def whole(self, exchange: Exchange, text: str, choices: list[Choice], finish_reason: str) -> dict[str, Any]:
        """The answer in one body."""

    def first(self, exchange: Exchange) -> dict[str, Any] | None:
        """An event before the first token, or none."""

    def event(self, exchange: Exchange, delta: Delta) -> dict[str, Any]:
        """The event for one delta."""

    def usage(self, exchange: Exchange) -> dict[str, Any]:
        """The event with token counts."""


@dataclass(frozen=True)
class ChatForm:
    """``/v1/chat/completions``."""

    with_logprobs: bool

    def whole(self, exchange: Exchange, text: str, choices: list[Choice], finish_reason: str) -> dict[str, Any]:
        """The answer in one body."""
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish_reason,
            "logprobs": self._logprobs(exchange, choices),
        }
        return _envelope(exchange, "chat.completion", [choice]) | {"usage": exchange.usage}

    def first(self, exchange: Exchange) -> dict[str, Any]:
        """The event that opens the assistant's turn."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return _envelope(exchange, "chat.completion.chunk", [choice])

    def event(self, exchange: Exchange, delta: Delta) -> dict[str, Any]:
        """The event for one delta."""
        choice: dict[str, Any] = {
            "index": 0,
            "delta": {"content": delta.text} if delta.text or delta.finish_reason is None else {},
            "finish_reason": delta.finish_reason,
            "logprobs": self._logprobs(exchange, list(delta.choices)),
        }
        return _envelope(exchange, "chat.completion.chunk", [choice])

    def usage(self, exchange: Exchange) -> dict[str, Any]:
        """The event with token counts."""
        return _envelope(exchange, "chat.completion.chunk", []) | {"usage": exchange.usage}

    def _logprobs(self, exchange: Exchange, choices: list[Choice]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        tokens = [
            _token(exchange, choice.token, choice.logprob)
            | {"top_logprobs": [_token(exchange, token, logprob) for token, logprob in choice.top]}
            for choice in choices
        ]
        return {"content": tokens}


@dataclass(frozen=True)
class CompletionForm:
    """``/v1/completions``."""

    with_logprobs: bool

    def whole(self, exchange: Exchange, text: str, choices: list[Choice], finish_reason: str) -> dict[str, Any]:
        """The answer in one body."""
        return _envelope(exchange, "text_completion", [self._choice(exchange, text, choices, finish_reason)]) | {
            "usage": exchange.usage
        }

    def first(self, exchange: Exchange) -> None:
        """There is none on this route."""
        del exchange

    def event(self, exchange: Exchange, delta: Delta) -> dict[str, Any]:
        """The event for one delta."""
        choice = self._choice(exchange, delta.text, list(delta.choices), delta.finish_reason)
        return _envelope(exchange, "text_completion", [choice])

    def usage(self, exchange: Exchange) -> dict[str, Any]:
        """The event with token counts."""
        return _envelope(exchange, "text_completion", []) | {"usage": exchange.usage}

    def _choice(
        self, exchange: Exchange, text: str, choices: list[Choice], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.with_logprobs:
            names = [_text_of(exchange, choice.token) for choice in choices]
            logprobs = {
                "tokens": names,
                "token_logprobs": [choice.logprob for choice in choices],
                "top_logprobs": [{_text_of(exchange, token): lp for token, lp in choice.top} for choice in choices],
                "text_offset": [sum(map(len, names[:at])) for at in range(len(names))],
            }
        return {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": logprobs}


async def whole_answer(form: Form, exchange: Exchange, is_gone: Callable[[], Any]) -> dict[str, Any]:
    """Wait for the answer's end; returns the body."""
    texts: list[str] = []
    choices: list[Choice] = []
    reason = "stop"
    async for delta in exchange.pieces(is_gone):
        texts.append(delta.text)
        choices += delta.choices
        reason = delta.finish_reason or reason
    return form.whole(exchange, "".join(texts), choices, reason)


async def events(form: Form, exchange: Exchange, body: Generate, is_gone: Callable[[], Any]) -> AsyncIterator[str]:
    """Server-sent events, the last one ``[DONE]``; an error after the first event is an event too."""
    first = form.first(exchange)
    if first is not None:
        yield _event(first)
    try:
        async for delta in exchange.pieces(is_gone):
            if delta.text or delta.choices or delta.finish_reason:
                yield _event(form.event(exchange, delta))
    except GenerationFailedError as error:
        yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
    if body.stream_options and body.stream_options.include_usage:
        yield _event(form.usage(exchange))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _envelope(exchange: Exchange, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": exchange.id,
        "object": kind,
        "created": exchange.created,
        "model": exchange.served.name,
        "choices": choices,
        "system_fingerprint": exchange.served.release,
    }


def _token(exchange: Exchange, token: int, logprob: float | None) -> dict[str, Any]:
    text = _text_of(exchange, token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _text_of(exchange: Exchange, token: int) -> str:
    return str(exchange.served.base.tokenizer.decode([token]))
