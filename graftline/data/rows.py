"""Rows from a file: one format a file, found from its keys or named. Errors name file and line (or row)."""

import difflib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from graftline.data import turns as turn_fields
from graftline.data.records import Problems, Record, RecordPlace, read_records
from graftline.data.row_text import FILL, EmptyRowError, checked_text
from graftline.digest import Digest, atomic_write
from graftline.errors import DataError
from graftline.logs import OnProgress, silent


class NoRowsError(DataError):
    """A file without rows."""


OnEmpty = Callable[[int], None]
"""Is told the number of a row that is left out for an `EmptyRowError`."""


# What a row says: a conversation, read from one of four record formats.
#
# prompt-completion  {"prompt": text | messages, "completion": text | messages}: only the completion is learned
# messages           {"messages": [{"role": "system|user|assistant|tool", "content": text, "weight": 0|1}]}: every
#                    answer is learned, except where "weight" is 0 or "train" is false (see `graftline.data.turns`)
# alpaca             {"instruction", "input"?, "output", "history"?: [[question, answer], ...]}
# preference         {"prompt": text | messages, "chosen": text | [answer], "rejected": text | [answer]}, or chosen and
#                    rejected as whole conversations that differ in the last answer alone
# sharegpt           {"conversations": [{"from": "system|human|gpt|function_call|observation", "value": text}]}
#
# Each may have "system" and "tools" beside it. What else changes what is learned is refused (`turns`); other keys are
# metadata and are ignored.

ROLES = ("system", "user", "assistant", "tool")
AUTO = "auto"
OPENAI_ROLES = {"function": "tool", "developer": "system"}
"""OpenAI's older role of a tool's turn and newer role of the system's, mapped to those that chat templates know."""
_MAY_SAY_NOTHING = ("system", "tool")
"""Roles of turns without text, which servers take too: no instructions, a command that printed nothing."""
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
}
_KEYS: dict[str, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
}
FORMATS = tuple(_KEYS)
_NOT_SUPPORTED = {
    "input_ids": "already tokenized rows",
    "text": "plain text without a prompt and an answer",
}
_OWN = {key for keys in _KEYS.values() for key in keys} | {"system", "input", "history", *_NOT_SUPPORTED}


class _Columns:
    """A set without an end: some keys are known by a part of their name."""

    def __contains__(self, key: object) -> bool:
        return key in _OWN or turn_fields.is_row_field(str(key))


COLUMNS: Container[str] = _Columns()
"""Keys of a row that mean anything here: a file of columns needs no others."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    ``content``: all that it says as text. ``supervised``: the model learns to write it (only ever true of an
    assistant's turn). ``fields``: of a turn with tool calls, reasoning or a name, what the chat template is given;
    ``content`` then has them as JSON behind the turn's words, for whatever compares texts; not a speaker's name.
    """

    role: str
    content: str
    supervised: bool
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def turn(self) -> dict[str, Any]:
        """The turn as a chat template takes it."""
        return {"role": self.role, "content": self.content, **self.fields}

    @property
    def is_text(self) -> bool:
        """Whether ``content`` is all that it says: it has no tool calls, no reasoning, and is no tool's result."""
        return not self.fields.keys() - {"content", "name"} and self.role != "tool"

    def saying(self, text: str) -> "Message":
        """The same speaker with another text, and nothing beside it."""
        named = {"content": text, "name": self.fields["name"]} if "name" in self.fields else {}
        return replace(self, content=text, fields=named)


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation. ``source_line``: line (jsonl, csv) or row (json, parquet) of the file, from 1.

    ``tools``: the functions that it may call, as chat templates take them. ``rejected``: of a preference pair, the
    answer to the same prompt that is worse than the last one of ``messages``.
    """

    messages: tuple[Message, ...]
    source_line: int
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    rejected: str | None = None

    def at(self, line: int) -> "Row":
        """The same with another ``source_line``."""
        return Row(self.messages, line, self.tools, self.rejected)

    @property
    def prompt(self) -> str:
        """All that stands before the last answer, turns joined by line ends; the tools first."""
        tools = [json.dumps(self.tools, ensure_ascii=False)] if self.tools else []
        return "\n".join([*tools, *(message.content for message in self.messages[:-1])])

    @property
    def answer(self) -> str:
        """The last answer; of a pair the chosen one."""
        return self.messages[-1].content

    @property
    def with_rejected(self) -> "Row":
        """A pair's prompt with the rejected answer, as a row to encode."""
        answer = self.messages[-1].saying(self.rejected or "")
        return replace(self, messages=(*self.messages[:-1], answer), rejected=None)


def detect_format(record: Record) -> str:
    """The one format whose keys the record has.

    Raises:
        DataError: no format fits, or more than one does.
    """
    value = _object(record)
    found = _fitting(value)
    if len(found) == 1:
        return found[0]
    keys = _named_keys(value)
    if found:
        raise DataError(
            f"{record.place}: the keys ({keys}) fit {' and '.join(found)}; set data.format to the one that is meant"
        )
    if nulls := _nulls(value):
        raise EmptyRowError(f"{record.place}: {' and '.join(map(repr, nulls))} null; {FILL}")
    for key, what in _NOT_SUPPORTED.items():
        if key in value:
            raise DataError(f"{record.place}: {key!r} means {what}, which cannot be trained on here; {_expected()}")
    raise DataError(f"{record.place}: no known format has the keys {keys}; {_expected()}{_nearest(value)}")


def check_format_name(name: str) -> None:
    """Refuse a format that is not known.

    Raises:
        DataError: with the nearest name.
    """
    if name not in (AUTO, *FORMATS):
        near = difflib.get_close_matches(name, (AUTO, *FORMATS), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"data format {name!r} is not known; expected {AUTO}, {', '.join(FORMATS)}{hint}")


def to_row(record: Record, format_name: str) -> Row:
    """Read a record as one of `FORMATS`.

    Raises:
        DataError: a field is missing, empty or of the wrong kind, a role is unknown, or there is nothing to learn.
    """
    value = _object(record)
    missing = [key for key in _KEYS[format_name] if value.get(key) is None]
    if missing:
        others = _fitting(value)
        if not others and all(key in value for key in missing):
            raise EmptyRowError(
                f"{record.place}: {' and '.join(map(repr, missing))} null in a {format_name} row; {FILL}"
            )
        seen = f"; it looks like {others[0]}: one file holds one format" if others else _nearest(value)
        raise DataError(
            f"{record.place}: {' and '.join(map(repr, missing))} missing in a {format_name} row, which has "
            f"{_named_keys(value)}{seen}"
        )
    turn_fields.refuse_row_fields(value, record.place, own=_KEYS[format_name])
    if format_name != "alpaca" and isinstance(value.get("history"), list) and value["history"]:
        raise DataError(
            f"{record.place}: 'history' belongs to alpaca rows, this row is {format_name}; write its turns as messages"
        )
    messages = _with_system(_system(value, record.place), _PARSERS[format_name](value, record.place), record.place)
    messages = _without_greeting(messages)
    _check_conversation(messages, record.place)
    rejected = _rejected(value, messages, record.place) if format_name == "preference" else None
    return Row(messages, record.place.number, turn_fields.tools_of(value, record.place), rejected)


def _prompt_completion(value: dict[str, Any], place: RecordPlace) -> list[Message]:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError(f"{place}: 'prompt' and 'completion' must both be text or both be lists of messages")
    if not isinstance(prompt, list):
        return [
            Message("user", checked_text(prompt, "prompt", place), supervised=False),
            Message("assistant", checked_text(completion, "completion", place), supervised=True),
        ]
    before = [replace(message, supervised=False) for message in _message_list(prompt, "prompt", place)]
    return before + _message_list(completion, "completion", place)


def _conversation(field: str, value: dict[str, Any], place: RecordPlace) -> list[Message]:
    """Turns in the words of `messages` (role, content) or of sharegpt (from, value), under whichever key they stand."""
    turns = value[field]
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    others = {"messages": ("from", "role"), "conversations": ("role", "from")}[field]
    is_other = others[0] in first and others[1] not in first
    return (_message_list if is_other == (field == "conversations") else _sharegpt_list)(turns, field, place)


def _message_list(turns: Any, field: str, place: RecordPlace) -> list[Message]:
    messages = []
    for name, turn in _turns(turns, field, place):
        role = turn.get("role")
        role = OPENAI_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise DataError(f"{place}: {name} has the unknown role {role!r}; expected {', '.join(ROLES)}")
        messages.append(_message(role, turn, "content", name, place))
    return messages


def _sharegpt_list(turns: Any, field: str, place: RecordPlace) -> list[Message]:
    messages = []
    for name, turn in _turns(turns, field, place):
        sender = turn.get("from")
        if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
            raise DataError(
                f"{place}: {name} has the unknown role {sender!r} in 'from'; expected {', '.join(_SHAREGPT_ROLES)}"
            )
        if sender == "function_call":
            turn = {key: given for key, given in turn.items() if key != "value"} | {"tool_calls": turn.get("value")}
        messages.append(_message(_SHAREGPT_ROLES[sender], turn, "value", name, place))
    return messages


def _message(role: str, turn: dict[str, Any], key: str, name: str, place: RecordPlace) -> Message:
    """The turn whose text stands under ``key``; only a turn with tool calls may have none."""
    supervised = turn_fields.learned(turn, role, name, place)
    fields = turn_fields.fields_of(turn, role, name, place)
    turn_fields.check_parts(turn.get(key), f"{name}.{key}", place)
    if turn.get(key) in (None, "") and isinstance(turn.get("refusal"), str):  # OpenAI's; servers take it so, too
        turn = {**turn, key: turn["refusal"]}
    text = turn_fields.plain_text(turn.get(key))
    if "tool_calls" in fields and (text is None or not str(text).strip()):
        text = ""
    elif key not in turn:
        raise DataError(f"{place}: '{name}.{key}' is missing; expected text")
    elif not (role in _MAY_SAY_NOTHING and isinstance(text, str) and not text.strip()):
        text = checked_text(text, f"{name}.{key}", place)
    if not fields:
        return Message(role, text, supervised)
    if "reasoning_content" in fields and text.lstrip().startswith(("<think>", "[THINK]")):
        raise DataError(
            f"{place}: {name} has reasoning_content, and its {key} begins with {text.lstrip()[:7]!r} too; keep the "
            "reasoning in one of them"
        )
    # What is learned of a turn, and who speaks, is not part of its text.
    beside = {turn_fields.REASONING_WEIGHT} if role == "tool" else {turn_fields.REASONING_WEIGHT, "name"}
    shown = {name: value for name, value in fields.items() if name not in beside}
    said = text + ("\n" * bool(text) + json.dumps(shown, ensure_ascii=False) if shown else "")
    return Message(role, checked_text(said, name, place), supervised, {"content": text, **fields})


def _alpaca(value: dict[str, Any], place: RecordPlace) -> list[Message]:
    messages = []
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{place}: 'history' must be a list of [question, answer] pairs")
    for number, (question, answer) in enumerate(history, start=1):
        messages.append(Message("user", checked_text(question, f"history {number}, question", place), supervised=False))
        messages.append(Message("assistant", checked_text(answer, f"history {number}, answer", place), supervised=True))
    instruction = checked_text(value["instruction"], "instruction", place)
    instruction += "\n" + checked_text(value["input"], "input", place) if value.get("input") else ""
    messages.append(Message("user", instruction, supervised=False))
    messages.append(Message("assistant", checked_text(value["output"], "output", place), supervised=True))
    return messages


def _rejected(value: dict[str, Any], messages: tuple[Message, ...], place: RecordPlace) -> str:
    """The rejected answer of a pair whose chosen side is ``messages``."""
    side = _with_system(_system(value, place), _side_of_pair("rejected", value, place), place)
    if [(m.role, m.content) for m in side[:-1]] != [(m.role, m.content) for m in messages[:-1]]:
        raise DataError(
            f"{place}: 'chosen' and 'rejected' answer different prompts; expected one prompt with two answers: "
            "correct the row or remove it"
        )
    if side[-1].role != "assistant":
        raise DataError(
            f"{place}: the last turn of 'rejected' is the {side[-1].role}'s; expected an assistant's answer"
        )
    if side[-1].content.strip() == messages[-1].content.strip():
        raise DataError(f"{place}: 'chosen' and 'rejected' are the same answer; nothing is preferred: remove the row")
    return side[-1].content


def _side_of_pair(key: str, value: dict[str, Any], place: RecordPlace) -> list[Message]:
    """The prompt and one answer of a pair, which is the only turn learned."""
    given, prompt = value[key], value.get("prompt")
    if isinstance(given, list):
        answer = _message_list(given, key, place)
    else:
        answer = [Message("assistant", checked_text(given, key, place), supervised=True)]
    if not all(message.is_text for message in answer):
        raise DataError(
            f"{place}: {key!r} holds tool calls or reasoning, which a pair cannot compare; give text answers"
        )
    before: list[Message] = []
    if isinstance(prompt, list):
        before = _message_list(prompt, "prompt", place)
    elif len(answer) == 1:
        if "prompt" not in value:
            raise DataError(f"{place}: 'prompt' is missing; expected text or messages")
        before = [Message("user", checked_text(prompt, "prompt", place), supervised=False)]
    elif prompt is not None and prompt not in [message.content for message in answer[:-1]]:
        raise DataError(f"{place}: 'prompt' is not a turn of the conversation in {key!r}; remove one of them")
    before += answer[:-1]
    return [replace(message, supervised=False) for message in before] + [replace(answer[-1], supervised=True)]


_PARSERS: dict[str, Callable[[dict[str, Any], RecordPlace], list[Message]]] = {
    "prompt-completion": _prompt_completion,
    "messages": partial(_conversation, "messages"),
    "alpaca": _alpaca,
    "sharegpt": partial(_conversation, "conversations"),
    "preference": partial(_side_of_pair, "chosen"),
}


def _system(value: dict[str, Any], place: RecordPlace) -> list[Message]:
    text = value.get("system")
    return [Message("system", checked_text(text, "system", place), supervised=False)] if text else []


def _with_system(system: list[Message], messages: list[Message], place: RecordPlace) -> tuple[Message, ...]:
    """The turns behind the system text that stands beside them; one that they begin with too is there once."""
    if system and messages and messages[0].role == "system":
        if system[0].content.strip() != messages[0].content.strip():
            raise DataError(
                f"{place}: 'system' and the first turn are two system texts; expected one: join them, or keep one"
            )
        return tuple(messages)
    return (*system, *messages)


def _turns(turns: Any, field: str, place: RecordPlace) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each turn, numbered from 1."""
    if turns == []:
        raise EmptyRowError(f"{place}: {field!r} is empty; expected a list of messages: {FILL}")
    if not isinstance(turns, list):
        raise DataError(
            f"{place}: {field!r} is {turn_fields.short(turns)}; expected a list of messages (csv cannot hold one)"
        )
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise DataError(f"{place}: {field} {number} is {type(turn).__name__}, expected an object")
    return [(f"{field} {number}", turn) for number, turn in enumerate(turns, start=1)]


def _without_greeting(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Answers before the first question are not learned: no server asks for them."""
    asked = next((at for at, message in enumerate(messages) if message.role == "user"), 0)
    return (*(replace(message, supervised=False) for message in messages[:asked]), *messages[asked:])


def _check_conversation(messages: tuple[Message, ...], place: RecordPlace) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise EmptyRowError(f"{place}: no assistant turn among {', '.join(roles)}; nothing to learn: {FILL}")
    if roles[-1] != "assistant":
        raise EmptyRowError(f"{place}: the last turn is the {roles[-1]}'s; nothing is learned from it: {FILL}")
    if "user" not in roles:
        raise DataError(f"{place}: an answer stands before any user turn; add the question or remove the answer")
    if not any(message.supervised for message in messages):
        raise EmptyRowError(f"{place}: every assistant turn has weight 0 or train false; nothing is learned: {FILL}")


def _object(record: Record) -> dict[str, Any]:
    if isinstance(record.value, DataError):
        raise record.value
    if not isinstance(record.value, dict):
        raise DataError(f"{record.place}: a row is {type(record.value).__name__}, expected an object; {_expected()}")
    return record.value


def _fitting(value: dict[str, Any]) -> list[str]:
    """The formats whose keys are all there."""
    return [name for name, keys in _KEYS.items() if all(value.get(key) is not None for key in keys)]


def _nulls(value: dict[str, Any]) -> list[str]:
    """The keys of the first format of which all keys are there, that are null; none if the row has no such keys."""
    known = next((keys for keys in _KEYS.values() if all(key in value for key in keys)), ())
    return [key for key in known if value[key] is None]


def _named_keys(value: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, value))) or "no keys"


def _expected() -> str:
    return "expected one of: " + "; ".join(f"{name} ({', '.join(keys)})" for name, keys in _KEYS.items())


def _nearest(value: dict[str, Any]) -> str:
    known = sorted({key for keys in _KEYS.values() for key in keys})
    for key in value:
        if key not in known and (near := difflib.get_close_matches(str(key), known, n=1)):
            return f"; {key!r} may be meant as {near[0]!r}"
    return ""


def read_rows(path: str | Path, *, format: str = AUTO) -> list[Row]:
    """Read a .jsonl, .json, .csv or .parquet file of rows in one of `FORMATS`.

    With ``auto`` the first row decides the format, and a row of another format is refused: half of a file read wrongly
    would not be noticed.

    Raises:
        DataError: the file or rows of it are not right; file, line or row, what was given, what was expected. Rows that
            are not right are told together.
    """
    return list(each_row(path, format=format))


def each_row(
    path: str | Path, *, format: str = AUTO, problems: Problems | None = None, on_empty: OnEmpty | None = None
) -> Iterator[Row]:
    """`read_rows` one by one; the error that tells of all rows that are not right comes behind those that are.

    Args:
        path: the file.
        format: one of `FORMATS`, or auto.
        problems: is told of rows that are not right, and raises them when whoever made it says so.
        on_empty: is told of rows that ask nothing or have no answer, which are left out; None: they are not right.

    Raises:
        DataError: as in `read_rows`.
    """
    found = problems or Problems(str(path))
    records = read_records(Path(path), columns=COLUMNS, on_error=found.add)
    return _to_rows(records, format, str(path), found, raises=problems is None, on_empty=on_empty)


def rows_from_objects(objects: Iterable[Mapping[str, Any]], *, origin: str, format: str = AUTO) -> list[Row]:
    """Rows from objects made by code (``data.prepare``), numbered from 1; ``origin`` names them in errors.

    Raises:
        DataError: as in `read_rows`.
    """
    return list(each_object(objects, origin=origin, format=format))


def each_object(
    objects: Iterable[Mapping[str, Any]],
    *,
    origin: str,
    format: str = AUTO,
    problems: Problems | None = None,
    on_empty: OnEmpty | None = None,
) -> Iterator[Row]:
    """`rows_from_objects` one by one, as `each_row`.

    Raises:
        DataError: as in `each_row`.
    """
    records = (Record(RecordPlace(origin, "row", number), value) for number, value in enumerate(objects, start=1))
    found = problems or Problems(origin)
    return _to_rows(records, format, origin, found, raises=problems is None, on_empty=on_empty)


def write_rows(path: Path, rows: Sequence[Row], *, on_progress: OnProgress = silent) -> Digest:
    """Write rows as jsonl: prompt-completion if each is one prompt and one completion, pairs as such, else messages.

    Law: `read_rows` gives equal rows back, except that ``source_line`` counts the lines of this file.

    Args:
        path: the file, which appears when it is whole.
        rows: read twice, where not all are of one prompt and one completion.
        on_progress: called with rows written and in all.
    """
    try:
        return _write(path, rows, on_progress, plain=True)
    except _NotPlainError:
        return _write(path, rows, on_progress, plain=False)


def _write(path: Path, rows: Sequence[Row], on_progress: OnProgress, *, plain: bool) -> Digest:
    num_rows = len(rows)
    with atomic_write(path) as out:
        for done, row in enumerate(rows, start=1):
            out.write(as_line(row, plain=plain))
            on_progress(done, num_rows)
    return out.digest


class _NotPlainError(Exception):
    """A row that is more than one prompt and one completion."""


def as_line(row: Row, *, plain: bool = False) -> bytes:
    """A row as a line of a file: its messages, or where it is ``plain``, prompt and completion."""
    if plain and not is_plain(row):
        raise _NotPlainError
    if plain:
        value: dict[str, Any] = {"prompt": row.prompt, "completion": row.answer}
    else:
        value = _as_messages(row) if row.rejected is None else _as_pair(row)
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def is_plain(row: Row) -> bool:
    """Whether a row is one prompt and one completion, without tools or fields."""
    roles = [message.role for message in row.messages]
    has_more = row.tools or row.rejected is not None or any(message.fields for message in row.messages)
    has_more = has_more or not row.messages[-1].supervised
    return roles == ["user", "assistant"] and not has_more


def plain_row(data: bytes, line: int) -> Row | None:
    """The row of a line that `as_line` wrote ``plain``, unchecked; None for other lines."""
    if not data.startswith(b'{"prompt": "'):
        return None
    try:
        value = json.loads(data)
        return Row((Message("user", value["prompt"], False), Message("assistant", value["completion"], True)), line)
    except (ValueError, KeyError):
        return None  # Whoever checks it will say what is wrong.


def _as_pair(row: Row) -> dict[str, Any]:
    pair = {"prompt": [message.turn for message in row.messages[:-1]], "chosen": row.answer, "rejected": row.rejected}
    return pair | ({"tools": row.tools} if row.tools else {})


def _as_messages(row: Row) -> dict[str, Any]:
    def turn(message: Message) -> dict[str, Any]:
        learned = {} if message.supervised or message.role != "assistant" else {"weight": 0}
        return message.turn | learned

    return {"messages": [turn(message) for message in row.messages]} | ({"tools": row.tools} if row.tools else {})


def _to_rows(
    records: Iterable[Record],
    format_name: str,
    origin: str,
    problems: Problems,
    *,
    raises: bool,
    on_empty: OnEmpty | None,
) -> Iterator[Row]:
    """``problems``: those of ``records`` so far, then those of their rows; ``raises``: raise them at the end."""
    check_format_name(format_name)
    num_rows, num_empty, before = 0, 0, problems.number
    for record in records:
        try:
            if format_name == AUTO:
                format_name = detect_format(record)
            row = to_row(record, format_name)
        except DataError as error:
            if on_empty and isinstance(error, EmptyRowError):
                num_empty += 1
                on_empty(record.place.number)
            else:
                problems.add(error)
            continue
        num_rows += 1
        yield row
    if raises:
        problems.raise_any()
    if not num_rows and problems.number == before:
        why = f"all {num_empty} rows are empty" if num_empty else "the file is empty or has only blank lines"
        raise NoRowsError(f"{origin}: no rows; {why}: check data.source")
