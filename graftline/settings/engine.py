"""The section ``evaluate.engine``: the server on which the gates judge a candidate."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from graftline.settings.fields import Section, Text

ADAPTER = "{adapter}"
"""Stands in `Engine.model` for the first digits of the candidate's digest."""


def _check(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0  # both raise ValueError for what cannot be read
    except ValueError:
        is_whole = False
    if not is_whole or parts.query or parts.fragment:
        raise PydanticCustomError("address", "an address with a host and no query, such as https://vllm.example/v1")
    if "@" in parts.netloc:
        raise PydanticCustomError(
            "address", "no user name or password in the address: the key comes from the variable GRAFTLINE_ENGINE_KEY"
        )
    return url


class Engine(Section):
    """An OpenAI-compatible server that has the candidate, such as vLLM or `graftline serve` (docs/gates.md)."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[!-~]+$", max_length=1024), AfterValidator(_check)]
    """Base address of its API, such as http://127.0.0.1:8000/v1. Its key, if it needs one, is read from the variable
    GRAFTLINE_ENGINE_KEY; it is sent unencrypted to this machine only."""
    model: Text
    """Name under which the server has the candidate. `{adapter}` in it stands for the first 12 digits of the adapter's
    digest: with such a name, no candidate is ever taken for another one."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests under way at a time."""
