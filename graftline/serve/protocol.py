"""The request bodies of the OpenAI-compatible routes, and their limits.

Null means the field's default. Unsupported and unknown fields are refused by name rather than ignored: a client that
asks for three answers or for ``max_token`` must not silently get something else. Values are not converted: ``"5"`` is
not a number.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from graftline.data.rows import Message
from graftline.serve.body import Body, Neutral, contradiction
from graftline.serve.conversation import MAX_TOOLS, ChatMessage, Tool, ToolChoice
from graftline.serve.generation import SamplingParams

MAX_NEW_TOKENS = 32_768
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 8, 200
MAX_STOP_TOKENS = 64
MAX_TOP_LOGPROBS = 20
MAX_OPTIONS = 32
"""Keyword arguments of the template."""
COMPLETION_TOKENS = 16
"""OpenAI's default for plain completions."""

_ASKS_FOR_NOTHING: Neutral = {
    "n": (1,),
    "best_of": (1,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "priority": (0,),
    "include_reasoning": (True,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "bad_words": ([],),
    "logits_processors": ([],),
    "documents": ([],),
    "vllm_xargs": ({},),
    "mm_processor_kwargs": ({},),
    "typical_p": (1, 1.0),
    "top_a": (0, 0.0),
    "mirostat": (0,),
    "detokenize": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
"""Fields of OpenAI and vLLM that are not supported, with the values that ask for nothing and so are accepted."""

_LABELS: Mapping[str, type] = {
    "metadata": dict,
    "request_id": str,
    "prompt_cache_retention": str,
}
"""Fields that only describe a request, and their types; they are accepted and ignored."""


class StreamOptions(Body):
    """``stream_options``."""

    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class JsonSchema(Body):
    """``response_format.json_schema``."""

    labels: ClassVar[Mapping[str, type]] = {"description": str}

    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False
    """Has no effect: the schema is always enforced."""


class ResponseFormat(Body):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise contradiction("response_format", "needs json_schema for the type json_schema, and for no other")
        return self


class Generate(Body):
    """The fields that chat and plain completions share."""

    neutral: ClassVar[Neutral] = _ASKS_FOR_NOTHING
    labels: ClassVar[Mapping[str, type]] = _LABELS

    model: str = Field(min_length=1, max_length=500)
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, le=1_000_000)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: list[str] = Field([])
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_TOKENS)
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stops: list[str]) -> list[str]:
        if len(stops) > MAX_STOP_STRINGS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise PydanticCustomError(
                "stop", f"takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters each"
            )
        return stops

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.includes_usage and not self.stream:
            raise contradiction("stream_options", "is for streams; set stream to true, or leave it out")
        return self

    @property
    def schema_to_keep(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must match, if any."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        asked = self.response_format.json_schema
        return {"type": "object"} if asked is None else asked.schema_

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, top_logprobs: int | None) -> SamplingParams:
        """How to choose tokens; ``top_logprobs`` None: report no log-probabilities."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=self.seed,
            top_logprobs=top_logprobs,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
        )


_CHAT_ONLY = ("tools", "tool_choice", "parallel_tool_calls", "include_reasoning", "chat_template_kwargs")


class ChatRequest(Generate):
    """Body of ``/v1/chat/completions``."""

    neutral: ClassVar[Neutral] = {
        **{name: values for name, values in _ASKS_FOR_NOTHING.items() if name not in _CHAT_ONLY},
        "add_special_tokens": (False,),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=MAX_OPTIONS)
    """What the model's template is told besides: only names that it reads."""
    reasoning_effort: str | None = Field(None, max_length=100)
    """For templates that read it, or that can be told not to reason."""

    @field_validator("tool_choice", mode="plain")
    @classmethod
    def _one_choice(cls, value: Any) -> ToolChoice:
        return ToolChoice.read(value)

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise contradiction("tools", "have one name twice; give each function a different one")
        if self.tool_choice.mode == "required" and not names:
            raise contradiction("tool_choice", "needs tools; send some, or leave it out")
        if self.tool_choice.name not in (None, *names):
            raise contradiction("tool_choice", f"names a function that is not among the tools ({', '.join(names)})")
        if self.callable_tools and self.schema_to_keep is not None:
            raise contradiction("response_format", "and tools cannot be kept together; send one of them")
        return self

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise contradiction("top_logprobs", "needs logprobs; set logprobs to true, or leave it out")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise contradiction("max_tokens", "and max_completion_tokens differ; send one of them")
        return self

    @property
    def turns(self) -> list[Message]:
        """The conversation as chat templates get it."""
        return [message.turn for message in self.messages]

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the model is shown; none of them with the choice ``none``."""
        return [] if self.tool_choice.mode == "none" else self.tools

    @property
    def opening(self) -> tuple[str, ...]:
        """The conversation up to the user's first turn: the same in all of its requests."""
        texts = [message.text for message in self.messages]
        users = (number for number, message in enumerate(self.messages) if message.role == "user")
        return tuple(texts[: next(users, len(texts)) + 1])

    @property
    def num_new_tokens(self) -> int | None:
        """Most tokens to generate; None: the server's default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token; None: nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generate):
    """Body of ``/v1/completions``."""

    neutral: ClassVar[Neutral] = {
        **_ASKS_FOR_NOTHING,
        "add_special_tokens": (True,),
        "logprobs": (False,),
    }

    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt", mode="plain")
    @classmethod
    def _one_prompt(cls, value: Any) -> str | list[int]:
        """A text or token ids; either may come as the only entry of a list."""
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            value = value[0]
        if isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value):
            return value
        if isinstance(value, list) and all(type(token) is int for token in value):
            return list(value)
        raise PydanticCustomError("prompt", "takes one text or one list of token ids")

    @property
    def opening(self) -> tuple[str, ...]:
        """The text to continue."""
        return (self.prompt if isinstance(self.prompt, str) else " ".join(map(str, self.prompt)),)

    @property
    def num_new_tokens(self) -> int | None:
        """Most tokens to generate; None: the server's default."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token; None: nothing."""
        return self.logprobs


class TokenizeRequest(Body):
    """Body of ``/tokenize``, as in vLLM: a text or a conversation."""

    neutral: ClassVar[Neutral] = {
        name: _ASKS_FOR_NOTHING[name] for name in ("add_generation_prompt", "continue_final_message")
    }

    model: str | None = Field(None, min_length=1, max_length=500)
    """None: the server's first base."""
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=1000)
    add_special_tokens: bool | None = None
    """Whether a text gets the tokenizer's leading special tokens (default: yes). Templates write their own."""
    return_token_strs: bool = False
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=MAX_OPTIONS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(self, name) and self.messages is None:
                raise contradiction(name, "are for messages; a prompt is not rendered by a template")
        if (self.prompt is None) == (self.messages is None):
            raise contradiction("prompt", "or messages is needed, one of them")
        if self.messages is not None and self.add_special_tokens:
            raise contradiction("add_special_tokens", "is for a prompt; a template writes its special tokens itself")
        return self


class DetokenizeRequest(Body):
    """Body of ``/detokenize``, as in vLLM."""

    model: str | None = Field(None, min_length=1, max_length=500)
    """None: the server's first base."""
    tokens: list[int] = Field(max_length=1_000_000)


class Feedback(Body):
    """Body of ``/v1/feedback``: what a user says of an answer."""

    id: str = Field(min_length=1, max_length=200)
    """The answer's ``id``."""
    rating: Literal["good", "bad"]


class LoadAdapter(Body):
    """Body of ``/v1/load_lora_adapter``, as in vLLM."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    lora_path: str = Field(min_length=1, max_length=1000)


class UnloadAdapter(Body):
    """Body of ``/v1/unload_lora_adapter``, as in vLLM."""

    lora_name: str = Field(min_length=1, max_length=500)


_OWN_ERRORS = ("contradiction", "stop", "prompt", "tool_choice", "arguments")


def explain(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """What is wrong with a body, from pydantic's errors: a sentence, and the field at fault."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    inside = first.get("ctx", {}).get("param")
    param = ".".join(filter(None, (where if where != inside else "", inside))) or None
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        return (
            f"{where} {_unsupported(name) if where == name else 'is not supported by this server; leave it out'}",
            param,
        )
    if first["type"] in _OWN_ERRORS:
        return f"{param} {first['msg']}", param
    return (f"{where}: {first['msg']}" if where else f"the body: {first['msg']}"), param


def _unsupported(name: str) -> str:
    if name in _ASKS_FOR_NOTHING:
        values = " or ".join(map(repr, _ASKS_FOR_NOTHING[name]))
        return f"is not supported by this server with such a value; leave it out, or send {values}"
    known = {field for body in (ChatRequest, CompletionRequest) for field in body.model_fields}
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; leave it out"
    return f"is not supported by this server{hint}"
