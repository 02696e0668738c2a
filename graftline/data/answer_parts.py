"""Takes the text of an answer apart: reasoning, words, and calls of tools, as the model families write them.

The opposite of rendering a turn (`graftline.data.chat`). How a model writes a call is read from its chat template, by
rendering one through it:

    <tool_call>{"name": …, "arguments": …}</tool_call>    Hermes, Qwen2.5, Qwen3, SmolLM3, Granite 4; Qwen3-Coder writes
                                                          <function=…><parameter=…> inside
    <|tool_call|>[{"name": …, "arguments": …}]            Granite 3; Phi-4-mini, which closes it with <|/tool_call|>
    [TOOL_CALLS][{"name": …, "arguments": …}]             Mistral; newer ones write [TOOL_CALLS]name[ARGS]{…}
    {"name": …, "parameters": …}                          Llama 3: the whole answer is one call, or several with ;
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from graftline.data.chat import Renderer, template_text
from graftline.data.rows import Message
from graftline.data.template import stop_ids
from graftline.errors import DataError

_NAME, _ARGUMENTS = "temperature_outside", {"place": "Oslo"}
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "How warm it is",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
_QUESTION = Message("user", "How warm is it?", supervised=False)
_CALLED = Message(
    "assistant",
    "",
    supervised=False,
    # Mistral's templates accept only ids of nine letters and digits.
    fields={
        "tool_calls": [
            {"type": "function", "id": "a1b2c3d4e", "function": {"name": _NAME, "arguments": dict(_ARGUMENTS)}}
        ]
    },
)
_SEPARATORS = re.compile(r"[\s;,]*")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(\{.*\})\s*", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool. ``index``: its number in the answer, from 0. ``arguments``: an object, as JSON text."""

    index: int
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of an answer, taken apart."""

    words: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.words or self.reasoning or self.calls)


def joined(pieces: Iterable[Said]) -> Said:
    """All pieces as one."""
    pieces = list(pieces)
    return Said(
        "".join(piece.words for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        tuple(call for piece in pieces for call in piece.calls),
    )


@dataclass(frozen=True, slots=True)
class Tags:
    """What opens and what closes a part of an answer. An empty ``closes``: it lasts until the answer ends."""

    opens: str
    closes: str


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes calls."""

    tags: Tags
    """Around a call; an empty ``opens``: the whole answer is the call."""
    written: tuple[str, str, str] | None = None
    """The text before a call's name, between name and arguments, and after them; None: not known, so that calls can be
    read but not enforced."""
    beside: tuple[str, ...] = ()
    """Other texts that may be special tokens and belong to calls."""
    ends: tuple[str, ...] = ()
    """Tokens that end an answer with a call, besides those that end every answer."""


_REASONING = (Tags("<think>", "</think>"), Tags("[THINK]", "[/THINK]"))
_PYTHON_TAG = "<|python_tag|>"
_FORMATS = (
    CallFormat(Tags("<tool_call>", "</tool_call>")),
    CallFormat(Tags("<|tool_call|>", "<|/tool_call|>")),
    CallFormat(Tags("[TOOL_CALLS]", ""), beside=("[ARGS]", "[CALL_ID]")),
)
_BARE = CallFormat(Tags("", ""), beside=(_PYTHON_TAG,), ends=("<|eom_id|>",))


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a model's answers are written; None: its template shows no such thing."""

    reasoning: Tags | None = None
    calls: CallFormat | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that separate the parts; where they are special tokens, they have to be kept in the text."""
        found = [self.reasoning.opens, self.reasoning.closes] if self.reasoning else []
        if self.calls:
            found += [self.calls.tags.opens, self.calls.tags.closes, *self.calls.beside]
        return tuple(filter(None, found))


def answer_format(tokenizer: PreTrainedTokenizerBase, template: str) -> AnswerFormat:
    """How the answers of a model with this template (``tokenizer``, ``chatml`` or ``none``) are written."""
    if template != "tokenizer":
        return AnswerFormat()
    try:
        texts = [template_text(tokenizer, template, with_tools=with_tools) for with_tools in (False, True)]
    except DataError:
        return AnswerFormat()
    reasoning = next((tags for tags in _REASONING if any(tags.closes in text for text in texts)), None)
    return AnswerFormat(reasoning, _call_format(tokenizer, template))


def opens_reasoning(
    tokenizer: PreTrainedTokenizerBase, template: str, tags: Tags
) -> Literal["prompt", "answer"] | None:
    """Who opens the reasoning that every answer closes, even where it is empty: the prompt or the answer.

    None: an answer without reasoning shows no tags.
    """
    render = Renderer(tokenizer, template, day=None)
    try:
        asked = render([_QUESTION], opening=True)
        answer = _behind(asked, render([_QUESTION, Message("assistant", "Warm.", supervised=False)]))
    except Exception:  # noqa: BLE001  # templates are programs and may raise anything
        return None
    if asked.rstrip().endswith(tags.opens):
        return "prompt"
    return "answer" if tags.closes in answer else None


def _call_format(tokenizer: PreTrainedTokenizerBase, template: str) -> CallFormat | None:
    render = Renderer(tokenizer, template, (_TOOL,), day=None)
    try:
        asked = render([_QUESTION], opening=True)
    except Exception:  # noqa: BLE001  # templates are programs and may raise anything
        return None
    if _NAME not in asked:
        return None
    try:
        end = str(tokenizer.convert_ids_to_tokens(stop_ids(tokenizer, template=template)[0]))
        answer = _behind(asked, render([_QUESTION, _CALLED])).partition(end)[0]
    except Exception:  # noqa: BLE001
        answer = ""
    for text in (answer, asked):  # some templates only tell the model how to write calls
        for known in _FORMATS:
            if known.tags.opens in text:
                return replace(known, written=_written(answer, known.tags))
    return replace(_BARE, written=_written(answer, _BARE.tags)) if f'"name": "{_NAME}"' in answer else None


def _behind(before: str, text: str) -> str:
    """What ``text`` has after its common prefix with ``before``."""
    same = next((at for at, pair in enumerate(zip(before, text, strict=False)) if pair[0] != pair[1]), len(before))
    return text[same:]


def _written(answer: str, tags: Tags) -> tuple[str, str, str] | None:
    start = answer.find(tags.opens or "{")
    name = answer.find(_NAME, max(start, 0))
    for arguments in (json.dumps(_ARGUMENTS), json.dumps(_ARGUMENTS, separators=(",", ":"))):
        at = answer.find(arguments, name)
        if 0 <= start < name < at:
            after = answer[at + len(arguments) :]
            closed = after.find(tags.closes) if tags.closes else -1
            after = after.rstrip() if closed < 0 else after[: closed + len(tags.closes)]
            return answer[start:name], answer[name + len(_NAME) : at], after
    return None


class AnswerReader:
    """Takes an answer apart while it comes in.

    Text is held back while it may be the beginning of a tag, and a call until it is complete. What looks like a call
    but is not one of ``tools`` with an object of arguments is words.

    Args:
        form: how the model writes; a part that is None is not looked for.
        tools: parameters (a JSON schema) by name.
        in_reasoning: the prompt ends with the tag that opens the reasoning.
        several: False: only the first call counts.
    """

    def __init__(
        self,
        form: AnswerFormat = AnswerFormat(),
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        in_reasoning: bool = False,
        several: bool = True,
    ) -> None:
        self._reasoning, self._calls, self._tools = form.reasoning, form.calls, tools or {}
        self.is_plain = self._reasoning is None and self._calls is None
        """Whether every text is passed on as it comes."""
        self._several, self._held = several, ""
        self._trim = in_reasoning  # drop the blanks that begin this part
        self._state = self._in_reasoning if in_reasoning else self._at_start
        self.num_calls = 0
        # Of a held call: where to look for its end, up to where quotes are counted, whether a string of JSON is open.
        self._looked = self._counted = 0
        self._in_string = False

    def push(self, text: str, *, final: bool = False) -> Said:
        """Add text, ``final`` with the answer's end; returns what is now certain."""
        if self.is_plain:
            return Said(text)
        self._held += text
        said = list[Said]()
        while True:
            state = self._state
            said.append(state(final))
            if self._state == state:
                return joined(said)

    def _at_start(self, final: bool) -> Said:
        begun = self._held.lstrip()
        bare = self._calls is not None and not self._calls.tags.opens
        openings = [(self._reasoning.opens, self._in_reasoning)] if self._reasoning else []
        openings += [("{", self._in_call), (_PYTHON_TAG, self._in_call)] if bare else []
        for opening, state in openings:
            if begun.startswith(opening):
                self._state = state
                if state == self._in_reasoning:
                    self._held, self._trim = begun[len(opening) :], True
                return Said()
            if opening.startswith(begun) and not final:
                return Said()
        self._state = self._in_words
        return Said()

    def _in_reasoning(self, final: bool) -> Said:
        assert self._reasoning is not None
        text, closed, rest = self._held.partition(self._reasoning.closes)
        if closed:
            self._held, self._state, self._reasoning = rest, self._at_start, None
        elif final:
            self._held = ""
        else:
            text = self._release(self._reasoning.closes)
        text = self._trimmed(text)
        if closed:
            self._trim = True
        return Said(reasoning=text.rstrip() if closed or final else text)

    def _in_words(self, final: bool) -> Said:
        opens = self._calls.tags.opens if self._calls else ""
        at = self._held.find(opens) if opens else -1
        if at >= 0:
            text, self._state = self._held[:at].rstrip(), self._in_call
            self._held = self._held[len(text) :]
        elif final or not opens:
            text, self._held = self._held.rstrip() if self.num_calls else self._held, ""
        else:
            text = self._release(opens)
        return Said(self._trimmed(text))

    def _in_call(self, final: bool) -> Said:
        assert self._calls is not None
        tags = self._calls.tags
        end = self._closed_at(tags) if tags.closes else -1
        if end < 0 and not final:
            return Said()
        self._looked = self._counted = 0
        self._in_string = False
        length = end + len(tags.closes) if end >= 0 else len(self._held)
        raw, self._held, self._state = self._held[:length], self._held[length:], self._in_words
        body = raw.strip().removeprefix(tags.opens or _PYTHON_TAG).removesuffix(tags.closes).strip()
        found = _calls_in(body, tags.opens, self._tools)
        if not found:
            return Said(self._trimmed(raw))
        found = found if self._several else found[: 1 - min(1, self.num_calls)]
        calls = tuple(Call(self.num_calls + at, name, arguments) for at, (name, arguments) in enumerate(found))
        self.num_calls += len(calls)
        self._trim = True
        return Said(calls=calls)

    def _closed_at(self, tags: Tags) -> int:
        """Where the tag stands that closes the held call; -1: not yet. No text is looked at twice."""
        while (end := self._held.find(tags.closes, self._looked)) >= 0:
            quotes = _ESCAPED.sub("", self._held[self._counted : end]).count('"')
            self._in_string ^= quotes % 2 == 1
            self._counted, self._looked = end, end + 1
            if not (self._in_string and re.match(rf"\s*(?:{re.escape(tags.opens)})?\s*[\[{{]", self._held)):
                return end
        self._looked = max(self._looked, len(self._held) - len(tags.closes) + 1)
        return -1

    def _release(self, tag: str) -> str:
        """All of the held text but blanks, and what may begin the tag, at its end."""
        keep = next((n for n in range(min(len(tag) - 1, len(self._held)), 0, -1) if self._held.endswith(tag[:n])), 0)
        text = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(text) :]
        return text

    def _trimmed(self, text: str) -> str:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return text


def _calls_in(body: str, opens: str, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Name and arguments of each call; none if any part of the text is not a call of one of the tools."""
    try:
        found = _as_json(body) if body.startswith(("{", "[")) else _as_names(body, opens) or _as_tags(body, tools)
    except (ValueError, RecursionError):
        return []
    if not all(name in tools and isinstance(arguments, dict) for name, arguments in found):
        return []
    return [(str(name), json.dumps(arguments, ensure_ascii=False)) for name, arguments in found]


def _as_json(body: str) -> list[tuple[Any, Any]]:
    decoder, at, values = json.JSONDecoder(parse_constant=_refuse), 0, list[Any]()
    while at < len(body):
        value, at = decoder.raw_decode(body, at)
        values += value if isinstance(value, list) else [value]
        between = _SEPARATORS.match(body, at)
        at = between.end() if between else at
    if not all(isinstance(value, dict) and isinstance(value.get("name"), str) for value in values):
        raise ValueError
    return [(value["name"], _object(value.get("arguments", value.get("parameters", {})))) for value in values]


def _as_names(body: str, opens: str) -> list[tuple[Any, Any]]:
    parts = [_NAMED.fullmatch(part) for part in (body.split(opens) if opens else [body])]
    return [(part[1], _object(part[2])) for part in parts if part] if all(parts) else []


def _as_tags(body: str, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    found = []
    for name, inside in _FUNCTION.findall(body):
        properties = tools.get(name, {}).get("properties", {})
        found.append((name, {key: _typed(text, properties.get(key)) for key, text in _PARAMETER.findall(inside)}))
    return found


def _typed(text: str, schema: Any) -> Any:
    """A parameter's text as the value that its schema wants."""
    wanted = schema.get("type") if isinstance(schema, dict) else None
    if wanted in (None, "string"):
        return text
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError:
        return text


def _object(value: Any) -> Any:
    return json.loads(value, parse_constant=_refuse) if isinstance(value, str) else value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
