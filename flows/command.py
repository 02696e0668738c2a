"""What every flow's command line does with an error that its message explains."""

import contextlib
import sys
from collections.abc import Iterator

from graftline import logs
from graftline.errors import GraftlineError


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """End the process with exit code 2 and the error's message, without a traceback."""
    logs.print_any_text()
    try:
        yield
    except GraftlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
