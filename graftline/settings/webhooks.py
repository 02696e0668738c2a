"""The section ``channels.NAME.webhooks``: who is told of promotions and rollbacks."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, StringConstraints
from pydantic_core import PydanticCustomError

from graftline.settings.fields import Section


def _check(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0  # both raise ValueError for what cannot be read
    except ValueError:
        is_whole = False
    if not is_whole:
        raise PydanticCustomError("address", "an address with a host, such as https://hooks.example.org/graftline")
    if "@" in parts.netloc:
        raise PydanticCustomError("address", "no user name or password in the address: `secret` signs the messages")
    return url


class Webhook(Section):
    """A receiver of a channel's messages, signed as Standard Webhooks says (docs/promotion.md)."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[!-~]+$", max_length=1024), AfterValidator(_check)]
    """Address that messages are posted to, such as https://hooks.example.org/graftline."""
    secret: Annotated[str, StringConstraints(pattern=r"^GRAFTLINE_WEBHOOK_[A-Z0-9_]+$", max_length=100)] = (
        "GRAFTLINE_WEBHOOK_SECRET"  # noqa: S105  # the variable's name
    )
    """Name of the environment variable with the secret that signs messages: `whsec_` and 24 to 64 bytes in base64; two
    separated by a space while one replaces the other."""
