"""The start and end that all graftline programs share: restart if needed, errors, Ctrl-C and closed pipes.

    python -m graftline.program MODULE ARGUMENT…

runs a module as ``python -m MODULE`` would, but also guards its imports: they take seconds, in which a user may press
Ctrl-C, and they are where a missing package shows up.
"""

import contextlib
import getpass
import locale
import os
import runpy
import signal
import sys
import tomllib
import traceback
from collections.abc import Iterator

from graftline import address, extras, handover, logs
from graftline.address import mask_secrets
from graftline.errors import GraftlineError, disk_error, explain_disk_error

EXIT_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + 13
"""As a shell reports that SIGPIPE (13) ended a program: the reader of its output has gone (``graftline gc | head``)."""
_NO_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator: ")
"""Markers of torch's errors, with and without CUDA."""
_NO_SOCKS = (
    "a proxy of the environment (ALL_PROXY, HTTPS_PROXY, HTTP_PROXY) speaks SOCKS, for which the package socksio is "
    "not installed; run: pip install 'httpx[socks]'"
)
_STARTED_AGAIN = "GRAFTLINE_STARTED_AGAIN"
"""Id of the process that restarted, to do so only once: options such as ``-I`` make Python ignore its variables."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Run a program: errors that a user can act on end it with a message and exit code 2, Ctrl-C quietly with 130.

    Any other error is a bug and keeps its traceback.
    """
    start_again_where_needed()
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
        # Typer exits with 1 on a closed pipe, which here would mean that a gate stopped a run.
        if isinstance(end.__context__, BrokenPipeError):
            _end_with_closed_pipe()
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(f"error: {mask_secrets(message)}\n")
        if disk_error(error):
            _print_no_more()
        sys.exit(EXIT_ERROR)


def end_quietly_while_importing() -> None:
    """For a package whose modules are run with ``python -m``: Ctrl-C during their imports prints no traceback.

    Called by the package; does nothing if another program imports it. `guarded` takes over, or in a sweep, before these
    imports, a process that has made them (`graftline.handover`).
    """
    if is_starting() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if is_starting():
        handover.where_asked()


def is_starting() -> bool:
    """Whether a package is imported because one of its modules was started with ``python -m``."""
    return sys.argv[:1] == ["-m"]


def _leave(*_: object) -> None:
    os._exit(EXIT_INTERRUPTED)


def explain(error: Exception) -> str | None:
    """The message for an error that a user can act on; None for any other."""
    if isinstance(error, GraftlineError):
        return str(error)
    if isinstance(error, ImportError):
        return _NO_SOCKS if "socksio" in str(error) else extras.explain(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        cause = " ".join(text.split())
        return f"there is not enough memory: {cause}; `graftline plan PIPELINE` says what a training needs"
    if found := disk_error(error):
        return explain_disk_error(found)
    return _explain_prefect_settings(error)


def _explain_prefect_settings(error: Exception) -> str | None:
    """The message where Prefect, which reads its settings while it is imported, refuses one of them."""
    frames = traceback.walk_tb(error.__traceback__)
    if not any(frame.f_globals.get("__name__", "").startswith("prefect.") for frame, _ in frames):
        return None
    if isinstance(error, tomllib.TOMLDecodeError):
        return f"Prefect's profiles.toml is not valid TOML: {error}; correct the file, or delete it"
    from pydantic import ValidationError  # `--help` must not load it

    if not isinstance(error, ValidationError) or not error.title.endswith("Settings"):
        return None
    problem = error.errors(include_url=False)[0]
    value = problem["input"]
    variables = [
        name
        for name, text in os.environ.items()
        if name.startswith("PREFECT_") and text.casefold() == str(value).casefold()
    ]
    setting = " or ".join(variables) or f"{error.title}.{'.'.join(map(str, problem['loc']))}"
    advice = "correct it" if variables else "correct it in Prefect's profile (profiles.toml)"
    return f"Prefect refuses its setting {setting} = {value!r}: {problem['msg']}; {advice}"


def start_again_where_needed() -> None:
    """Restart this program if Python was started in a way that breaks its dependencies.

    * With ``PYTHONOPTIMIZE=2``, docstrings are removed: help is made from them, and altair, which Great Expectations
      imports, fails without its own. Assertions stay off, as requested.
    * If the locale's encoding is not UTF-8: file names are UTF-8 here, as git and DVC write them. Output stays in the
      locale's encoding.
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
    """A command-line word for a process that reads it as UTF-8; one that is UTF-8 already is unchanged."""
    given = os.fsencode(word)
    try:
        given.decode("utf-8")
    except UnicodeDecodeError:
        return word.encode("utf-8", "surrogateescape")
    return given


def user_name() -> str | None:
    """The user's name, from the environment or the system; None if it is unknown."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return None


def _end_quietly() -> None:
    # Cleanup must not print a traceback at the next Ctrl-C either: from now on it ends the process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(EXIT_INTERRUPTED)


def _end_with_closed_pipe() -> None:
    _print_no_more()
    sys.exit(EXIT_PIPE_CLOSED)


def _print_no_more() -> None:
    # Python flushes at exit and would report the closed pipe or the full disk again.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """``python -m graftline.program MODULE ARGUMENT…``."""
    with guarded():
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
