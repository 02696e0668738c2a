r"""Encodes rows as token ids and marks what is learned: only the answers and the token that ends them.

Templates
    none       prompt, completion, EOS: for bases without a chat format
    tokenizer  the tokenizer's own chat template
    chatml     ``<|im_start|>role\n…<|im_end|>\n``, for a tokenizer that has these two tokens and no template

A server tokenizes the prompt alone, and the model then writes the answer. So here too the prompt is tokenized alone,
and the answer's ids follow: no token spans the two, as one could if the whole text were tokenized.
"""

import contextlib
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from graftline.data.chat import DAY, Renderer, check_answer_shown, learned_spans, open_and_close, template_text
from graftline.data.rows import Message, Row
from graftline.digest import Digest, of_json
from graftline.errors import DataError

TEMPLATES = ("none", "tokenizer", "chatml")
_PROBE = (Message("user", "Name a colour.", supervised=False), Message("assistant", "Blue", supervised=True))

_DRAWN = re.compile(r"\|\s*random\b|\blipsum\s*\(")
"""What gives a Jinja template another text each time."""
_MOST_NAMED = 10
"""Maximum number of lines that an error lists."""

Given = TypeVar("Given")
_Asking = Generator[list[str], list[list[int]], Given]
"""A generator that yields texts and receives their ids, so that the texts of many rows are tokenized together."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as token ids. ``supervised[t]``: the model learns to write ``input_ids[t]``."""

    input_ids: list[int]
    supervised: list[bool]

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(self.supervised)


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a row's ids, all supervised or all unsupervised."""

    ids: list[int]
    supervised: bool


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str) -> Encoded:
    """Encode one row up to its last learned token, without truncation.

    Raises:
        DataError: the template does not suit the row or the tokenizer (see `check_template`).
    """
    with _naming(row):
        stop_ids(tokenizer, template=template)
    (found,) = encode_batch([row], tokenizer, template=template)
    if isinstance(found, DataError):
        raise found
    return Encoded(
        [token for part in found for token in part.ids], [part.supervised for part in found for _ in part.ids]
    )


def encode_batch(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: str
) -> list[list[Part] | DataError]:
    """`encode` for many rows, tokenized together: as fast as the tokenizer's own batches, on all cores.

    A pure function of its arguments.

    Returns:
        For each row its parts, or an error that names its line.

    Raises:
        DataError: the template does not suit the tokenizer.
    """
    end = stop_ids(tokenizer, template=template)[0]
    leading = _leading(tokenizer) if template == "none" else []
    asking = [
        _plain_parts(row, leading, end) if template == "none" else _chat_parts(row, tokenizer, template, end)
        for row in rows
    ]
    found = _answer(asking, tokenizer)
    return [
        DataError(f"line {row.source_line}: {one}") if isinstance(one, DataError) else one
        for row, one in zip(rows, found, strict=True)
    ]


def _answer(asking: Sequence[_Asking[Given]], tokenizer: PreTrainedTokenizerBase) -> list[Given | DataError]:
    """Run all generators to their end; each round tokenizes the distinct texts that they request in one call."""
    found: list[Given | DataError | None] = [None] * len(asking)
    sent: dict[int, list[list[int]] | None] = dict.fromkeys(range(len(asking)))
    while sent:
        wanted: dict[int, list[str]] = {}
        for at, answer in sent.items():
            try:
                wanted[at] = next(asking[at]) if answer is None else asking[at].send(answer)
            except StopIteration as done:
                found[at] = done.value
            except DataError as error:
                found[at] = error
        texts = list(dict.fromkeys(text for asked in wanted.values() for text in asked))
        known = dict(zip(texts, _ids_of(tokenizer, texts), strict=True)) if texts else {}
        sent = {at: [known[text] for text in asked] for at, asked in wanted.items()}
    return cast("list[Given | DataError]", found)


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str) -> list[int]:
    """Ids of everything before the row's last answer: what a server feeds the model.

    The answer itself is not used: a server does not know it.

    Raises:
        DataError: the template does not suit the row or the tokenizer.
    """
    with _naming(row):
        if template == "none":
            return _plain_prompt(row, tokenizer)
        return encode_conversation(row.messages[:-1], tokenizer, template=template, tools=row.tools, day=DAY)


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    tools: Sequence[Mapping[str, Any]] = (),
    day: datetime | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation that awaits an answer, rendered once: what a server feeds the model.

    This does not check that training saw such ids; `encode` does that for rows. ``day``: the date that the template
    shows; None is today. ``options``: keyword arguments of the template (`graftline.data.chat.template_options`).

    Raises:
        DataError: the template does not accept such a conversation.
    """
    if template == "none":
        if [message.role for message in messages] != ["user"] or tools:
            roles = ", ".join(message.role for message in messages) + (" and tools" if tools else "")
            raise DataError(f"without a chat template there is one prompt, a user's; the conversation has {roles}")
        return encode_text(messages[0].content, tokenizer)
    return _ids(tokenizer, Renderer(tokenizer, template, tools, day, options or {})(messages, opening=True))


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, *, with_leading: bool = True) -> list[int]:
    """Ids of a text that a model is to continue: with the tokenizer's leading special tokens, but no trailing ones.

    Tokenizers that append EOS to every text would otherwise end it before the model writes a word.
    """
    return (_leading(tokenizer) if with_leading else []) + _ids(tokenizer, text)


def encode_answers(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str, texts: Sequence[str] | None = None
) -> tuple[list[int], list[list[int]]]:
    """`encode_prompt`, and the ids of each of ``texts`` in place of the row's last answer, which is the default.

    Each ends with the token that ends an answer.

    Raises:
        DataError: the template does not suit the row or the tokenizer.
    """
    prompt, last = encode_prompt(row, tokenizer, template=template), row.messages[-1]
    answers = [last] if texts is None else [last.saying(text) for text in texts]
    end = stop_ids(tokenizer, template=template)[0]
    with _naming(row):
        if template == "none":
            before = row.messages[0].content
            return prompt, [[*_continuation(tokenizer, before, answer.content), end] for answer in answers]
        render = Renderer(tokenizer, template, row.tools)
        return prompt, [_chat_answer((*row.messages[:-1], answer), render, end) for answer in answers]


def labels_as_answers(row: Row, labels: Sequence[str]) -> list[str]:
    """Each label with the whitespace that surrounds the row's answer."""
    before, _, after = row.answer.partition(row.answer.strip())
    return [before + label + after for label in labels]


def _chat_answer(messages: Sequence[Message], render: Renderer, end: int) -> list[int]:
    opened, closed = open_and_close(messages, render, _text_of(render.tokenizer, end))
    check_answer_shown(messages[-1], len(messages) - 1, closed, (len(opened), len(closed)))
    return _up_to_end(_after(render.tokenizer, closed, len(opened), len(closed), end), end, len(messages))


def stop_ids(tokenizer: PreTrainedTokenizerBase, *, template: str) -> tuple[int, ...]:
    """Ids at which a server stops: the token that ends an answer, then the tokenizer's EOS if it differs.

    Raises:
        DataError: no such token exists, so a model could not learn to stop.
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
    if template == "tokenizer" and (drawn := _DRAWN.search(str(tokenizer.chat_template))):
        raise DataError(
            f"the chat template draws at random ({drawn[0]!r}), so training would not see what serving sends: remove "
            "that from the template, or set base.template to chatml"
        )
    if template == "chatml":
        for token in ("<|im_start|>", "<|im_end|>"):
            if token not in tokenizer.get_vocab():
                raise DataError(
                    f"base.template is 'chatml', but the tokenizer has no token {token}; set none or tokenizer"
                )
    stop_ids(tokenizer, template=template)


def template_digest(tokenizer: PreTrainedTokenizerBase, template: str) -> Digest:
    """Digest of everything that determines a conversation's ids: template source, special tokens, and a probe's ids.

    Raises:
        DataError: as in `check_template`.
    """
    check_template(tokenizer, template)
    return of_json(
        {
            "template": template,
            "text": _all_texts(tokenizer, template) if template != "none" else "",
            "leading": _leading(tokenizer) if template == "none" else [],
            "stop_ids": list(stop_ids(tokenizer, template=template)),
            "probe": [_ids(tokenizer, message.content) for message in _PROBE],
        }
    )


def name_lines(lines: Iterable[int]) -> str:
    """``lines 3, 7, 9 and 12 more``: source lines for an error message."""
    ordered = sorted(lines)
    shown = ", ".join(map(str, ordered[:_MOST_NAMED]))
    more = f" and {len(ordered) - _MOST_NAMED} more" if len(ordered) > _MOST_NAMED else ""
    return f"{'line' if len(ordered) == 1 else 'lines'} {shown}{more}"


def _all_texts(tokenizer: PreTrainedTokenizerBase, template: str) -> str | dict[str, str]:
    several = tokenizer.chat_template if template == "tokenizer" else None
    return several if isinstance(several, dict) else template_text(tokenizer, template)


@contextlib.contextmanager
def _naming(row: Row) -> Iterator[None]:
    """Add the row's line to errors."""
    try:
        yield
    except DataError as error:
        raise DataError(f"line {row.source_line}: {error}") from error


def _plain_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    _check_plain(row)
    return encode_text(row.messages[0].content, tokenizer)


def _check_plain(row: Row) -> None:
    roles = [message.role for message in row.messages]
    beside = [
        *(key for message in row.messages if not message.is_text for key in message.fields),
        *(["tools"] if row.tools else []),
    ]
    if roles != ["user", "assistant"] or beside:
        raise DataError(
            f"template 'none' takes one prompt and one completion, the row has {', '.join([*roles, *beside])}; set "
            "base.template to tokenizer or chatml"
        )


def _plain_parts(row: Row, leading: list[int], end: int) -> _Asking[list[Part]]:
    _check_plain(row)
    prompt, completion = (message.content for message in row.messages)
    if not row.messages[1].supervised:
        return []
    head, answer = yield from _continued([("", prompt), (prompt, completion)])
    return [Part([*leading, *head], supervised=False), Part([*answer, end], supervised=True)]


def _chat_parts(row: Row, tokenizer: PreTrainedTokenizerBase, template: str, end: int) -> _Asking[list[Part]]:
    """Two parts per learned answer: the text before it, and the answer with the token that ends it.

    Text after the last answer is dropped: nothing is learned there, and a causal model never looks ahead.
    """
    ends = _text_of(tokenizer, end)
    found = learned_spans(row, Renderer(tokenizer, template, row.tools), ends)
    pieces, done = list[tuple[str, str]](), 0
    for start, stop in found.answers:
        pieces += [_behind(found.text, start, stop, ends), _behind(found.text, done, start, ends)]
        done = stop
    ids = iter((yield from _continued(pieces)))
    learned = [at for at, message in enumerate(row.messages) if message.supervised]
    parts, written = list[Part](), list[int]()
    for at, answer, before in zip(learned, ids, ids, strict=True):
        kept = _up_to_end(answer, end, at + 1)
        parts += [Part(written + before, supervised=False), Part(kept, supervised=True)]
        written = answer[len(kept) :]
    return parts


def _up_to_end(answer: list[int], end: int, number: int) -> list[int]:
    """Cut after the last end token: what follows it (a newline) is written by the template, not the model."""
    if end not in answer:
        raise DataError(f"the chat template does not end turn {number} with its end token")
    return answer[: len(answer) - answer[::-1].index(end)]


def _after(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int, end: int) -> list[int]:
    """Ids of ``text[start:stop]`` after the text before it."""
    return _continuation(tokenizer, *_behind(text, start, stop, _text_of(tokenizer, end)))


def _behind(text: str, start: int, stop: int, end: str) -> tuple[str, str]:
    """The text before ``text[start:stop]``, and that text.

    Special tokens split a text into pieces that are tokenized separately, so everything before the last end token is
    omitted: with it, the time would be quadratic in the conversation's length.
    """
    begin = max(0, text.rfind(end, 0, start))
    return text[begin:start], text[start:stop]


def _text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """The special token that follows an answer's text in the template."""
    text, answer = Renderer(tokenizer, template)(_PROBE), _PROBE[1].content
    at = text.casefold().rfind(answer.casefold())
    if at < 0:
        raise DataError("the chat template does not show an answer; use one that does")
    rest = text[at + len(answer) :]
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for token in _ids(tokenizer, rest):
        if token in special:
            return token
    raise DataError(
        f"the chat template ends an answer with {rest[-20:]!r}, not with a special token, so the model cannot learn "
        "to stop; use a template that ends answers with EOS"
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return _ids_of(tokenizer, [text])[0]


def _ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    ).input_ids
    return found


def _leading(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer prepends to a text (BOS, or none)."""
    bare, full = _ids(tokenizer, "x"), list(tokenizer("x").input_ids)
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at]
    return []


def _continuation(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    (found,) = _answer([_continued([(before, text)])], tokenizer)
    if isinstance(found, DataError):
        raise found
    return found[0]


def _continued(pieces: Sequence[tuple[str, str]]) -> _Asking[list[list[int]]]:
    """Ids of each text after the text before it: cut from the joint ids if these start with the ids before.

    If a token would span the two, the text is tokenized alone. (Tokenizers that prepend a space to every text would
    otherwise put one in the middle.)
    """
    ids = iter((yield [one for before, text in pieces for one in ((before, before + text) if before else (text,))]))
    found: list[list[int] | None] = []
    for before, _ in pieces:
        head = next(ids) if before else []
        joint = next(ids)
        found.append(joint[len(head) :] if joint[: len(head)] == head else None)
    alone = [text for (_, text), one in zip(pieces, found, strict=True) if one is None]
    apart = iter((yield alone)) if alone else iter(())
    return [next(apart) if one is None else one for one in found]
