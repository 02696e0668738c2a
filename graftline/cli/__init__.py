"""The command line. It checks arguments and prints; the work is done by the library and, for stages, by ``tasks``."""

from graftline.program import guarded


def main() -> None:
    """Entry point: errors that a user can act on become text on stderr and exit code 2, never a traceback."""
    with guarded():
        # Guarded, too: importing every command takes a third of a second.
        from graftline.cli.application import app

        app(prog_name="graftline")
