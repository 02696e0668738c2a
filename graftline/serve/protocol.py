"""The bodies that the OpenAI-compatible routes take, and their limits.

What this server cannot do is refused rather than ignored: a client that asks for three answers, tools or penalties
should not get something else without knowing.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from graftline.serve.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 256
MAX_NEW_TOKENS = 32_768
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 8, 200
MAX_TOP_LOGPROBS = 20
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
}
"""Fields that are not supported, and the values that ask for nothing."""


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class Generate(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1, max_length=500)
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, le=1_000_000)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(
                f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters each"
            )
        return self

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def sampling(self, top_logprobs: int | None) -> SamplingParams:
        """How to choose tokens; ``top_logprobs`` None: report no log-probabilities."""
        return SamplingParams(self.temperature, self.top_p, max(self.top_k, 0), self.seed, top_logprobs)


class ContentPart(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generate):
    """Body of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def num_new_tokens(self) -> int:
        """Most tokens to generate."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token; None: nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generate):
    """Body of ``/v1/completions``."""

    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def num_new_tokens(self) -> int:
        """Most tokens to generate."""
        return self.max_tokens or 16  # OpenAI's default for this route

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token; None: nothing."""
        return self.logprobs


class LoadAdapter(BaseModel):
    """Body of ``/v1/load_lora_adapter``, as vLLM's."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    lora_path: str = Field(min_length=1, max_length=1000)


class UnloadAdapter(BaseModel):
    """Body of ``/v1/unload_lora_adapter``, as vLLM's."""

    lora_name: str = Field(min_length=1, max_length=500)
