"""What every flow's command line does around its flow."""

import contextlib
import os
import sys
from collections.abc import Iterator

from graftline import logs, proxies
from graftline.errors import GraftlineError
from graftline.workflow import orphans


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """End the process with exit code 2 and the error's message, without a traceback.

    A temporary Prefect server that the flow starts ends with this process, however that ends.
    """
    proxies.spare_loopback(os.environ)
    orphans.watch()
    logs.print_any_text()
    try:
        yield
    except GraftlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
