r"""Rows to token ids with a mark on what is learned: the answers and the token that ends them, nothing else.

Templates
    none       prompt and completion one after the other, then EOS: for bases without a chat format
    tokenizer  the chat template that belongs to the tokenizer
    chatml     ``<|im_start|>role\n…<|im_end|>\n``, for a tokenizer that has these two tokens and no template

Serving tokenizes a prompt alone and the model then writes the answer. So the ids before an answer here are those of the
prompt alone, and the answer's follow them: a token never spans the two, as it could if the whole text were tokenized.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from graftline.data.formats import Message, Row
from graftline.digest import Digest, of_json
from graftline.errors import DataError
from graftline.progress import OnProgress, silent
from graftline.settings.model import Overlength

TEMPLATES = ("none", "tokenizer", "chatml")
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PROBE = (Message("user", "Name a colour.", supervised=False), Message("assistant", "Blue", supervised=True))


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as token ids. ``supervised[t]``: ``input_ids[t]`` is a token that the model learns to write."""

    input_ids: list[int]
    supervised: list[bool]

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(self.supervised)


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Encoded rows, the rows that they come from (same order), and the source lines of what did not fit."""

    encoded: tuple[Encoded, ...]
    rows: tuple[Row, ...]
    truncated_lines: tuple[int, ...]
    dropped_lines: tuple[int, ...]


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str) -> Encoded:
    """Encode one row, whole, up to the last token that is learned.

    Raises:
        DataError: the template does not suit the row or the tokenizer (see `check_template`).
    """
    return _join(_parts(row, tokenizer, template, stop_ids(tokenizer, template=template)[0]))


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_tokens: int,
    overlength: Overlength,
    on_progress: OnProgress = silent,
) -> EncodedRows:
    """Encode rows and treat those of more than ``max_tokens`` tokens as ``overlength`` says.

    ``error`` refuses them, ``drop`` leaves them out, ``truncate`` cuts their end, and with it the answer's EOS: what is
    left without a supervised token is for `graftline.data.checks` to find.

    Raises:
        DataError: a row is too long (``error``), none is left, or as in `encode`.
    """
    check_template(tokenizer, template)
    end = stop_ids(tokenizer, template=template)[0]
    kept: list[tuple[Encoded, Row]] = []
    truncated: list[int] = []
    dropped: list[int] = []
    longest = 0
    for done, row in enumerate(rows, start=1):
        encoded = _join(_parts(row, tokenizer, template, end))
        longest = max(longest, len(encoded.input_ids))
        if len(encoded.input_ids) <= max_tokens:
            kept.append((encoded, row))
        elif overlength == "truncate":
            kept.append((Encoded(encoded.input_ids[:max_tokens], encoded.supervised[:max_tokens]), row))
            truncated.append(row.source_line)
        else:
            dropped.append(row.source_line)
        on_progress(done, len(rows))
    if dropped and (overlength == "error" or not kept):
        raise DataError(
            f"{len(dropped)} of {len(rows)} rows have more than {max_tokens} tokens (the longest has {longest}): "
            f"{name_lines(dropped)}; raise data.max_tokens, or set data.overlength to drop or truncate"
        )
    return EncodedRows(tuple(e for e, _ in kept), tuple(r for _, r in kept), tuple(truncated), tuple(dropped))


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str) -> list[int]:
    """Ids of all that stands before the row's last answer: what a server gives to the model.

    Raises:
        DataError: as in `encode`.
    """
    parts = _parts(row, tokenizer, template, stop_ids(tokenizer, template=template)[0])
    return [token for part in parts[:-2] for token in part.ids]


def encode_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, template: str) -> list[int]:
    """Ids of a conversation that waits for an answer, rendered once: what a server gives to the model.

    Whether training saw such ids is not asked here: `encode` proves that of rows.

    Raises:
        DataError: the template does not take such a conversation.
    """
    if template == "none":
        if [message.role for message in messages] != ["user"]:
            raise DataError(
                "without a chat template there is one prompt, a user's; the conversation has "
                f"{', '.join(message.role for message in messages)}"
            )
        return encode_text(messages[0].content, tokenizer)
    return _ids(tokenizer, _render(messages, tokenizer, template, opening=True))


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, *, with_leading: bool = True) -> list[int]:
    """Ids of a plain text that is to be continued: what the tokenizer puts before every text, and nothing behind it."""
    return (_leading(tokenizer) if with_leading else []) + _ids(tokenizer, text)


def stop_ids(tokenizer: PreTrainedTokenizerBase, *, template: str) -> tuple[int, ...]:
    """Ids at which a server stops: the token that ends an answer, then the tokenizer's EOS if it differs.

    Raises:
        DataError: there is no such token, so a model could not learn to stop.
    """
    if template == "none":
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no EOS token, so the model cannot learn to stop; set eos_token in the base"
            )
        return (tokenizer.eos_token_id,)
    end = _turn_end(tokenizer, template)
    return (end,) if tokenizer.eos_token_id in (None, end) else (end, tokenizer.eos_token_id)


def check_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Check on a probe conversation that the template works with the tokenizer and ends answers.

    Raises:
        DataError: unknown template, no chat template, missing tokens, or no token that ends an answer.
    """
    if template not in TEMPLATES:
        raise DataError(f"template {template!r} is not known; expected {', '.join(TEMPLATES)}: set base.template")
    if template == "tokenizer" and not tokenizer.chat_template:
        raise DataError(
            "base.template is 'tokenizer', but the base's tokenizer has no chat template; set none or chatml"
        )
    if template == "chatml":
        for token in ("<|im_start|>", "<|im_end|>"):
            if token not in tokenizer.get_vocab():
                raise DataError(
                    f"base.template is 'chatml', but the tokenizer has no token {token}; set none or tokenizer"
                )
    stop_ids(tokenizer, template=template)


def template_digest(tokenizer: PreTrainedTokenizerBase, template: str) -> Digest:
    """Digest of what turns a conversation into ids: template text, special tokens, and a probe's ids.

    Raises:
        DataError: as in `check_template`.
    """
    check_template(tokenizer, template)
    return of_json(
        {
            "template": template,
            "text": template_text(tokenizer, template) if template != "none" else "",
            "leading": _leading(tokenizer) if template == "none" else [],
            "stop_ids": list(stop_ids(tokenizer, template=template)),
            "probe": [_ids(tokenizer, message.content) for message in _PROBE],
        }
    )


def name_lines(lines: Iterable[int], *, most: int = 10) -> str:
    """``lines 3, 7, 9 and 12 more``: source lines for an error."""
    ordered = sorted(lines)
    shown = ", ".join(map(str, ordered[:most]))
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return f"{'line' if len(ordered) == 1 else 'lines'} {shown}{more}"


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of ids that are all supervised or all not."""

    ids: list[int]
    supervised: bool


def _join(parts: list[_Part]) -> Encoded:
    ids = [token for part in parts for token in part.ids]
    supervised = [part.supervised for part in parts for _ in part.ids]
    # Nothing is learned after the last supervised token; a causal model does not look at it either.
    length = len(supervised)
    while length and not supervised[length - 1]:
        length -= 1
    return Encoded(ids[:length], supervised[:length])


def _parts(row: Row, tokenizer: PreTrainedTokenizerBase, template: str, end: int) -> list[_Part]:
    """For each answer three parts: what stands before it, the answer with its ``end`` token, what the template adds."""
    return _plain_parts(row, tokenizer, end) if template == "none" else _chat_parts(row, tokenizer, template, end)


def _plain_parts(row: Row, tokenizer: PreTrainedTokenizerBase, end: int) -> list[_Part]:
    if [message.role for message in row.messages] != ["user", "assistant"]:
        raise DataError(
            f"line {row.source_line}: template 'none' takes one prompt and one completion, the row has "
            f"{', '.join(message.role for message in row.messages)}; set base.template to tokenizer or chatml"
        )
    prompt, completion = (message.content for message in row.messages)
    return [
        _Part(_leading(tokenizer) + _ids(tokenizer, prompt), supervised=False),
        _Part([*_continuation(tokenizer, prompt, completion), end], row.messages[1].supervised),
        _Part([], supervised=False),
    ]


def _chat_parts(row: Row, tokenizer: PreTrainedTokenizerBase, template: str, end: int) -> list[_Part]:
    """Render up to each answer; every rendering must begin with the one before: serving sees those."""
    parts: list[_Part] = []
    text = ""
    for at, message in enumerate(row.messages):
        if message.role != "assistant":
            continue
        opened = _render(row.messages[:at], tokenizer, template, opening=True)
        closed = _render(row.messages[: at + 1], tokenizer, template)
        if not opened.startswith(text) or not closed.startswith(opened):
            raise DataError(
                f"line {row.source_line}: the chat template renders turn {at + 1} differently once later turns follow, "
                "so training would not see what serving sends; use a template that only appends, or one answer a row"
            )
        if message.content.strip() not in closed[len(opened) :]:
            raise DataError(
                f"line {row.source_line}: the chat template does not show turn {at + 1} as it is written, so something "
                "else would be learned; use a template that shows answers unchanged"
            )
        parts.append(_Part(_continuation(tokenizer, text, opened[len(text) :]), supervised=False))
        answer = _continuation(tokenizer, opened, closed[len(opened) :])
        if end not in answer:
            raise DataError(f"line {row.source_line}: the chat template does not end turn {at + 1} with its end token")
        # The last end token is the template's; what follows it (a line end) is written by the template, not the model.
        cut = len(answer) - answer[::-1].index(end)
        parts += [_Part(answer[:cut], message.supervised), _Part(answer[cut:], supervised=False)]
        text = closed
    return parts


def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """The special token that follows an answer's text in the template."""
    opened = _render(_PROBE[:1], tokenizer, template, opening=True)
    rest = _render(_PROBE, tokenizer, template)[len(opened) :]
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for token in _ids(tokenizer, rest[rest.find(_PROBE[1].content) + len(_PROBE[1].content) :]):
        if token in special:
            return token
    raise DataError(
        f"the chat template ends an answer with {rest[-20:]!r}, not with a special token, so the model cannot learn "
        "to stop; use a template that ends answers with EOS"
    )


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, *, opening: bool = False
) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template_text(tokenizer, template), add_generation_prompt=opening, tokenize=False
            )
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            f"the chat template refuses a conversation of {roles}: {error}; change the rows or base.template"
        ) from error


def template_text(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The Jinja text of ``tokenizer`` or ``chatml``; ``none`` has no text."""
    return _CHATML if template == "chatml" else tokenizer.get_chat_template()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _leading(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts before a text (BOS, or none)."""
    bare, full = _ids(tokenizer, "x"), list(tokenizer("x").input_ids)
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at]
    return []


def _continuation(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Ids of ``text`` after ``before``: those of the joint text where it begins with the ids of ``before`` alone.

    Where a token would span the two, ``text`` is tokenized alone. (Tokenizers that put a blank before every text would
    otherwise put one in the middle.)
    """
    if not before:
        return _ids(tokenizer, text)
    head, joint = _ids(tokenizer, before), _ids(tokenizer, before + text)
    return joint[len(head) :] if joint[: len(head)] == head else _ids(tokenizer, text)
