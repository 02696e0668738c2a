"""What every flow's command line does around its flow."""

import contextlib
from collections.abc import Iterator

import httpx

from graftline.doctor import prefect_server
from graftline.errors import GraftlineError
from graftline.program import guarded
from graftline.workflow import orphans

_NO_SERVER = ("Failed to reach API", "Found incompatible versions", "Timed out while attempting to connect to")
"""How Prefect's client begins to say that its server is not there, or is of another version."""


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """End the process as `graftline.program.guarded` does: a message and exit code 2 for what a user can act on.

    A temporary Prefect server that the flow starts ends with this process, however that ends.
    """
    with guarded():
        orphans.watch()
        try:
            yield
        except (RuntimeError, httpx.HTTPError) as error:
            if not (isinstance(error, httpx.HTTPError) or str(error).startswith(_NO_SERVER)):
                raise
            raise GraftlineError(prefect_server.no_answer(" ".join(str(error).split()))) from error
