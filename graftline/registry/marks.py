"""How far a channel's log is known to reach: its end may never be before that.

Two know it: the log's checkpoints in the store (the name of one says how many entries it holds), and what this machine
has seen. Neither is needed to read a log; both are compared with it by whoever does (graftline.registry.channel).
"""

import logging
import re
from collections.abc import Iterator

from graftline.errors import GraftlineError, StoreUnavailableError
from graftline.registry.objects import check_name
from graftline.registry.seen import Mark
from graftline.registry.store import Store

_CHECKPOINT = re.compile(r"([0-9]{10})\.json")
_LOG = logging.getLogger(__name__)


def checkpoint_folder(pipeline: str, channel: str) -> str:
    """Where a channel's checkpoints are."""
    return f"checkpoints/{check_name('pipeline', pipeline)}/{check_name('channel', channel)}"


def marks(store: Store, pipeline: str, channel: str) -> Iterator[Mark]:
    """What is known of a channel's log.

    Raises:
        StoreError: what this machine has seen cannot be read, or the store does not answer.
    """
    if seen := store.seen.mark(pipeline, channel):
        yield seen
    folder = checkpoint_folder(pipeline, channel)
    try:
        names = [key.removeprefix(f"{folder}/") for key in store.list(folder)]
    except StoreUnavailableError:
        raise  # no answer is not a "no": the next one may be that the log went back
    except GraftlineError as error:
        # Roles made before there were checkpoints may not list them.
        _LOG.warning("the history of %s/%s is not compared with its checkpoints: %s", pipeline, channel, error)
        return
    if matches := [match for name in names if (match := _CHECKPOINT.fullmatch(name))]:
        last = max(matches, key=lambda match: match[1])
        yield Mark(int(last[1]), None, f"{folder}/{last[0]} holds it; if that is wrong, remove it")
