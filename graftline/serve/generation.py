"""One request on its way through the scheduler."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from graftline.errors import ServingError
from graftline.export.onnx_session import GraphSession, Runner
from graftline.serve.sampling import Choice, Sampler
from graftline.serve.text import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]


class BusyError(ServingError):
    """Too many requests wait; try again after ``retry_after_seconds``."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: text and the tokens that made it; the last piece says why the answer ends."""

    text: str = ""
    choices: tuple[Choice, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class LoadedModel:
    """What a request runs on. Requests with equal keys share batches."""

    key: str
    """Digest of base graph and adapter: another version of an adapter is another key, so no batch mixes two."""
    session: GraphSession
    runner: Runner


@dataclass(eq=False)
class Generation:
    """A request: what to generate, how far it is, and whom to tell. Changed by the scheduler's thread only."""

    model: LoadedModel
    prompt: tuple[int, ...]
    max_tokens: int
    sampler: Sampler
    text: TextStream
    stop_tokens: frozenset[int]
    emit: Callable[[Delta], None]
    """Called in the scheduler's thread; must return at once."""
    cancelled: bool = False
    """Set from anywhere when the client is gone."""
    num_prefilled: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def num_needed(self) -> int:
        """Cache positions that the request can come to need."""
        return len(self.prompt) + self.max_tokens

    @property
    def length(self) -> int:
        """Tokens so far, the newest included."""
        return len(self.prompt) + len(self.tokens)

    def accept(self, choice: Choice) -> bool:
        """Take the next token, tell the client; returns whether the answer is complete."""
        if choice.token in self.stop_tokens:
            self.emit(Delta(self.text.finish(), (), "stop"))
            return True
        self.tokens.append(choice.token)
        text = self.text.push(choice.token)
        if self.text.stopped:
            self.emit(Delta(text, (choice,), "stop"))
            return True
        if len(self.tokens) >= self.max_tokens:
            self.emit(Delta(text + self.text.finish(), (choice,), "length"))
            return True
        self.emit(Delta(text, (choice,)))
        return False
