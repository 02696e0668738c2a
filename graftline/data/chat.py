"""Renders conversations through a chat template and locates each learned answer in the text.

A server renders everything before an answer and lets the model continue. So an answer must be learned after exactly
that text: `learned_spans` verifies for each learned answer that the conversation before it, rendered as a server does,
is a prefix of the training text, and that turns, calls, reasoning and tools appear in that text as written.
"""

import calendar
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase

from graftline.data.rows import Message, Row
from graftline.data.turns import REASONING_WEIGHT
from graftline.errors import DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DAY = datetime(2024, 7, 26)
"""The fixed date that templates show in training and evaluation: the default of Llama 3.2's template.

Otherwise a training could not resume the next day, and nightly runs would be compared on different prompts.
"""
_DIRECTIVES = "aAbBcCdDeFfgGhHIjklmMnpPrRsSTtuUVwWxXyYzZ"
"""Of strftime, each alone or with "-" for a number without leading zeros."""
_NOW = "strftime_now"
"""The function that transformers gives to templates."""
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_PERCENT = "\ue000"
"""Stands for a percent sign while the directives are written out."""
_NUMBERS = re.compile(r"(\d+)")
_EXACT_ANSWERS = 8
"""Up to this many learned answers, everything before each is rendered in full; see `_by_windows`."""
_ONE_ANSWER = 'give earlier answers "weight": 0, or make one row of each answer'


@dataclass(frozen=True, slots=True)
class Spans:
    """``text``: up to the end of the last learned answer. ``answers``: start and end of each learned answer in it."""

    text: str
    answers: tuple[tuple[int, int], ...]


def template_text(tokenizer: PreTrainedTokenizerBase, template: str, *, with_tools: bool = False) -> str:
    """The Jinja source of ``tokenizer`` or ``chatml``; ``none`` has no source.

    Some tokenizers have several named templates; ``tool_use`` is for conversations ``with_tools``.

    Raises:
        DataError: the tokenizer has several templates but none named ``default``.
    """
    if template == "chatml":
        return CHATML
    try:
        return tokenizer.get_chat_template(tools=[{}] if with_tools else None)
    except ValueError as error:
        names = ", ".join(tokenizer.chat_template or ())
        raise DataError(
            f"the base's tokenizer has the chat templates {names} and none called default; give one of them that "
            "name in the tokenizer's files"
        ) from error


def template_options(tokenizer: PreTrainedTokenizerBase, template: str, *, with_tools: bool = False) -> frozenset[str]:
    """Names of the keyword arguments that a template reads: not what every template is given, nor what it sets itself.

    Raises:
        DataError: as `template_text`.
    """
    given = {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map, "messages"}
    return _read_by(template_text(tokenizer, template, with_tools=with_tools)) - given - {"raise_exception", _NOW}


@functools.lru_cache(maxsize=64)
def _read_by(text: str) -> frozenset[str]:
    # transformers' own tag has no argument, and jinja2 does not know it.
    plain = _GENERATION.sub("", text)
    return frozenset(find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)))  # noqa: S701  # nothing is rendered


@dataclass(frozen=True)
class Renderer:
    """Renders conversations of one row, with its tools and the date ``day`` (None: today).

    ``options``: keyword arguments of the template (`template_options`), such as Qwen3's ``enable_thinking``.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    tools: Sequence[Mapping[str, Any]] = ()
    day: datetime | None = DAY
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, messages: Sequence[Message], *, opening: bool = False) -> str:
        """The text of the turns; ``opening`` adds the generation prompt, as a server does.

        Raises:
            DataError: the template rejects the conversation.
        """
        turns = [
            {name: value for name, value in message.turn.items() if name != REASONING_WEIGHT} for message in messages
        ]
        try:
            try:
                return self._render(turns, opening)
            except TypeError:  # some templates concatenate arguments as text
                if not any("tool_calls" in turn for turn in turns):
                    raise
                return self._render([_arguments_as_text(turn) for turn in turns], opening)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages[:9]) + ", …" * (len(messages) > 9)
            raise DataError(
                f"the chat template refuses a conversation of {roles}: {error}; change the rows or base.template"
            ) from error

    def _render(self, turns: list[dict[str, Any]], opening: bool) -> str:
        text = template_text(self.tokenizer, self.template, with_tools=bool(self.tools))
        return str(
            self.tokenizer.apply_chat_template(
                turns,
                tools=[dict(tool) for tool in self.tools] or None,
                chat_template=text if self.day is None else _on_day(text, self.day),
                add_generation_prompt=opening,
                tokenize=False,
                **self.options,
            )
        )


@functools.lru_cache(maxsize=64)
def _on_day(text: str, day: datetime) -> str:
    """The template with ``strftime_now`` fixed to one day; a macro, since templates receive only plain data.

    The macro writes the value of each directive into the format, so a template may put its format together.
    """
    if _NOW not in text:
        return text
    values = {f"%{flag}{letter}": day.strftime(f"%{flag}{letter}") for flag in ("", "-") for letter in _DIRECTIVES}
    values["%s"] = str(calendar.timegm(day.timetuple()))  # as in UTC, wherever the training runs
    steps = [("%%", _PERCENT), *values.items(), (_PERCENT, "%")]
    replaced = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps)
    # An expression after the block preserves a newline at the start of the template.
    return f"{{% macro {_NOW}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}{text}"


def _arguments_as_text(turn: dict[str, Any]) -> dict[str, Any]:
    def call(given: dict[str, Any]) -> dict[str, Any]:
        function = given["function"]
        return given | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return turn | ({"tool_calls": [call(given) for given in turn["tool_calls"]]} if "tool_calls" in turn else {})


def learned_spans(row: Row, render: Renderer, end: str) -> Spans:
    """Locate the learned answers. ``end``: the text of the token that ends an answer.

    Raises:
        DataError: an answer would not be learned after what a server sends, or not as written.
    """
    learned = [at for at, message in enumerate(row.messages) if message.supervised]
    found = _by_windows(row.messages, learned, render) if len(learned) > _EXACT_ANSWERS else None
    found = found or _one_by_one(row.messages, learned, render, end)
    _check_shown(row, learned, found, render)
    answers = (
        _behind_reasoning(row.messages[at], at, found.text, span)
        for at, span in zip(learned, found.answers, strict=True)
    )
    return replace(found, answers=tuple(answers))


def _behind_reasoning(message: Message, number: int, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """The part of an answer that is learned: all of it, or the text after a reasoning that is not learned."""
    start, stop = span
    if REASONING_WEIGHT not in message.fields:
        return span
    words, reasoning = message.turn["content"].strip(), message.turn["reasoning_content"].strip()
    before = text.find(reasoning, start, stop)
    place = _find_words(words, text, before + len(reasoning), stop) if before >= 0 and words else -1
    if place < 0:
        raise DataError(
            f"the reasoning of turn {number + 1} is not to be learned, and the chat template shows no words of the "
            "answer behind it; learn the reasoning too, or give the answer words"
        )
    return place, stop


def _find_words(words: str, text: str, start: int, stop: int) -> int:
    """Where the words first stand outside words and tags such as `</think>`; a call may repeat them. -1: nowhere."""
    place = text.find(words, start, stop)
    while place > 0 and (text[place - 1].isalnum() or text[place - 1] in "_/|"):
        place = text.find(words, place + 1, stop)
    return place


def open_and_close(messages: Sequence[Message], render: Renderer, end: str) -> tuple[str, str]:
    """The prompt that a server sends for the last turn, and the prompt with that turn appended.

    Raises:
        DataError: the template renders the turn without the generation prompt that it asks with.
    """
    opened, closed = render(messages[:-1], opening=True), render(messages)
    if closed.startswith(opened):
        return opened, closed
    before = render(messages[:-1])
    if not (opened.startswith(before) and closed.startswith(before)):
        raise DataError(
            f"the chat template shows what stands before turn {len(messages)} differently once that turn follows, so "
            "training would not see what serving sends; put a system text into the user's turn if it is that which "
            "moves, or use a template that only appends"
        )
    # Some templates prompt for an answer with `<think>` but omit the reasoning when they render it. What the model
    # wrote is known only if the row has it verbatim.
    asked, content = opened[len(before) :], messages[-1].content
    header = asked[: _num_shared(asked, closed[len(before) :])]
    begun = asked[len(header) :]
    if begun.strip() and content.startswith(begun) and messages[-1].is_text and end in closed:
        return opened, opened + content[len(begun) :] + closed[closed.rfind(end) :]
    raise DataError(
        f"the chat template asks for an answer with {asked[-40:]!r} and shows turn {len(messages)} without it, so "
        f"training would not see what serving sends; begin the answer with {begun[-40:]!r}, or use a template that "
        "only appends"
    )


def _num_shared(first: str, second: str) -> int:
    """Length of the common prefix in characters."""
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _one_by_one(messages: Sequence[Message], learned: Sequence[int], render: Renderer, end: str) -> Spans:
    """Render up to each learned answer; every text must start with the previous one."""
    text, spans, before = "", [], 0
    for at in learned:
        opened, closed = open_and_close(messages[: at + 1], render, end)
        if not opened.startswith(text):
            raise DataError(
                f"the chat template renders turn {before + 1} differently once later turns follow, so training would "
                f"not see what serving sends; {_ONE_ANSWER}, or use a template that only appends"
            )
        spans.append((len(opened), len(closed)))
        text, before = closed, at
    return Spans(text, tuple(spans))


def _by_windows(messages: Sequence[Message], learned: Sequence[int], render: Renderer) -> Spans | None:
    """`_one_by_one` in time linear, not quadratic, in the conversation's length; None where that fails.

    Each answer, with the turns since the previous one, is rendered after the conversation's head, which ends with its
    first answer. Concatenated, these pieces must equal the whole conversation rendered at once, but for numbers: a
    template may count the turns. One that counts them otherwise in a prefix of the conversation could pass that, so
    prefixes of doubling length, and everything before the last answer, are rendered too.
    """
    head = messages[: learned[0] + 1]
    try:
        whole, first = render(messages[: learned[-1] + 1]), render(head)
        spans = [(len(render(head[:-1], opening=True)), len(first))]
        for before, at in pairwise(learned):
            window = [*head, *messages[before + 1 : at + 1]]
            opened, closed = render(window[:-1], opening=True), render(window)
            if not (opened.startswith(first) and closed.startswith(opened)):
                return None
            start = _end_of(opened[len(first) :], whole, spans[-1][1])
            stop = -1 if start < 0 else _end_of(closed[len(opened) :], whole, start)
            if stop < 0:
                return None
            spans.append((start, stop))
        looked_at = {2**power for power in range(len(learned).bit_length())} & set(range(len(learned)))
        for number in sorted(looked_at | {0, len(learned) - 1}):
            if render(messages[: learned[number]], opening=True) != whole[: spans[number][0]]:
                return None
            if render(messages[: learned[number] + 1]) != whole[: spans[number][1]]:
                return None
    except DataError:
        return None
    return Spans(whole, tuple(spans))


def _end_of(piece: str, text: str, place: int) -> int:
    """Where ``piece`` ends that begins at ``place`` of the text; its numbers may be others there. -1: it does not."""
    if text.startswith(piece, place):
        return place + len(piece)
    if piece[-1:].isdecimal():  # the number may go on in what stands behind the piece
        return -1
    for at, part in enumerate(_NUMBERS.split(piece)):
        found = _NUMBERS.match(text, place) if at % 2 else None
        if not (found or (at % 2 == 0 and text.startswith(part, place))):
            return -1
        place = found.end() if found else place + len(part)
    return place


def _check_shown(row: Row, learned: Sequence[int], found: Spans, render: Renderer) -> None:
    """Check, turn by turn, that the text contains the row's content as written.

    An earlier answer that is not learned may be shortened: a template may omit its reasoning.
    """
    if row.tools and learned:
        _check_tools_shown(row, learned[-1], render)
    place, first = 0, 0
    for at, (start, stop) in zip(learned, found.answers, strict=True):
        for number in range(first, at):
            _check_turn_shown(row.messages[number], number, found.text[place:start])
        check_answer_shown(row.messages[at], at, found.text, (start, stop))
        place, first = stop, at + 1


def _check_tools_shown(row: Row, last: int, render: Renderer) -> None:
    text = render(row.messages[: last + 1])
    hidden = [tool["function"]["name"] for tool in row.tools if tool["function"]["name"] not in text]
    if hidden or text == replace(render, tools=())(row.messages[: last + 1]):
        named = ", ".join(hidden or [tool["function"]["name"] for tool in row.tools])
        raise DataError(
            f"the chat template does not show the row's tools ({named}); use a base whose template takes tools, or "
            "remove 'tools' from the row"
        )


def check_answer_shown(message: Message, number: int, text: str, span: tuple[int, int]) -> None:
    """Check that ``text`` shows turn ``number`` (from 0), which is learned, at ``span``.

    The turn may start before the span, with text from the generation prompt.

    Raises:
        DataError: part of the turn is not shown; the message names it and the fix.
    """
    start, stop = span
    begun = max(0, len(message.turn["content"].strip()) - 1)
    _check_turn_shown(message, number, text[max(0, start - begun) : stop], learned=True)


def _check_turn_shown(message: Message, number: int, text: str, *, learned: bool = False) -> None:
    turn = message.turn
    if (learned or message.role != "assistant") and not _occurs(turn["content"], text):
        raise DataError(
            f"the chat template does not show turn {number + 1} ({message.role}) as it is written, so something else "
            "would be learned; use a template that shows every turn unchanged"
        )
    for call in turn.get("tool_calls", ()):
        texts = [call["function"]["name"], *(_texts(call["function"]["arguments"]) if learned else ())]
        if not all(_occurs(one, text) for one in texts):
            raise DataError(
                f"the chat template does not show the tool_calls of turn {number + 1} as they are written, so the call "
                "would not be learned; use a base whose template takes tools, or write the call into 'content'"
            )
    if learned and not _occurs(turn.get("reasoning_content", ""), text):
        raise DataError(
            f"the chat template does not show the reasoning_content of turn {number + 1}, so it would not be learned; "
            "use a base whose template shows reasoning, write it into 'content', or remove it"
        )


def _occurs(what: str, text: str) -> bool:
    """Whether the text contains ``what`` verbatim or JSON-escaped, as results and arguments often are."""
    what = what.strip()
    return what in text or any(json.dumps(what, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _texts(value: Any) -> Iterator[str]:
    """The strings and numbers in a call's arguments."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield str(value)
