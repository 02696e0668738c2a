"""The command line: it checks arguments and prints; the library and, for stages, ``tasks`` do the work."""

from graftline.program import guarded


def main() -> None:
    """Entry point: errors that a user can act on become text on stderr and exit code 2, never a traceback."""
    with guarded():
        # Imported inside the guard, because it takes a third of a second.
        from graftline.cli.application import app

        app(prog_name="graftline")
