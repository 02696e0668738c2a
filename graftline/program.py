"""What every program of graftline does around its work: how it starts, and how errors, Ctrl-C and closed pipes end it.

    python -m graftline.program MODULE ARGUMENT…

runs a module as ``python -m MODULE`` would, its imports guarded too: they take seconds in which somebody may press
Ctrl-C, and they are where a missing package shows.
"""

import contextlib
import getpass
import locale
import os
import runpy
import signal
import sys
from collections.abc import Iterator

from graftline import address, extras, logs
from graftline.address import mask_secrets
from graftline.errors import GraftlineError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + 13
"""As a shell tells that SIGPIPE (13) ended a program: who read the output has gone (``graftline gc | head``)."""
_NO_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator: ")
"""What torch says, with and without CUDA."""
_NO_SOCKS = (
    "a proxy of the environment (ALL_PROXY, HTTPS_PROXY, HTTP_PROXY) speaks SOCKS, for which the package socksio is "
    "not installed; run: pip install 'httpx[socks]'"
)
_STARTED_AGAIN = "GRAFTLINE_STARTED_AGAIN"
"""Holds the process that did: options such as ``-I`` make Python ignore its variables, and once is enough."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Run a program: what a user can act on ends it with a message and exit code 2, Ctrl-C quietly with 130.

    Any other error is a bug and keeps its traceback.
    """
    _start_again_where_needed()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logs.print_any_text()
    address.spare_loopback(os.environ)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end_quietly()
    except BrokenPipeError:
        _end_with_closed_pipe()
    except SystemExit as end:
        # Typer makes 1 of a closed pipe, which here means that a gate stopped a run.
        if isinstance(end.__context__, BrokenPipeError):
            _end_with_closed_pipe()
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(f"error: {mask_secrets(message)}\n")
        sys.exit(EXIT_ERROR)


def end_quietly_while_importing() -> None:
    """For a package whose modules are run with ``python -m``: Ctrl-C during their imports prints no frames.

    Called by the package; does nothing where another program imports it. `guarded` takes over.
    """
    if is_starting() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def is_starting() -> bool:
    """Whether a package is imported because one of its modules was started with ``python -m``."""
    return sys.argv[:1] == ["-m"]


def _leave(*_: object) -> None:
    os._exit(EXIT_INTERRUPTED)


def explain(error: Exception) -> str | None:
    """What to tell a user about an error that he can act on; None for any other."""
    if isinstance(error, GraftlineError):
        return str(error)
    if isinstance(error, ImportError):
        return _NO_SOCKS if "socksio" in str(error) else extras.explain(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        cause = " ".join(text.split())
        return f"there is not enough memory: {cause}; `graftline plan PIPELINE` says what a training needs"
    return None


def _start_again_where_needed() -> None:
    """Start this program again if Python was started in a way that breaks what it calls.

    * Where ``PYTHONOPTIMIZE=2`` has removed docstrings: help is made of them, and altair, which Great Expectations
      imports, fails without its own. Assertions stay off, as they were asked to be.
    * Where the locale's encoding is not UTF-8: names of files are UTF-8 here, as git and DVC write them. What is
      printed stays in the locale's encoding.
    """
    changes: dict[str, str] = {}
    if sys.flags.optimize > 1:
        changes["PYTHONOPTIMIZE"] = "1"
    if sys.getfilesystemencoding() != "utf-8":
        printed = os.environ.get("PYTHONIOENCODING") or f"{locale.getencoding()}:backslashreplace"
        changes |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": printed}
    if not changes or os.environ.get(_STARTED_AGAIN) == str(os.getpid()):
        return
    words = [_as_utf8(word) for word in sys.orig_argv[1:] if word not in ("-O", "-OO")]
    os.execve(
        sys.executable, [os.fsencode(sys.executable), *words], os.environ | changes | {_STARTED_AGAIN: str(os.getpid())}
    )


def _as_utf8(word: str) -> bytes:
    """A word of the command line for a process that reads it as UTF-8, which it may be whatever the locale says."""
    given = os.fsencode(word)
    try:
        given.decode("utf-8")
    except UnicodeDecodeError:
        return word.encode("utf-8", "surrogateescape")
    return given


def user_name() -> str | None:
    """The user's name, from the environment or the system; None if it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return None


def _end_quietly() -> None:
    # What still has to end must not print the next Ctrl-C's frames either: from now on it ends the process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(EXIT_INTERRUPTED)


def _end_with_closed_pipe() -> None:
    # Python flushes at its end and would complain once more.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(EXIT_PIPE_CLOSED)


def main() -> None:
    """``python -m graftline.program MODULE ARGUMENT…``."""
    with guarded():
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
