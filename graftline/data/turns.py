"""The fields of a turn besides role and text, and which of them change what is learned.

Tool calls, tool results and reasoning are kept and passed to the chat template; flags that exclude a turn from the loss
are honoured. An unsupported field that would change what is learned is rejected by name: a misread row must not be
learned silently.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from graftline.data.records import RecordPlace, unique_keys
from graftline.errors import DataError

FLAGS = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "calculate_loss")
"""Keys of a turn that say whether it is learned, from OpenAI, axolotl and other trainers."""
REASONING_WEIGHT = "reasoning_weight"
"""Key of an answer; with the value 0 its reasoning is read but not learned."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that servers and datasets use for an answer's reasoning; templates get it under each that they read."""

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the key that holds it."""

_UNCLEAR = (
    *("mask", "masked", "loss_mask", "ignore", "ignore_loss", "train_detail", "training_detail"),
    *("completion_mask", "assistant_mask", "assistant_masks", "response_mask", "turn_weights"),
    *("weights", "sample_weight", "loss_weight", "loss_scale", "token_weights"),
)
"""Keys that change what is learned but mean different things in different trainers."""
_LIKE = (
    (
        re.compile(r"train|loss|mask|weight|learn|supervis|ignore|^skip", re.IGNORECASE),
        (bool, int, float, list, dict),
        'write "weight": 0 on a turn that is not to be learned instead',
    ),
    (
        re.compile(
            r"(?<!finish_)(?<!stop_)reason|think|thought|chain_of|^cot(_|$)|rationale|scratchpad|^analysis$|^tool_plan$"
            r"|monologue",
            re.IGNORECASE,
        ),
        (str, list, dict),
        "call an answer's reasoning reasoning_content, and remove what is not to be learned",
    ),
    (
        re.compile(r"(^|_)(tools?|functions?|calls?)(_|$)", re.IGNORECASE),
        (list, dict),
        "write calls as tool_calls of the turn, and tools beside the messages",
    ),
    (re.compile(r"image|video|audio", re.IGNORECASE), (str, list, dict), "only text is learned: remove it, or the row"),
)
"""Unknown keys of a turn that seem to change what is learned: pattern, types of such values, advice. Text that begins
as JSON does counts as a list: tables without lists hold such text."""
_LEFT_OUT: Mapping[str, bool] = {
    **dict.fromkeys(("exclude", "excluded", "skip", "omit", "frozen", "deleted", "masked_out"), True),
    **dict.fromkeys(("include", "included", "is_target"), False),
}
"""Keys of a turn or row, with the value that takes it out of what is learned."""
_UNFINISHED: Mapping[str, bool] = {
    **dict.fromkeys(("prefix", "prefill", "partial", "truncated", "is_truncated", "incomplete"), True),
    **dict.fromkeys(("end_turn", "add_eos", "eos"), False),
}
"""Keys of an answer, with the value that says that no token ends it."""
_REASONS, _CUT = ("finish_reason", "stop_reason"), ("length", "max_tokens", "content_filter")
"""Why a server ended an answer, and the values of one that was cut off."""
_ADDRESSED = {"channel": ("final",), "recipient": ("all", "user", "assistant")}
"""Keys that say whom an answer is for (OpenAI's Harmony), with the values that mean the user."""
_OF_TOKENS = re.compile(r"(?<!attention_)masks?$|weights?$|^loss_|^train_", re.IGNORECASE)
"""Keys of a row whose lists say which tokens or turns are learned, and how much."""
_ROW_SKIPPED = re.compile(
    r"^(?P<no>no|skip|without|ignore)?_?(is|do|to|use|for|in)?_?(train|training|trained|learn|learning|learned)$"
)
"""Other names of a row's flag that says whether it is learned, or with ``no``, that it is not."""
_ROW_WEIGHT = re.compile(r"^(loss|sample|example|row|conversation|instance|importance|turn|token|train|kl)_weight(_|$)")
_LAST_TURN = re.compile(
    r"^(train_|learn_)?(on_)?(last|final)_(turn|answer|message|response|only)(_only)?$|^mask_history$"
)
"""Flags of a row that ask to learn its last answer alone."""
_SYSTEMS = ("system_prompt", "system_message", "system_instruction", "system_instructions")
_DECLARED = frozenset(("parameters", "description", "input_schema"))
"""Keys of a declared function besides its name."""
_TOOL_LIKE = re.compile(r"(^|_)(tools?|functions?)(_|$)")
_OTHER_ROLES = ("roles_to_train", "train_roles", "roles_learned")
_LABELS = "labels"
_IGNORED = -100
"""The label of a token that is not learned, in torch's cross entropy."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_CALLS = ("tool_calls", "function_call")
_UNLIKE = ("chosen", "rejected", "rejected_response", "rejected_messages")
_ONLY_FOR_TEMPLATES = ("documents", "chat_template_kwargs", "chat_template")
_TEMPLATE_OPTIONS = ("enable_thinking", "reasoning_effort", "thinking_budget")
_UNWANTED = ("label", "kto_tag", "desirable", "is_desirable")
_PROMPTS_LEARNED = ("train_on_inputs", "train_on_input", "train_on_prompt", "train_on_prompts", "learn_prompt")
_ROW_LEARNED = ("learn", "learned", "supervised")
"""Keys of a row that say whether its prompt, or any part of it, is learned."""
_TOOLS = ("tools", "functions")
ROW_FIELDS = (
    *FLAGS,
    *REASONING,
    *_UNCLEAR,
    *_MEDIA,
    *_CALLS,
    *_UNLIKE,
    *_ONLY_FOR_TEMPLATES,
    *_TEMPLATE_OPTIONS,
    *_UNWANTED,
    *_TOOLS,
    "tool_choice",
    *_PROMPTS_LEARNED,
    *_ROW_LEARNED,
    *_LEFT_OUT,
    *_REASONS,
    *_SYSTEMS,
    *_OTHER_ROLES,
    _LABELS,
)
"""Keys of a row, besides those of its format, that are honoured or rejected; see also `is_row_field`."""
_NO = (False, "false", "False")
_WORDS = {"false": False, "no": False, "off": False, "true": True, "yes": True, "on": True}


@functools.lru_cache(maxsize=4096)
def is_row_field(key: str) -> bool:
    """Whether a key of a row may change what is learned, by its name. Kept, since every row has the same keys."""
    patterns = (_OF_TOKENS, _ROW_SKIPPED, _ROW_WEIGHT, _LAST_TURN, _TOOL_LIKE)
    return key in ROW_FIELDS or any(pattern.search(key) for pattern in patterns)


def learned(turn: Mapping[str, Any], role: str, name: str, place: RecordPlace) -> bool:
    """Whether the model learns this turn: every answer, unless a flag excludes it.

    Raises:
        DataError: a flag is not 0, 1, false or true, two contradict each other, one asks to learn a turn that is not
            an answer, or a key has no clear meaning.
    """
    _refuse_unknown(turn, name, place)
    _refuse_left_out(turn, name, place)
    if role == "assistant":
        _refuse_unfinished(turn, name, place)
    if isinstance(turn.get("label"), bool | int):
        raise DataError(
            f"{place}: {name}.label is {turn['label']!r}, which can mean that the turn is not to be learned; write "
            "\"weight\": 0 on such a turn, and remove 'label'"
        )
    given = {key: turn[key] for key in FLAGS if turn.get(key) is not None}
    for key, value in given.items():
        if isinstance(value, str) or value not in (0, 1):
            raise DataError(
                f"{place}: {name} has {key} {value!r}; expected 0 or false (not learned), 1 or true (learned)"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise DataError(f"{place}: {name} has {_shown(given)}, which contradict each other; keep one of them")
    if role != "assistant" and any(given.values()):
        raise DataError(
            f"{place}: {name} is the {role}'s and has {_shown(given)}; only an assistant's turns are learned: remove it"
        )
    return role == "assistant" and all(given.values())


def fields_of(turn: Mapping[str, Any], role: str, name: str, place: RecordPlace) -> dict[str, Any]:
    """Tool calls, reasoning and names of tools and speakers, as chat templates expect them.

    ``tool_calls`` become ``[{"type": "function", "function": {"name", "arguments"}}]`` with arguments as an object, and
    so does OpenAI's older ``function_call``; every name of `REASONING` becomes ``reasoning_content``.

    Raises:
        DataError: one of them has a different shape, or is on a turn that cannot have it.
    """
    found: dict[str, Any] = {}
    if reasoning := _reasoning(turn, name, place):
        found["reasoning_content"] = reasoning
        if _is_unlearned(turn, name, place):
            found[REASONING_WEIGHT] = 0
    if calls := _calls(turn, name, place):
        found["tool_calls"] = calls
    if found and role != "assistant":
        raise DataError(
            f"{place}: {name} is the {role}'s and has {' and '.join(found)}, which only an assistant's turn can have; "
            "move it there"
        )
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if turn.get(key) is not None:
            found[key] = str(turn[key])
    if role != "tool" and isinstance(turn.get("name"), str) and turn["name"].strip():
        found["name"] = turn["name"]
    return found


def tools_of(value: Mapping[str, Any], place: RecordPlace) -> tuple[dict[str, Any], ...]:
    """The tools that a row declares in ``tools``, or in OpenAI's older ``functions``, as chat templates expect them.

    Raises:
        DataError: they are neither a list of named functions nor such a list as JSON text.
    """
    named = [value[key] for key in _TOOLS if value.get(key)]
    if not named or value.get("tool_choice") == "none":  # with which a server shows the model no tools
        return ()
    if any(other != named[0] for other in named[1:]):
        raise DataError(f"{place}: 'tools' and 'functions' differ; keep 'tools'")
    given = named[0]
    tools = _parsed(given, "tools", place) if isinstance(given, str) else given
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: 'tools' is {short(given)}; expected a list of functions with name and parameters")
    wrapped = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)
    for number, tool in enumerate(wrapped, start=1):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise DataError(f"{place}: tools {number} has no name; expected a function with name and parameters")
    return tuple(_as_json(list(wrapped), "'tools'", place))


def refuse_row_fields(value: Mapping[str, Any], place: RecordPlace, *, own: tuple[str, ...] = ()) -> None:
    """Reject unsupported keys of a row, besides its format's ``own``, that would change what is learned.

    Raises:
        DataError: there is such a key; the message names it, its meaning and the fix.
    """
    _refuse(value, _MEDIA, place, "only text is learned: remove it, or the row")
    unlike = tuple(key for key in _UNLIKE if key not in own)
    _refuse(
        value, unlike, place, "preference pairs have `chosen` and `rejected` alone: keep one answer, or write those"
    )
    _refuse(value, (*_CALLS, *REASONING), place, "it belongs to one turn: put it into that message")
    _refuse(value, _ONLY_FOR_TEMPLATES, place, "it is not passed on to any template: remove it")
    _refuse_options_and_masks(value, place, own)
    for key in (*FLAGS, *_UNCLEAR):
        given = _flag(value.get(key))
        is_no = given is False or (given == 0 and "train" in key)
        if key in FLAGS and is_no:
            raise DataError(
                f"{place}: {key!r} is {value[key]!r}, so nothing of the row is to be learned; remove the row"
            )
        weighs = "weight" in key and isinstance(given, int | float) and given != 1
        if weighs or isinstance(given, list | dict) or (key in _UNCLEAR and given is True):
            raise DataError(
                f"{place}: {key!r} is {short(value[key])}, which would change what is learned; rows and tokens have no "
                "weights here: remove it, or the row"
            )
    _refuse_other_names(value, place)
    _refuse_beside_turns(value, place)
    for key in _PROMPTS_LEARNED:
        if _flag(value.get(key)) in (True, 1):
            raise DataError(f"{place}: {key!r} is {value[key]!r}, but prompts are not learned here: remove it")
    for key in _ROW_LEARNED:
        if _flag(value.get(key)) in (False, 0):
            raise DataError(
                f"{place}: {key!r} is {value[key]!r}, so nothing of the row is to be learned; remove the row"
            )
    for key in _UNWANTED:
        given = value.get(key)
        if isinstance(given, bool | str) and given in _NO:
            raise DataError(
                f"{place}: {key!r} is {given!r}, which marks an answer that is not wanted; remove the row, or rename "
                "the key if it means something else"
            )


def _refuse_options_and_masks(value: Mapping[str, Any], place: RecordPlace, own: tuple[str, ...]) -> None:
    for key in _TEMPLATE_OPTIONS:
        if value.get(key) is not None:
            raise DataError(
                f"{place}: {key!r} is {short(value[key])}, which a template may read; it is not passed on to any: "
                "remove it"
            )
    for key, given in value.items():
        if key not in own and isinstance(given, list) and given and _OF_TOKENS.search(str(key)):
            raise DataError(
                f"{place}: {key!r} is {short(given)}, which would change what is learned; tokens and turns have no "
                'weights here: write "weight": 0 on a turn that is not to be learned, or remove it'
            )


def _refuse_other_names(value: Mapping[str, Any], place: RecordPlace) -> None:
    """Flags and weights of a row under names that are not listed."""
    for key, given in ((key, _flag(given)) for key, given in value.items() if is_row_field(str(key))):
        skipped = _ROW_SKIPPED.search(str(key))
        is_no = skipped and isinstance(given, bool | int | float) and bool(given) == bool(skipped["no"])
        if (is_no and key not in FLAGS + _ROW_LEARNED) or (key in _LEFT_OUT and given is _LEFT_OUT[key]):
            raise DataError(
                f"{place}: {key!r} is {value[key]!r}, so nothing of the row is to be learned; remove the row, or the "
                "key if it means something else"
            )
        if _ROW_WEIGHT.search(str(key)) and isinstance(given, int | float) and given != 1:
            raise DataError(
                f"{place}: {key!r} is {short(value[key])}, but rows have no weights here: remove it, or the row"
            )
        if _LAST_TURN.search(str(key)) and given in (True, 1):
            raise DataError(f"{place}: {key!r} is {value[key]!r}; remove it, and set data.learned to last-turn")
        if key in _OTHER_ROLES and given and set(given) - {"assistant", "gpt"}:
            raise DataError(f"{place}: {key!r} is {short(given)}, but only answers are learned here: remove it")
        if key == _LABELS and isinstance(given, list) and _IGNORED in given:
            raise DataError(
                f"{place}: {key!r} marks tokens that are not learned ({_IGNORED}), which is not supported; write "
                '"weight": 0 on a turn that is not to be learned, or remove it'
            )


def _refuse_beside_turns(value: Mapping[str, Any], place: RecordPlace) -> None:
    """What belongs into the prompt or says that the answer was cut, under a name that no format has."""
    turns = value.get("messages") or value.get("conversations") or ()
    texts = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
    for key in _SYSTEMS:
        if isinstance(value.get(key), str) and value[key].strip() and value[key] not in [value.get("system"), *texts]:
            raise DataError(f"{place}: {key!r} is {short(value[key])}, which no turn has; call it system, or remove it")
    for key, given in value.items():
        if key not in _TOOLS and is_row_field(str(key)) and _TOOL_LIKE.search(str(key)) and _holds_functions(given):
            raise DataError(f"{place}: {key!r} is {short(given)}, which the model would not see; call it tools")
    _refuse_cut(value, "the row", place)


def _holds_functions(given: Any) -> bool:
    """Whether a value, or the JSON in a text, is a list of declared functions."""
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return False
    return isinstance(given, list) and any(
        isinstance(one, Mapping) and ("function" in one or ("name" in one and _DECLARED & one.keys())) for one in given
    )


def _refuse_left_out(turn: Mapping[str, Any], name: str, place: RecordPlace) -> None:
    for key, value in _LEFT_OUT.items():
        if turn.get(key) is value:
            raise DataError(
                f'{place}: {name}.{key} is {value}, so the turn is not to be learned; write "weight": 0, or remove it'
            )


def _refuse_unfinished(turn: Mapping[str, Any], name: str, place: RecordPlace) -> None:
    for key, value in _UNFINISHED.items():
        if turn.get(key) is value:
            raise DataError(
                f"{place}: {name}.{key} is {value}, but an answer is learned with the token that ends it; complete the "
                f'answer and remove {key!r}, or write "weight": 0'
            )
    _refuse_cut(turn, name, place)


def _refuse_cut(value: Mapping[str, Any], name: str, place: RecordPlace) -> None:
    for key in _REASONS:
        if isinstance(value.get(key), str) and value[key] in _CUT:
            raise DataError(
                f"{place}: {name} has {key} {value[key]!r}: the answer was cut off, and would be learned as one that "
                "ends there; complete or remove it"
            )


def check_parts(content: Any, name: str, place: RecordPlace) -> None:
    """Refuse flags of content parts: a turn is learned whole or not at all.

    Raises:
        DataError: a part has a key that would change what is learned.
    """
    for number, part in enumerate(content if isinstance(content, list) else (), start=1):
        if not isinstance(part, Mapping):
            continue
        for key in FLAGS:
            if part.get(key) not in (None, 1):
                raise DataError(
                    f"{place}: part {number} of {name} has {key} {part[key]!r}, but a turn is learned whole; write "
                    '"weight": 0 on the turn, or make the part a turn'
                )
        _refuse_unknown({key: given for key, given in part.items() if key != part.get("type")}, name, place)


def plain_text(content: Any) -> Any:
    """Join content parts if all are text; return anything else unchanged, for the caller to reject."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part if isinstance(part, str) else _text_of(part) for part in content]
    return "".join(filter(None, texts)) if None not in texts else content


def _text_of(part: Any) -> str | None:
    """The text of a content part; None if it is not text."""
    key = TEXT_PARTS.get(str(part.get("type"))) if isinstance(part, dict) else None
    text = part.get(key) if key else None
    return text if isinstance(text, str) else None


def _reasoning(turn: Mapping[str, Any], name: str, place: RecordPlace) -> str | None:
    given = {key: turn[key] for key in REASONING if turn.get(key)}
    for key, value in given.items():
        if not isinstance(value, str):
            raise DataError(f"{place}: {name}.{key} is {short(value)}; expected the reasoning as text")
    if len(set(given.values())) > 1:
        raise DataError(f"{place}: {name} has {' and '.join(given)} with different texts; keep one of them")
    return next(iter(given.values()), None)


def _is_unlearned(turn: Mapping[str, Any], name: str, place: RecordPlace) -> bool:
    given = turn.get(REASONING_WEIGHT, 1)
    if isinstance(given, str) or given not in (0, 1):
        raise DataError(f"{place}: {name} has {REASONING_WEIGHT} {given!r}; expected 0 (not learned) or 1 (learned)")
    return not given


def _calls(turn: Mapping[str, Any], name: str, place: RecordPlace) -> list[dict[str, Any]]:
    given = {key: turn[key] for key in _CALLS if turn.get(key)}
    if len(given) > 1:
        raise DataError(f"{place}: {name} has both tool_calls and function_call; keep tool_calls")
    key, calls = next(iter(given.items()), ("", []))
    if isinstance(calls, str):
        calls = _parsed(calls, f"{name}.{key}", place)
    return [_call(one, f"{name}.{key}", place) for one in (calls if isinstance(calls, list) else [calls])]


def _call(given: Any, name: str, place: RecordPlace) -> dict[str, Any]:
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise DataError(f"{place}: {name} holds {short(given)}; expected a function's name and arguments")
    arguments = function.get("arguments", function.get("parameters"))
    if arguments in (None, "", []):
        arguments = {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{name}, arguments of {function['name']}", place)
    if not isinstance(arguments, dict):
        raise DataError(f"{place}: {name}: the arguments of {function['name']} are {short(arguments)}, not an object")
    arguments = _as_json(arguments, f"{name}, arguments of {function['name']}", place)
    named = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return {"type": "function", **named, "function": {"name": function["name"], "arguments": arguments}}


def _parsed(text: str, name: str, place: RecordPlace) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {name} is {short(text)}, which is not JSON: {error}; correct it") from error


def _as_json(value: Any, name: str, place: RecordPlace) -> Any:
    """The value as JSON gives it back, since a template shows it to the model as such."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # half a surrogate pair is no text
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: {name} hold what JSON does not know: {error}; write it as text, or as a finite number"
        ) from error


def _flag(given: Any) -> Any:
    """A flag or weight of a row; csv has only text for them."""
    if not isinstance(given, str):
        return given
    text = given.strip().lower()
    if text in _WORDS:
        return _WORDS[text]
    try:
        return float(text)
    except ValueError:
        return given


def _refuse(value: Mapping[str, Any], keys: tuple[str, ...], place: RecordPlace, advice: str) -> None:
    for key in keys:
        if value.get(key) not in (None, "", [], {}) and not isinstance(value[key], bool):
            raise DataError(f"{place}: {key!r} is {short(value[key])}, which would change what is learned; {advice}")


def _refuse_unknown(turn: Mapping[str, Any], name: str, place: RecordPlace) -> None:
    for key, users in _ADDRESSED.items():
        if isinstance(turn.get(key), str) and turn[key] not in ("", *users):
            raise DataError(
                f"{place}: {name}.{key} is {turn[key]!r}, so the turn is not for the user; write it as "
                "reasoning_content or tool_calls of an answer, or remove it"
            )
    for key, value in turn.items():
        if key in (*FLAGS, *REASONING, *_CALLS, REASONING_WEIGHT) or value in (None, "", [], {}):
            continue
        is_json = isinstance(value, str) and value.lstrip().startswith(("[", "{"))
        for pattern, kinds, advice in _LIKE:
            if (is_json or isinstance(value, kinds)) and pattern.search(str(key)):
                raise DataError(
                    f"{place}: {name}.{key} is {short(value)}, which would change what is learned; {advice}"
                )


def _shown(given: Mapping[str, Any]) -> str:
    return " and ".join(f"{key} {value!r}" for key, value in given.items())


def short(value: Any) -> str:
    """Type and beginning of a value, for an error message."""
    try:
        text = str(value)[:40]
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = "of very many digits"
    return f"{type(value).__name__} {text!r}"
