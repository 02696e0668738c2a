"""One vLLM process over HTTP: list, load, unload, and try the recorded answers.

Routes and errors as vLLM documents them (``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``, ``--enable-lora``). vLLM has not
been run here: the tests use a stand-in with its documented routes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from graftline.errors import PromotionError, ServingError
from graftline.plain_text import one_line
from graftline.serve.smoke import SmokeSample

TOP_K = 20
"""Alternatives requested for each token; vLLM's ``--max-logprobs`` is 20 unless changed."""
MIN_TOP1 = 0.9
"""Share of recorded tokens that must be the likeliest ones: half precision reverses near ties."""
MAX_MEAN_KL = 0.02
"""Largest divergence, nats a token, of served from recorded probabilities; half precision alone cost 1e-4 here."""


class UnreachableError(ServingError):
    """A replica does not answer; it may be starting."""


@dataclass(frozen=True)
class Agreement:
    """How closely served probabilities match the recorded ones."""

    num_tokens: int
    top1: float
    """Share of recorded tokens that are the likeliest ones."""
    mean_kl: float | None
    """Nats a token, over the returned tokens and the rest as one; None: the release has recorded no probabilities."""

    @property
    def matches(self) -> bool:
        """Whether the replica serves the model that was judged."""
        return self.top1 >= MIN_TOP1 and (self.mean_kl is None or self.mean_kl <= MAX_MEAN_KL)


@dataclass(frozen=True)
class VllmClient:
    """A client of one replica; ``token``: vLLM's ``--api-key``."""

    url: str
    token: str | None = None
    timeout_seconds: float = 120.0

    @cached_property
    def _http(self) -> httpx.Client:
        """Made once: reading the machine's certificates takes 20 ms. Connections are not kept, so none can be stale."""
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(headers=headers, timeout=self.timeout_seconds, limits=limits, trust_env=False)

    def models(self) -> set[str]:
        """Names that can be asked for; UnreachableError where it does not answer."""
        listed = self._ask("GET", "/v1/models").get("data")
        if not isinstance(listed, list) or not all(isinstance(one, dict) and "id" in one for one in listed):
            raise UnreachableError(f"{self.url}/v1/models is not a list of models; is that vLLM?")
        return {str(one["id"]) for one in listed}

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter folder that the replica sees at the same path, under a name never used before.

        Raises:
            ServingError: vLLM refuses it; its reason is given.
            UnreachableError: it does not answer.
        """
        try:
            self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except ServingError as error:
            if "has already been loaded" not in str(error):
                raise

    def unload(self, name: str) -> None:
        """Unload an adapter; does nothing if it is not loaded. Raises as `load`."""
        try:
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ServingError as error:
            if "cannot be found" not in str(error):
                raise

    def try_answers(self, name: str, samples: Sequence[SmokeSample]) -> Agreement:
        """Compare recorded answers with what the replica finds likely after the same tokens.

        Raises:
            ServingError: vLLM refuses the request, or gives no log-probabilities.
        """
        top: list[bool] = []
        divergences: list[float] = []
        for sample in samples:
            found = self._likely(name, [*sample.prompt, *sample.answer])[len(sample.prompt) :]
            for at, (token, served) in enumerate(zip(sample.answer, found, strict=True)):
                top.append(max(served, key=lambda one: served[one]) == token)
                if sample.top:
                    divergences.append(divergence(sample.top[at], served))
        mean_kl = sum(divergences) / len(divergences) if divergences else None
        return Agreement(len(top), sum(top) / len(top) if top else 0.0, mean_kl)

    def check(self, name: str, samples: Sequence[SmokeSample]) -> None:
        """Raise PromotionError unless the replica gives a release's recorded answers."""
        if not samples:
            raise PromotionError(f"{name} has no recorded answers; make the package again")
        found = self.try_answers(name, samples)
        if not found.matches:
            kl = "" if found.mean_kl is None else f", and {found.mean_kl:.2g} nats a token away ({MAX_MEAN_KL} allowed)"
            raise PromotionError(
                f"{name} at {self.url}: {found.top1:.0%} of {found.num_tokens} recorded tokens are the most likely "
                f"ones ({MIN_TOP1:.0%} needed){kl}: vLLM does not run the model that was judged"
            )

    def _likely(self, name: str, tokens: list[int]) -> list[Mapping[int, float]]:
        """Log-probabilities by token at each position of a prompt, the first position left empty by vLLM."""
        body = {"model": name, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP_K}
        answer = self._ask("POST", "/v1/completions", body)
        try:
            positions = answer["choices"][0]["prompt_logprobs"]
            if len(positions) != len(tokens):
                raise ValueError(f"{len(positions)} positions for {len(tokens)} tokens")
            if not all(positions[1:]):
                raise ValueError("a position without any")
            return [
                {int(token): float(one["logprob"]) for token, one in (position or {}).items()} for position in positions
            ]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ServingError(
                f"{self.url} gives no log-probabilities of a prompt ({error!r}); is --max-logprobs at least {TOP_K}?"
            ) from error

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._http.request(method, f"{self.url}{path}", json=body)
        except httpx.HTTPError as error:
            raise UnreachableError(f"{self.url} does not answer: {one_line(str(error) or repr(error))}") from error
        if answer.is_success:
            try:
                value = answer.json()
            except ValueError:  # loading answers with a sentence
                return {}
            return value if isinstance(value, dict) else {}
        if answer.status_code in (502, 503, 504):
            raise UnreachableError(f"{self.url} answers {answer.status_code}")
        raise ServingError(f"{self.url}{path} answers {answer.status_code}: {_message(answer)}")


def divergence(recorded: Mapping[int, float], served: Mapping[int, float]) -> float:
    """A lower bound of KL(recorded, served) in nats: over the tokens that both give, with all others as one.

    Merging tokens never makes it larger, so what exceeds a limit here exceeds it over the whole vocabulary too.
    """
    both = recorded.keys() & served.keys()
    cells = [(math.exp(recorded[token]), math.exp(served[token])) for token in both]
    rest = tuple(max(1.0 - sum(cell[side] for cell in cells), 1e-12) for side in (0, 1))
    return max(0.0, sum(p * math.log(p / max(q, 1e-12)) for p, q in [*cells, rest] if p > 0))


def _message(answer: httpx.Response) -> str:
    try:
        value = answer.json()
        error = value.get("error", value)
        return one_line(str(error.get("message", value)))[:500]
    except (ValueError, AttributeError):
        return one_line(answer.text)[:500]
