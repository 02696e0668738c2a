"""The turns and tools of a chat request, as chat templates get them: the same as from training rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from graftline.data.rows import OPENAI_ROLES, Message
from graftline.data.turns import REASONING, TEXT_PARTS
from graftline.serve.body import Body, Neutral, contradiction

MAX_TOOLS = 128
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_SAID_EMPTY = ("refusal", "function_call", "audio", "tool_call_id", "name", *REASONING)
"""Fields of a turn that clients also send where there is nothing to say."""
_NAME = r"^[A-Za-z0-9_-]{1,64}$"


class ContentPart(Body):
    """A part of a message's content."""

    labels: ClassVar[Mapping[str, type]] = {"cache_control": dict}
    neutral: ClassVar[Neutral] = {"annotations": ([],), "logprobs": ([],)}

    type: Literal["text"]
    text: str


def _as_text_part(part: Any) -> Any:
    """A part of a type that means text (`graftline.data.turns.TEXT_PARTS`), or a plain text, as one of type text."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    key = TEXT_PARTS.get(str(part.get("type"))) if isinstance(part, dict) else None
    if key is None or key not in part:
        return part
    return {name: given for name, given in part.items() if name != key} | {"type": "text", "text": part[key]}


def _an_object(value: Any) -> Any:
    """The arguments of a call: an object, or its JSON text; empty for a function that takes none, as in rows."""
    if value == "":
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PydanticCustomError("arguments", "are not the JSON text of an object")
    return found


class CalledFunction(Body):
    """``tool_calls[].function``."""

    name: str = Field(min_length=1, max_length=200)
    arguments: Annotated[dict[str, Any], BeforeValidator(_an_object)] = Field({})


class CalledTool(Body):
    """A call in an earlier answer."""

    neutral: ClassVar[Neutral] = {"index": tuple(range(MAX_TOOLS))}

    id: str | None = Field(None, max_length=200)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """A turn of the conversation; the extra fields of an answer's message may be sent back empty."""

    neutral: ClassVar[Neutral] = {
        **dict.fromkeys(("tool_calls", "annotations", "reasoning_details", "images"), ([],)),
        **dict.fromkeys(("prefix", "partial", "is_error"), (False,)),
        "provider_specific_fields": ({},),
        "type": ("message",),
        "status": ("completed",),
    }
    labels: ClassVar[Mapping[str, type]] = {"id": str, "parsed": object, "cache_control": dict}
    """An answer's id, what OpenAI's client made of its text, and where a cache may begin."""

    role: Literal["system", "user", "assistant", "tool"]
    content: list[ContentPart] | None = None
    tool_calls: list[CalledTool] = Field([], max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, max_length=200)
    name: str | None = Field(None, max_length=200)
    """Of the tool that gave this result, or of whoever speaks; templates get it, as vLLM's do."""
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        """The names that servers, clients and rows use for one thing; what is empty says nothing."""
        if not isinstance(value, dict):
            return value
        value = {name: given for name, given in value.items() if name not in _SAID_EMPTY or given not in _EMPTY}
        if isinstance(value.get("refusal"), str) and value.get("content") in (None, ""):
            value["content"] = value.pop("refusal")  # a refusal is what the answer says
        if isinstance(value.get("function_call"), dict) and not value.get("tool_calls"):
            value["tool_calls"] = [{"type": "function", "function": value.pop("function_call")}]
        reasoning = {name: value.pop(name) for name in REASONING if value.get(name) is not None}
        if len(set(map(str, reasoning.values()))) > 1:
            raise contradiction(min(reasoning), f"and {max(reasoning)} differ; send one of them")
        return value | ({"reasoning_content": next(iter(reasoning.values()))} if reasoning else {})

    @field_validator("role", mode="before")
    @classmethod
    def _as_templates_say(cls, value: Any) -> Any:
        # OpenAI's newer name of the system's turn and older one of a tool's, as in rows (`graftline.data.rows`).
        return OPENAI_ROLES.get(value, value) if isinstance(value, str) else value

    @field_validator("content", mode="before")
    @classmethod
    def _one_part(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        return [_as_text_part(part) for part in parts] if isinstance(parts, list) else value

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        wrong = [name for name in ("tool_calls", "reasoning_content") if getattr(self, name)]
        if wrong and self.role != "assistant":
            raise contradiction(wrong[0], f"is of an assistant's turn; this one is the {self.role}'s")
        if self.tool_call_id is not None and self.role != "tool":
            raise contradiction("tool_call_id", f"is of a tool's turn; this one is the {self.role}'s")
        if self.content is None and not (self.tool_calls or self.reasoning_content):
            raise contradiction("content", "is needed; only a turn with tool_calls or reasoning may lack it")
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        return "".join(part.text for part in self.content or ())

    @property
    def turn(self) -> Message:
        """The turn as chat templates get it, in training and here."""
        fields: dict[str, Any] = {}
        if self.reasoning_content:
            fields["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            fields["tool_calls"] = [
                {"type": "function", **({"id": call.id} if call.id else {}), "function": call.function.model_dump()}
                for call in self.tool_calls
            ]
        fields |= {name: given for name in ("name", "tool_call_id") if (given := getattr(self, name)) is not None}
        return Message(self.role, self.text, supervised=False, fields=fields)


class Function(Body):
    """``tools[].function``."""

    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] = Field({})
    strict: bool = False
    """Whether the arguments must match ``parameters`` also where the model chooses whether to call."""


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: Any) -> "Tool":
        tool: Tool = handler(value)
        if isinstance(value, dict):
            # In the client's order, which the template shows; ``strict`` is for this server.
            function = {k: v for k, v in value["function"].items() if v is not None and k != "strict"}
            tool._given = {k: function if k == "function" else v for k, v in value.items() if v is not None}
        return tool

    @property
    def shown(self) -> dict[str, Any]:
        """As chat templates get it."""
        return self._given


@dataclass(frozen=True)
class ToolChoice:
    """``mode``: whether the model calls a tool. ``name``: the only one that it may call."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None

    @classmethod
    def read(cls, value: Any) -> "ToolChoice":
        """From a request's value."""
        if isinstance(value, ToolChoice):
            return value
        if value in ("none", "auto", "required"):
            return cls(value)
        function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
        if isinstance(function, dict) and isinstance(function.get("name"), str) and len(function) == 1:
            return cls("required", function["name"])
        raise PydanticCustomError(
            "tool_choice", 'takes none, auto, required, or {"type": "function", "function": {"name": …}}'
        )
