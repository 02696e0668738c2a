"""A stand-in for vLLM, made from its documented routes and errors: it loads adapters and answers, and never ran vLLM.

Documented: ``GET /v1/models``, ``POST /v1/load_lora_adapter``, ``POST /v1/unload_lora_adapter``, ``POST
/v1/completions`` and ``/v1/chat/completions`` (whole or as a stream, ``prompt_logprobs``, ``echo`` with ``logprobs``,
``stop_token_ids``), ``--api-key``, ``--max-lora-rank``; errors as ``{"error": {"message", "type", "param", "code"}}``.
Answers come from the library with the adapter of the folder, so that a wrong adapter gives wrong log-probabilities.
"""

import asyncio
import functools
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from transformers import PreTrainedModel

from graftline.adapters.peft_format import AdapterWeights, load_adapter
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.linear import load_model
from tests.ports import free_port


class Process:
    """An ASGI application on a port, which can be stopped and started again there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.port = app, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(self.app, host="127.0.0.1", port=self.port, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self, *, at_once: bool = False) -> None:
        self._server.force_exit = at_once
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


class StandIn:
    """One vLLM process; ``base_name``: ``--served-model-name``."""

    def __init__(self, base: Path, *, base_name: str = "tiny", max_lora_rank: int = 16, api_key: str = "") -> None:
        self.base, self.base_name, self.max_lora_rank, self.api_key = base, base_name, max_lora_rank, api_key
        self.loaded: dict[str, Path] = {}
        self.asked: Counter[str] = Counter()
        """Requests by model."""
        self.serves_the_base = False
        """vLLM #10798: an adapter loads, and the answers are the base's."""
        self.fails = False
        """Every answer is a 500."""
        self.gives_logprobs = True
        self.gives_echo = False
        self.takes_ids = True
        """Whether a prompt may be token ids."""
        self.spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer
        """Makes something else of each completion."""
        self.words = 3
        self.delay_seconds = 0.0
        self.app = Starlette(
            routes=[
                Route("/health", lambda request: Response()),
                Route("/v1/models", self.models),
                Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        names = [self.base_name, *self.loaded]
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body.get("lora_name"), Path(body.get("lora_path") or "")
        if not (name and body.get("lora_path")):
            return _error(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
        if name in self.loaded and not body.get("load_inplace"):
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
            return _error(400, message, "InvalidUserInput")
        if not (path / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        spec = AdapterWeights.open(path).spec
        if spec.rank > self.max_lora_rank:
            message = f"LoRA rank {spec.rank} is greater than max_lora_rank {self.max_lora_rank}."
            return _error(400, message, "BadRequestError")
        self.loaded[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json()).get("lora_name")
        if self.loaded.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def complete(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        body = await request.json()
        name = body.get("model")
        if name != self.base_name and name not in self.loaded:
            return _error(404, f"The model `{name}` does not exist.", "NotFoundError")
        self.asked[name] += 1
        if self.fails and "prompt_logprobs" not in body:
            return _error(500, "Internal server error", "InternalServerError")
        await asyncio.sleep(self.delay_seconds)
        words = [f"{name} " for _ in range(self.words)]
        if body.get("stream"):
            return StreamingResponse(self._events(name, words), media_type="text/event-stream")
        choice: dict[str, Any] = {"index": 0, "text": "".join(words), "finish_reason": "stop"}
        prompt = body.get("prompt")
        if isinstance(prompt, list) and not self.takes_ids:
            return _error(400, "prompt must be a text", "BadRequestError")
        if prompt is not None:
            prompt = prompt if isinstance(prompt, list) else load_tokenizer(self.base).encode(prompt)
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [None] * len(prompt)
        if "prompt_logprobs" in body and self.gives_logprobs:
            choice["prompt_logprobs"] = self._prompt_logprobs(name, prompt, body["prompt_logprobs"])
        if body.get("echo") and self.gives_echo:
            choice["logprobs"] = self._echoed(name, prompt)
        if "stop_token_ids" in body:
            choice |= self._generated(name, prompt, body["max_tokens"], body["stop_token_ids"])
        num_tokens = len(prompt) if prompt is not None else 3
        answer = {"id": f"cmpl-{name}-{self.asked[name]}", "model": name, "choices": [choice]} | {
            "usage": {"prompt_tokens": num_tokens, "completion_tokens": len(words), "total_tokens": num_tokens + 3}
        }
        spoiled = self.spoil(answer)
        return spoiled if isinstance(spoiled, Response) else JSONResponse(spoiled)

    async def _events(self, name: str, words: list[str]) -> AsyncIterator[str]:
        for at, word in enumerate(words):
            await asyncio.sleep(self.delay_seconds)
            choice = {"index": 0, "text": word, "finish_reason": "stop" if at == len(words) - 1 else None}
            yield f"data: {json.dumps({'id': f'cmpl-{name}', 'model': name, 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    def _prompt_logprobs(self, name: str, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        logprobs_TV = self._logprobs(name, prompt)
        found: list[dict[str, Any] | None] = [None]
        for at, token in enumerate(prompt[1:]):
            values, tokens = logprobs_TV[at].topk(k)
            given = dict(zip(tokens.tolist(), values.tolist(), strict=True)) | {token: float(logprobs_TV[at, token])}
            found.append({str(one): {"logprob": value, "decoded_token": "?"} for one, value in given.items()})
        return found

    def _logprobs(self, name: str, prompt: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self._model(name)(torch.tensor([prompt])).logits[0].log_softmax(-1)

    def _model(self, name: str) -> PreTrainedModel:
        return opened(self.base, None if self.serves_the_base else self.loaded.get(name))

    def _echoed(self, name: str, prompt: list[int]) -> dict[str, Any]:
        """As in OpenAI's first API, with ``max_tokens: 1`` and ``logprobs: 1``."""
        logprobs_TV, tokenizer = self._logprobs(name, prompt), load_tokenizer(self.base)
        ids = [*prompt, int(logprobs_TV[-1].argmax())]
        best = [int(one) for one in logprobs_TV.argmax(-1)]
        after = enumerate(ids[1:])
        return {
            "tokens": [tokenizer.decode([token]) for token in ids],
            "token_logprobs": [None, *(float(logprobs_TV[at, token]) for at, token in after)],
            "top_logprobs": [
                None,
                *({tokenizer.decode([token]): float(logprobs_TV[at, token])} for at, token in enumerate(best)),
            ],
        }

    def _generated(self, name: str, prompt: list[int], max_tokens: int, stops: list[int]) -> dict[str, Any]:
        out = self._model(name).generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, eos_token_id=stops, pad_token_id=0
        )
        ids = out[0, len(prompt) :].tolist()
        ended = ids[-1] in stops
        text = load_tokenizer(self.base).decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        return {"text": text, "finish_reason": "stop" if ended else "length"}

    def _refused(self, request: Request) -> Response | None:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None


@functools.cache
def opened(base: Path, adapter: Path | None) -> PreTrainedModel:
    """The base with an adapter; a folder is never written twice."""
    model = load_model(base)
    if adapter is not None:
        load_adapter(model, adapter, base=read_identity(base))
    return model


def _error(status: int, message: str, kind: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
