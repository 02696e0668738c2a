"""What every flow's command line does around its flow."""

import contextlib
from collections.abc import Iterator

from graftline.program import guarded
from graftline.workflow import orphans


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """End the process as `graftline.program.guarded` does: a message and exit code 2 for what a user can act on.

    A temporary Prefect server that the flow starts ends with this process, however that ends.
    """
    with guarded():
        orphans.watch()
        yield
