"""Rows from a file: one format a file, found from its keys or named. Errors name file and line (or row)."""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graftline.data import turns as turn_fields
from graftline.data.records import MAX_ROW_BYTES, Problems, Record, RecordPlace, read_records
from graftline.digest import Digest, write_text
from graftline.errors import DataError


class NoRowsError(DataError):
    """A file without rows."""


# What a row says: a conversation, read from one of four record formats.
#
# prompt-completion  {"prompt": text | messages, "completion": text | messages}: only the completion is learned
# messages           {"messages": [{"role": "system|user|assistant|tool", "content": text, "weight": 0|1}]}: every
#                    answer is learned, except where "weight" is 0 or "train" is false (see `graftline.data.turns`)
# alpaca             {"instruction", "input"?, "output", "history"?: [[question, answer], ...]}
# sharegpt           {"conversations": [{"from": "system|human|gpt|function_call|observation", "value": text}]}
#
# Each may have "system" and "tools" beside it. What else changes what is learned is refused (`turns`); other keys are
# metadata and are ignored.

ROLES = ("system", "user", "assistant", "tool")
AUTO = "auto"
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_KEYS: dict[str, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
FORMATS = tuple(_KEYS)
_NOT_SUPPORTED = {
    "input_ids": "already tokenized rows",
    "chosen": "preference pairs",
    "text": "plain text without a prompt and an answer",
}
COLUMNS = frozenset(
    {key for keys in _KEYS.values() for key in keys}
    | {"system", "input", "history", *_NOT_SUPPORTED, *turn_fields.ROW_FIELDS}
)
"""Keys of a row that mean anything here: a file of columns needs no others."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    ``content``: all that it says as text. ``supervised``: the model learns to write it (only ever true of an
    assistant's turn). ``fields``: of a turn with tool calls, reasoning or a tool's name, what the chat template is
    given; ``content`` then has them as JSON behind the turn's words, so that whatever compares texts sees them.
    """

    role: str
    content: str
    supervised: bool
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def turn(self) -> dict[str, Any]:
        """The turn as a chat template takes it."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation. ``source_line``: line (jsonl, csv) or row (json, parquet) of the file, from 1.

    ``tools``: the functions that it may call, as chat templates take them.
    """

    messages: tuple[Message, ...]
    source_line: int
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @property
    def prompt(self) -> str:
        """All that stands before the last answer, turns joined by line ends; the tools first."""
        tools = [json.dumps(self.tools, ensure_ascii=False)] if self.tools else []
        return "\n".join([*tools, *(message.content for message in self.messages[:-1])])

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1].content


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
        seen = f"; it looks like {others[0]}: one file holds one format" if others else _nearest(value)
        raise DataError(
            f"{record.place}: {' and '.join(map(repr, missing))} missing in a {format_name} row, which has "
            f"{_named_keys(value)}{seen}"
        )
    turn_fields.refuse_row_fields(value, record.place)
    if format_name != "alpaca" and isinstance(value.get("history"), list) and value["history"]:
        raise DataError(
            f"{record.place}: 'history' belongs to alpaca rows, this row is {format_name}; write its turns as messages"
        )
    messages = (*_system(value, record.place), *_PARSERS[format_name](value, record.place))
    _check_conversation(messages, record.place)
    return Row(messages, record.place.number, turn_fields.tools_of(value, record.place))


def _prompt_completion(value: dict[str, Any], place: RecordPlace) -> list[Message]:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError(f"{place}: 'prompt' and 'completion' must both be text or both be lists of messages")
    if not isinstance(prompt, list):
        return [
            Message("user", _text(prompt, "prompt", place), supervised=False),
            Message("assistant", _text(completion, "completion", place), supervised=True),
        ]
    before = [replace(message, supervised=False) for message in _message_list(prompt, "prompt", place)]
    return before + _message_list(completion, "completion", place)


def _messages(value: dict[str, Any], place: RecordPlace) -> list[Message]:
    return _message_list(value["messages"], "messages", place)


def _message_list(turns: Any, field: str, place: RecordPlace) -> list[Message]:
    messages = []
    for name, turn in _turns(turns, field, place):
        # OpenAI's older name of a tool's turn.
        role = "tool" if turn.get("role") == "function" else turn.get("role")
        if role not in ROLES:
            raise DataError(f"{place}: {name} has the unknown role {role!r}; expected {', '.join(ROLES)}")
        messages.append(_message(role, turn, "content", name, place))
    return messages


def _sharegpt(value: dict[str, Any], place: RecordPlace) -> list[Message]:
    messages = []
    for name, turn in _turns(value["conversations"], "conversations", place):
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
    text = turn_fields.plain_text(turn.get(key))
    if "tool_calls" in fields and (text is None or not str(text).strip()):
        text = ""
    else:
        text = _text(text, f"{name}.{key}", place)
    if not fields:
        return Message(role, text, supervised)
    said = text + "\n" * bool(text) + json.dumps(fields, ensure_ascii=False)
    return Message(role, _text(said, name, place), supervised, {"content": text, **fields})


def _alpaca(value: dict[str, Any], place: RecordPlace) -> list[Message]:
    messages = []
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{place}: 'history' must be a list of [question, answer] pairs")
    for number, (question, answer) in enumerate(history, start=1):
        messages.append(Message("user", _text(question, f"history {number}, question", place), supervised=False))
        messages.append(Message("assistant", _text(answer, f"history {number}, answer", place), supervised=True))
    instruction = _text(value["instruction"], "instruction", place)
    if value.get("input"):
        instruction += "\n" + _text(value["input"], "input", place)
    messages.append(Message("user", instruction, supervised=False))
    messages.append(Message("assistant", _text(value["output"], "output", place), supervised=True))
    return messages


_PARSERS: dict[str, Callable[[dict[str, Any], RecordPlace], list[Message]]] = {
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}


def _system(value: dict[str, Any], place: RecordPlace) -> list[Message]:
    if not value.get("system"):
        return []
    return [Message("system", _text(value["system"], "system", place), supervised=False)]


def _turns(turns: Any, field: str, place: RecordPlace) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each turn, numbered from 1."""
    if not isinstance(turns, list) or not turns:
        given = "empty" if turns == [] else turn_fields.short(turns)
        raise DataError(f"{place}: {field!r} is {given}; expected a list of messages (csv cannot hold one: use jsonl)")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise DataError(f"{place}: {field} {number} is {type(turn).__name__}, expected an object")
    return [(f"{field} {number}", turn) for number, turn in enumerate(turns, start=1)]


def _text(value: Any, field: str, place: RecordPlace) -> str:
    if not isinstance(value, str):
        given = "missing" if value is None else turn_fields.short(value)
        raise DataError(f"{place}: {field!r} is {given}; expected text (a number must be written in quotes)")
    if not value.strip():
        raise DataError(f"{place}: {field!r} is empty or only blanks; fill it or remove the row")
    if "\0" in value:
        raise DataError(f"{place}: {field!r} holds NUL at character {value.index(chr(0)) + 1}; remove it")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {field!r} holds half a surrogate pair at character {error.start + 1}; repair the text"
        ) from error
    if num_bytes > MAX_ROW_BYTES:
        raise DataError(
            f"{place}: {field!r} has {num_bytes >> 20} MiB, a row may have {MAX_ROW_BYTES >> 20} MiB; split it"
        )
    return value


def _check_conversation(messages: tuple[Message, ...], place: RecordPlace) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise DataError(
            f"{place}: no assistant turn among {', '.join(roles)}; nothing to learn: add the answer or remove the row"
        )
    if "system" in roles[1:]:
        raise DataError(
            f"{place}: the system turn is turn {roles.index('system', 1) + 1}; it must be the first and only one"
        )
    if roles[-1] != "assistant":
        raise DataError(
            f"{place}: the last turn is the {roles[-1]}'s; nothing is learned from it: remove it or add the answer"
        )
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(f"{place}: an answer stands before any user turn; add the question or remove the answer")
    if not any(message.supervised for message in messages):
        raise DataError(
            f"{place}: every assistant turn has weight 0 or train false; nothing is learned: remove the row"
        )


def _object(record: Record) -> dict[str, Any]:
    if not isinstance(record.value, dict):
        raise DataError(f"{record.place}: a row is {type(record.value).__name__}, expected an object; {_expected()}")
    return record.value


def _fitting(value: dict[str, Any]) -> list[str]:
    """The formats whose keys are all there."""
    return [name for name, keys in _KEYS.items() if all(value.get(key) is not None for key in keys)]


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


def each_row(path: str | Path, *, format: str = AUTO) -> Iterator[Row]:
    """`read_rows` one by one; the error that tells of all rows that are not right comes behind those that are.

    Raises:
        DataError: as in `read_rows`.
    """
    problems = Problems(str(path))
    return _to_rows(read_records(Path(path), columns=COLUMNS, on_error=problems.add), format, str(path), problems)


def rows_from_objects(objects: Iterable[Mapping[str, Any]], *, origin: str, format: str = AUTO) -> list[Row]:
    """Rows from objects made by code (``data.prepare``), numbered from 1; ``origin`` names them in errors.

    Raises:
        DataError: as in `read_rows`.
    """
    records = (Record(RecordPlace(origin, "row", number), value) for number, value in enumerate(objects, start=1))
    return list(_to_rows(records, format, origin, Problems(origin)))


def write_rows(path: Path, rows: Sequence[Row]) -> Digest:
    """Write rows as jsonl: prompt-completion if each is one prompt and one completion, messages otherwise.

    Law: `read_rows` gives equal rows back, except that ``source_line`` counts the lines of this file.
    """
    plain = all(_is_plain(row) for row in rows)
    objects = ({"prompt": row.prompt, "completion": row.answer} if plain else _as_messages(row) for row in rows)
    return write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects))


def _is_plain(row: Row) -> bool:
    roles = [message.role for message in row.messages]
    return roles == ["user", "assistant"] and not row.tools and not any(message.fields for message in row.messages)


def _as_messages(row: Row) -> dict[str, Any]:
    def turn(message: Message) -> dict[str, Any]:
        learned = {} if message.supervised or message.role != "assistant" else {"weight": 0}
        return message.turn | learned

    return {"messages": [turn(message) for message in row.messages]} | ({"tools": row.tools} if row.tools else {})


def _to_rows(records: Iterable[Record], format_name: str, origin: str, problems: Problems) -> Iterator[Row]:
    """``problems``: those of ``records`` so far, and then of their rows."""
    check_format_name(format_name)
    num_rows = 0
    for record in records:
        try:
            if format_name == AUTO:
                format_name = detect_format(record)
            row = to_row(record, format_name)
        except DataError as error:
            problems.add(error)
            continue
        num_rows += 1
        yield row
    problems.raise_any()
    if not num_rows:
        raise NoRowsError(f"{origin}: no rows; the file is empty or has only blank lines: check data.source")
