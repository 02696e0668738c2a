"""Which version answers a request during a rollout, how the request is counted, and its unseen copy."""

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from starlette.concurrency import run_in_threadpool

from graftline.serve import answers
from graftline.serve.answers import RunningRequest
from graftline.serve.catalog import Catalog, ServedModel, UnknownModelError
from graftline.serve.middleware import Metrics, RolloutMetrics
from graftline.serve.protocol import ChatRequest, CompletionRequest
from graftline.serve.rollouts import Answered, Observed, Split, Watch, key_of
from graftline.serve.scheduler import Scheduler

MAX_SHADOWS = 4
"""Mirrored requests at once; more are not mirrored, so that nobody waits for an answer that nobody sees."""

logger = logging.getLogger(__name__)


@dataclass
class Chosen:
    """The model that answers a request, and who counts it."""

    served: ServedModel
    versions: "Versions"
    split: Split | None = None
    key: str = ""
    began: float = 0.0
    watch: Watch | None = None

    @property
    def role(self) -> str:
        """``candidate`` or ``incumbent``."""
        assert self.split is not None
        return self.split.arm(self.key)

    def begin(self) -> None:
        """Note that the request runs."""
        self.began = time.monotonic()
        if self.split is not None:
            self.watch = self.versions.observed.begin(self.split, self.key, self.split.arm(self.key))

    def can_be_rated(self, answer: str) -> None:
        """Remember whose answer has this id."""
        if self.split is not None and self.watch is not None:
            self.versions.observed.can_be_rated(self.split, self.key, answer)

    def end(self, exchange: RunningRequest | None) -> None:
        """Note that the request has ended; None: the server failed before it could run."""
        if self.split is None:
            return
        seconds = time.monotonic() - self.began
        answered = _answered(exchange, self.split, seconds)
        if self.watch is not None:
            self.watch.end(answered)
        self.versions.count(
            self.split, self.served, self.role, "failed" if exchange is None else exchange.ended, seconds
        )


def _answered(exchange: RunningRequest | None, split: Split, seconds: float) -> Answered:
    if exchange is None or exchange.ended == "failed":
        return Answered(failed=True)
    if exchange.ended == "left":
        return Answered(seconds=seconds)
    return Answered(
        seconds=seconds,
        tokens=len(exchange.generation.tokens),
        refused=split.refuses(exchange.beginning),
        ended=exchange.finish_reason != "length",
    )


class Versions:
    """Chooses versions, counts them separately, and mirrors requests."""

    def __init__(self, catalog: Catalog, scheduler: Scheduler, metrics: Metrics, observed: Observed) -> None:
        self.observed = observed
        self._catalog, self._scheduler = catalog, scheduler
        self._metrics = RolloutMetrics(metrics.registry)
        self._shadows = set[asyncio.Task[None]]()

    def choose(self, body: ChatRequest | CompletionRequest) -> Chosen:
        """The version that answers; UnknownModelError if there is no such name."""
        served, split = self._catalog.resolve(body.model), self.observed.split(body.model)
        if split is None:
            return Chosen(served, self)
        key = request_key(body)
        if split.arm(key) == "candidate":
            try:
                served = replace(self._catalog.resolve(split.candidate), name=body.model)
            except UnknownModelError:  # the rollout ended at this moment
                return Chosen(served, self)
        return Chosen(served, self, split, key)

    def count(self, split: Split, served: ServedModel, role: str, outcome: str, seconds: float) -> None:
        """Count a request that ended."""
        self._metrics.count(split.channel, served.release or served.name, role, outcome, seconds)

    def mirror(self, body: ChatRequest | CompletionRequest, chosen: Chosen) -> None:
        """Have the candidate answer too, if the rollout says so; its answer is discarded."""
        split = chosen.split
        if split is None or len(self._shadows) >= MAX_SHADOWS or not split.is_mirrored(chosen.key):
            return
        task = asyncio.create_task(self._answer_unseen(body, split))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _answer_unseen(self, body: ChatRequest | CompletionRequest, split: Split) -> None:
        began = time.monotonic()
        try:
            served = self._catalog.resolve(split.candidate)
        except UnknownModelError:
            return  # the rollout ended at this moment
        try:
            prompt = await run_in_threadpool(encode, body, served)
            async with answers.run(body, prompt, served, self._scheduler) as exchange:
                async for _ in exchange.pieces(_stays):
                    pass
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the copy's alone
            logger.warning("the unseen answer of %s failed: %s", split.candidate, error)
            outcome = "failed"
        else:
            outcome = exchange.ended
        self.count(split, served, "shadow", outcome, time.monotonic() - began)


async def _stays() -> bool:
    return False


def request_key(body: ChatRequest | CompletionRequest) -> str:
    """The user or the conversation that a request belongs to."""
    return key_of(body.model_dump(include={"user", "safety_identifier", "prompt_cache_key"}), body.opening)


def encode(body: ChatRequest | CompletionRequest, served: ServedModel) -> list[int]:
    """The prompt's token ids."""
    if isinstance(body, ChatRequest):
        tools = [tool.shown for tool in body.callable_tools]
        options, effort = body.chat_template_kwargs, body.reasoning_effort
        return served.base.encode_chat(body.turns, served.template, tools, options, effort=effort)
    if isinstance(body.prompt, str):
        return served.base.encode_text(body.prompt)
    return served.base.check_tokens(body.prompt)
