"""Score through the server that will serve: an OpenAI-compatible API, asked for what our own scoring computes.

Prompts go to ``/completions`` as token ids, so that both score the same tokens; where the server takes only text, its
count of tokens must be ours. Log-probabilities of a prompt come from ``prompt_logprobs`` (vLLM, SGLang) or from
``echo`` with ``logprobs`` (OpenAI's first API); `connect` asks once for each way. A server that offers neither only
generates, and what needs log-probabilities stays with our own code.

Nothing is believed that can be checked: the answer's model, the number of tokens that the server counted and that it
gave log-probabilities for, and finite values. Redirects are not followed: the key would go to another address.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx
from transformers import PreTrainedTokenizerBase

from graftline.address import LOOPBACK, mask_secrets
from graftline.data.template import encode_text
from graftline.digest import Digest
from graftline.errors import EvaluationError
from graftline.evaluate.evaluation import AnswerItem, Prepared, answer_score
from graftline.evaluate.option_tree import OptionItem, Tokens
from graftline.evaluate.parts import OnPart, Runner, ScoreRow, SectionWork
from graftline.evaluate.scores import SECTIONS, DocumentScore, Scores, Section
from graftline.evaluate.scoring import OptionBatch, Window, item_score
from graftline.plain_text import one_line
from graftline.retry import Retry, may_pass
from graftline.settings.engine import ADAPTER, Engine

KEY = "GRAFTLINE_ENGINE_KEY"
Offers = Literal["prompt_logprobs", "echo", "generation"]
"""How a server gives log-probabilities of a prompt; ``generation``: not at all."""
_TIMEOUT = httpx.Timeout(300.0, connect=15.0)
_REFUSED = (400, 404, 405, 422, 501)
"""Answers to a request that the server cannot fulfil; of 404, the model is known to be there."""
_DESCRIBED = ("owned_by", "root", "parent", "max_model_len")
"""What is recorded of a model's entry in ``/models``; the rest changes with every request."""
_ROUNDING = 1e-3
"""How far above 0 a log-probability may come out where servers compute in half precision."""
_SAME_NATS = 0.05
"""A server that answers this closely to its kept scores, nats a token, has not changed; half precision is closer."""


class _RefusedError(EvaluationError):
    """The server does not do what was asked; another way of asking may work."""


@dataclass(frozen=True)
class EngineRecord:
    """The server that scores came from."""

    url: str
    model: str
    """Name that was asked for."""
    offers: Offers
    takes_ids: bool
    """Whether prompts went as token ids; otherwise as text, with the number of tokens compared."""
    served: Mapping[str, Any] = field(default_factory=dict)
    """What it says of the model in ``/models``."""

    def as_json(self) -> dict[str, Any]:
        """As `Scores.served_by`."""
        return {
            "url": mask_secrets(self.url),
            "model": self.model,
            "offers": self.offers,
            "takes_ids": self.takes_ids,
            "served": dict(self.served),
        }

    @property
    def sections(self) -> tuple[Section, ...]:
        """What can be scored there."""
        return ("answers",) if self.offers == "generation" else SECTIONS


class _Position(NamedTuple):
    """A token of a prompt: its log-probability, and the likeliest token there, as an id or as the server's text."""

    log_probability: float
    likeliest: int | str


@dataclass(frozen=True)
class _Client:
    """Requests to one model of a server."""

    url: str
    model: str
    http: httpx.Client
    key: str | None
    retry: Retry

    def served(self) -> dict[str, Any]:
        """What the server says of the model; empty if it has no list of models.

        Raises:
            EvaluationError: it cannot be reached, or its list does not have the model.
        """
        try:
            listed = self._ask("GET", "models").get("data")
        except _RefusedError:
            return {}
        if not isinstance(listed, list) or not all(isinstance(one, dict) and "id" in one for one in listed):
            raise EvaluationError(f"{self._name}/models gave no list of models; expected an OpenAI-compatible API")
        by_name = {str(one["id"]): one for one in listed}
        if self.model not in by_name:
            known = ", ".join(sorted(by_name)[:10]) or "none"
            raise EvaluationError(
                f"{self._name} has no model {self.model!r}; it has {known}: load the candidate there under that name, "
                "or correct `evaluate.engine.model`"
            )
        entry = by_name[self.model]
        told = {name: entry.get(name) for name in _DESCRIBED}
        texts = {name: one_line(value)[:500] for name, value in told.items() if isinstance(value, str)}
        return texts | {name: value for name, value in told.items() if isinstance(value, int)}

    def complete(self, prompt: Sequence[int] | str, num_tokens: int, **asked: Any) -> dict[str, Any]:
        """The only choice of a greedy completion; ``num_tokens``: how many tokens the prompt has for us.

        Raises:
            EvaluationError: no such answer, one of another model, or the server counts other tokens.
        """
        answer = self._ask("POST", "completions", {"model": self.model, "prompt": prompt, "temperature": 0, **asked})
        try:
            (choice,) = answer["choices"]
            named, counted = answer["model"], (answer.get("usage") or {}).get("prompt_tokens")
            if not isinstance(choice, dict):
                raise TypeError("choices[0] is not an object")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(
                f"{self._name}/completions gave no completion ({error!r}); expected an OpenAI-compatible API, whose "
                "address often ends in /v1"
            ) from error
        if named != self.model:
            raise EvaluationError(
                f"{self._name} was asked for the model {self.model!r} and answered for {named!r}: its scores would be "
                "another model's; name the model as the server does in `evaluate.engine.model`"
            )
        if counted is None and isinstance(prompt, str):
            raise EvaluationError(
                f"{self._name} takes prompts as text only and does not say how many tokens it makes of them "
                "(usage.prompt_tokens), so nothing shows that it tokenizes as the training did"
            )
        if counted is not None and counted != num_tokens:
            raise EvaluationError(
                f"{self._name} counts {counted} tokens in a prompt that has {num_tokens} for us: it tokenizes "
                "differently, adds a special token or cuts prompts; give it the candidate's tokenizer"
            )
        return choice

    @property
    def _name(self) -> str:
        return f"the engine at {mask_secrets(self.url)}"

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        def once() -> httpx.Response:
            response = self.http.request(method, f"{self.url}/{path}", json=body)
            if may_pass(response.status_code):
                response.raise_for_status()
            return response

        try:
            response = self.retry.call(once, transient=lambda error: isinstance(error, httpx.HTTPError))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EvaluationError(
                f"{self._name} cannot be asked: {self._clean(str(error) or repr(error))}; start it, or check "
                "`evaluate.engine`. What was scored is kept, the next run continues from there"
            ) from error
        status = response.status_code
        if response.is_redirect:
            raise EvaluationError(
                f"{self._name} redirects (HTTP {status}); the key is not sent on: write its final address into "
                "`evaluate.engine.url`"
            )
        if status in (401, 403):
            said = "it was refused" if self.key else "none is set"
            raise EvaluationError(f"{self._name} asks for a key (HTTP {status}), {said}: check the variable {KEY}")
        if not response.is_success:
            kind = _RefusedError if status in _REFUSED else EvaluationError
            raise kind(f"{self._name}/{path} answers {status}: {self._clean(_said(response))}")
        try:
            value = response.json()
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{self._name}/{path} answers what is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise EvaluationError(f"{self._name}/{path} answers {type(value).__name__}; expected an object")
        return value

    def _clean(self, text: str) -> str:
        text = one_line(mask_secrets(text))[:300]
        return text.replace(self.key, "***") if self.key else text


def _said(response: httpx.Response) -> str:
    try:
        error = response.json().get("error", response.json())
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        return response.text


@dataclass(frozen=True)
class Connection:
    """A server whose way of answering is known."""

    record: EngineRecord
    _client: _Client
    _tokenizer: PreTrainedTokenizerBase
    _stop_ids: Tokens
    _max_new_tokens: int
    _concurrency: int

    @property
    def runner(self) -> Runner:
        """Scores batches through the server, several requests at a time."""

        def run(work: SectionWork, indices: Sequence[int], on_part: OnPart) -> None:
            with ThreadPoolExecutor(self._concurrency) as pool:
                asked: dict[int, list[Future[ScoreRow]]] = {
                    index: [pool.submit(self._score, work.section, unit) for unit in _units(work.batches[index])]
                    for index in indices
                }
                try:
                    for index, futures in asked.items():
                        on_part(index, [future.result() for future in futures])
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

        return run

    def still_answers(self, prepared: Prepared, kept: Scores) -> bool:
        """Whether the server answers the first and the last item as in kept scores.

        A name may hold another model by now, or since a scoring was broken off. Of generated answers one must be the
        same: near ties come out otherwise from time to time.
        """
        if self.record.offers == "generation":
            answers = prepared.answers
            return any(self._score("answers", answers[at]) == kept.answers[at] for at in {0, len(answers) - 1})
        pairs = [
            (self._score("items", prepared.items[at]), kept.items[at]) for at in sorted({0, len(prepared.items) - 1})
        ]
        return all(
            abs(again.nll - before.nll) <= _SAME_NATS * before.num_tokens  # type: ignore[union-attr]
            for again, before in pairs
        )

    def _score(self, section: Section, unit: Any) -> ScoreRow:
        if isinstance(unit, AnswerItem):
            return self._answer(unit)
        if isinstance(unit, Window):
            positions = self._positions(unit.ids)
            return DocumentScore(unit.document, -sum(each.log_probability for each in positions), len(positions))
        return self._options(unit, with_stop=section == "items" and bool(self._stop_ids))

    def _options(self, item: OptionItem, *, with_stop: bool) -> ScoreRow:
        """Each option's log-likelihood after the prompt, and whether an answer would end after the right one."""
        totals, stops, first = list[float](), None, len(item.prompt_ids) - 1
        for at, option in enumerate(item.option_ids):
            asks_stop = with_stop and at == item.gold
            more = self._stop_ids[:1] if asks_stop and not item.ended else ()
            positions = self._positions((*item.prompt_ids, *option, *more))[first:]
            totals.append(sum(each.log_probability for each in positions[: len(option)]))
            if asks_stop:
                stops = positions[-1].likeliest in self._ends
        return item_score(item, totals, stops)

    @property
    def _ends(self) -> set[int | str]:
        """The tokens that end an answer, as ids and as servers write them."""
        texts = (str(self._tokenizer.decode([token])) for token in self._stop_ids)
        return {*self._stop_ids, *texts, *(f"token_id:{token}" for token in self._stop_ids)}

    def _positions(self, ids: Tokens) -> list[_Position]:
        return _positions(self._client, self.record, ids, _prompt(ids, self._tokenizer, self.record.takes_ids))

    def _answer(self, item: AnswerItem) -> ScoreRow:
        prompt = _prompt(item.prompt_ids, self._tokenizer, self.record.takes_ids)
        ends = {"max_tokens": self._max_new_tokens, "stop_token_ids": list(self._stop_ids)}
        choice = self._client.complete(prompt, len(item.prompt_ids), **ends)
        text, reason = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise EvaluationError(
                f"the engine's answer to item {item.item_id} has the text {text!r:.60} and ended by {reason!r}; "
                "expected a text, and stop or length"
            )
        text = text.encode(errors="replace").decode()  # JSON may hold half of a surrogate pair
        num_tokens = len(self._tokenizer.encode(text, add_special_tokens=False))
        return answer_score(item, text, num_tokens=num_tokens, stop=reason == "stop")


def _units(batch: OptionBatch | Sequence[Any]) -> Sequence[Any]:
    return batch.items if isinstance(batch, OptionBatch) else batch


def _prompt(ids: Tokens, tokenizer: PreTrainedTokenizerBase, takes_ids: bool) -> Sequence[int] | str:
    """A prompt as the server takes it; a text without the tokens that a tokenizer puts before every text."""
    if takes_ids:
        return list(ids)
    added = encode_text("", tokenizer)
    written = ids[len(added) :] if list(ids[: len(added)]) == added else ids
    return str(tokenizer.decode(list(written)))


def _positions(client: _Client, record: EngineRecord, ids: Tokens, prompt: Sequence[int] | str) -> list[_Position]:
    """Log-probability of each token but the first.

    Raises:
        EvaluationError: the answer has not one finite number for each of our tokens.
    """
    if record.offers == "prompt_logprobs":
        choice = client.complete(prompt, len(ids), max_tokens=1, prompt_logprobs=1)
        read = _read_prompt_logprobs
    else:
        choice = client.complete(prompt, len(ids), max_tokens=1, echo=True, logprobs=1)
        read = _read_echo
    try:
        found = read(choice, ids)
        if not all(math.isfinite(each.log_probability) for each in found):
            raise ValueError("a value is not finite")
        if any(each.log_probability > _ROUNDING for each in found):
            raise ValueError("a value above 0 is no log-probability")
        if len(found) > 1 and not any(each.log_probability for each in found):
            raise ValueError("every value is 0, as if each token were certain")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EvaluationError(
            f"the engine at {mask_secrets(record.url)} gives no whole log-probabilities of a prompt of {len(ids)} "
            f"tokens ({record.offers}: {error!r}); does it cut prompts, or tokenize differently?"
        ) from error
    return found


def _read_prompt_logprobs(choice: Mapping[str, Any], ids: Tokens) -> list[_Position]:
    """The form of vLLM: by position, {"logprob"} of the prompt's token and of the likeliest one, by token id."""
    positions = choice["prompt_logprobs"]
    if len(positions) != len(ids):
        raise ValueError(f"{len(positions)} positions")
    found = []
    for token, position in zip(ids[1:], positions[1:], strict=True):
        given = {int(name): float(one["logprob"]) for name, one in position.items()}
        found.append(_Position(given[token], max(given, key=given.__getitem__)))
    return found


def _read_echo(choice: Mapping[str, Any], ids: Tokens) -> list[_Position]:
    """OpenAI's form: lists of the prompt's tokens and the one that was generated."""
    given = choice["logprobs"]
    tokens, values, tops = given["tokens"], given["token_logprobs"], given["top_logprobs"]
    if len(values) not in (len(ids), len(ids) + 1) or len(tokens) != len(values) or len(tops) != len(values):
        raise ValueError(f"{len(values)} values for {len(tokens)} tokens")
    found = []
    for token, value, top in list(zip(tokens, values, tops, strict=True))[1 : len(ids)]:
        likeliest = max({token: value, **top}.items(), key=lambda one: one[1])
        found.append(_Position(float(value), likeliest[0]))
    return found


def _is_offered(client: _Client, record: EngineRecord, ids: Tokens, prompt: Sequence[int] | str) -> bool:
    """Whether a server answers a way of asking; one that ignores unknown fields leaves the answer out."""
    try:
        if record.offers == "generation":
            client.complete(prompt, len(ids), max_tokens=1)
            return True
        asked: dict[str, Any] = (
            {"prompt_logprobs": 1} if record.offers == "prompt_logprobs" else {"echo": True, "logprobs": 1}
        )
        choice = client.complete(prompt, len(ids), max_tokens=1, **asked)
    except _RefusedError:
        return False
    if record.offers == "prompt_logprobs":
        given = choice.get("prompt_logprobs")
        return isinstance(given, list) and any(given)
    values = (choice.get("logprobs") or {}).get("token_logprobs") or ()
    return len(values) > 1  # without the echo, that of the generated token alone


def name_of(section: Engine, adapter: Digest) -> str:
    """The name that the server is asked for."""
    return section.model.replace(ADAPTER, adapter.hex[:12])


@contextlib.contextmanager
def connect(
    section: Engine, model: str, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, *, retry: Retry | None = None
) -> Iterator[Connection]:
    """Find out how a server answers, by one request for each way, and score through it.

    Args:
        section: the pipeline's ``evaluate.engine``.
        model: the name to ask for (`name_of`).
        tokenizer: the candidate's.
        prepared: what is to be scored.
        retry: how often a request is tried again; the usual times when left out.

    Raises:
        EvaluationError: the key would travel unencrypted, the server is down, has no such model, or answers nothing.
    """
    url, key = section.url.rstrip("/"), os.environ.get(KEY)
    if key and urlsplit(url).scheme == "http" and urlsplit(url).hostname not in LOOPBACK:
        raise EvaluationError(
            f"evaluate.engine.url is {url}, to which the key in {KEY} would travel unencrypted; expected https:// "
            "(http:// only on this machine, or without a key)"
        )
    limits = httpx.Limits(max_connections=section.concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(timeout=_TIMEOUT, headers=headers, limits=limits, follow_redirects=False) as http:
        client = _Client(url, model, http, key, retry or Retry())
        record = _probed(client, tokenizer, prepared)
        yield Connection(record, client, tokenizer, prepared.stop_ids, prepared.max_new_tokens, section.concurrency)


def _probed(client: _Client, tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> EngineRecord:
    served, first = client.served(), prepared.items[0]
    ids = (*first.prompt_ids, *first.option_ids[first.gold])
    ways: tuple[Offers, ...] = ("prompt_logprobs", "echo", "generation")
    for takes_ids in (True, False):
        prompt = _prompt(ids, tokenizer, takes_ids)
        for way in ways:
            record = EngineRecord(client.url, client.model, way, takes_ids, served)
            if _is_offered(client, record, ids, prompt):
                if way != "generation":
                    _positions(client, record, ids, prompt)
                return record
    try:
        client.complete(prompt, len(ids), max_tokens=1)
    except _RefusedError as error:
        raise EvaluationError(
            f"{error}; it was asked for one token after the first evaluation row's prompt. An OpenAI-compatible API's "
            "address often ends in /v1: check `evaluate.engine`"
        ) from error
    raise EvaluationError(f"the engine at {mask_secrets(client.url)} answers no completion")
