"""What a request asks of its answer's form: where it ends, what it is kept to, how it is taken apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftline.data.answer_parts import AnswerFormat, AnswerReader, CallFormat
from graftline.serve.catalog import ServedModel
from graftline.serve.conversation import Function
from graftline.serve.grammar import AfterReasoning, Constraint
from graftline.serve.protocol import ChatRequest, CompletionRequest

_LAST_TOKENS = 16
"""Of a prompt: enough to see the tag of reasoning that it may end with."""


@dataclass(frozen=True)
class Guidance:
    """How one answer is generated and read."""

    stop_tokens: frozenset[int]
    reader: AnswerReader
    shown: frozenset[int] = frozenset()
    """Special tokens that the reader needs to see."""
    constraint: Constraint | None = None


def guide(body: ChatRequest | CompletionRequest, prompt: Sequence[int], served: ServedModel) -> Guidance:
    """How the answer to ``body`` is generated and read.

    Raises:
        FieldError: a stop token that the model does not have, or a form that cannot be kept.
    """
    base = served.base
    asked = base.check_tokens(body.stop_token_ids, name="stop_token_ids")
    ends = base.stop_tokens(served.template)
    form, schemas, several, opened = AnswerFormat(), dict[str, Any](), True, False
    if isinstance(body, ChatRequest):
        known, tools = base.answer_format(served.template), body.callable_tools
        form = AnswerFormat(known.reasoning, known.calls if tools else None)
        schemas = {tool.function.name: tool.function.parameters for tool in tools}
        several = body.parallel_tool_calls
        if form.reasoning is not None:
            # Templates of models that always reason open it themselves.
            opened = str(base.tokenizer.decode(list(prompt[-_LAST_TOKENS:]))).rstrip().endswith(form.reasoning.opens)
    if form.calls is not None:
        ends |= base.token_bytes.special(form.calls.ends)
    constraint = _constraint(body, served, form.calls, ends)
    if constraint is not None and opened and form.reasoning is not None:
        constraint = AfterReasoning(constraint, form.reasoning.closes, base.token_bytes, ends)
    return Guidance(
        ends | frozenset(asked),
        AnswerReader(form, schemas, in_reasoning=opened, several=several),
        base.token_bytes.special(form.markers),
        constraint,
    )


def _constraint(
    body: ChatRequest | CompletionRequest, served: ServedModel, calls: CallFormat | None, ends: frozenset[int]
) -> Constraint | None:
    grammars = served.base.grammars
    if (schema := body.schema_to_keep) is not None:
        return grammars.constraint(schema, ends)
    if calls is None or not isinstance(body, ChatRequest):
        return None
    tools, choice = [tool.function for tool in body.callable_tools], body.tool_choice
    if choice.mode == "required":
        wanted = {tool.name: _arguments(tool) for tool in tools if choice.name in (None, tool.name)}
        return grammars.calls(calls, wanted, ends, must_call=True)
    if any(tool.strict for tool in tools):
        kept = {tool.name: _arguments(tool) if tool.strict else {} for tool in tools}
        return grammars.calls(calls, kept, ends, must_call=False)
    return None


def _arguments(tool: Function) -> dict[str, Any]:
    """What a call's arguments must match: a function without parameters takes none."""
    return tool.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
