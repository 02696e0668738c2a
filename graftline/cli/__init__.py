"""The command line. It checks arguments and prints; the work is done by the library and, for stages, by ``tasks``.

torch, Prefect and DVC are not imported before a command needs them, so that ``--help`` comes at once.
"""

import os
import sys

import typer

from graftline import logs, proxies
from graftline.address import mask_secrets
from graftline.cli import exporting, pipelines, promoting, releases, serving, stages
from graftline.errors import GraftlineError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="Fine-tune a language model with adapters, prove that it is better, and release it.\n\n"
    "Start with `graftline init`, then `graftline config check`, then `graftline retrain PIPELINE`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
pipelines.add_to(app)
stages.add_to(app)
promoting.add_to(app)
releases.add_to(app)
exporting.add_to(app)
serving.add_to(app)


def main() -> None:
    """Entry point: errors that a user can act on become text on stderr and exit code 2, never a traceback."""
    logs.print_any_text()
    proxies.spare_loopback(os.environ)
    try:
        app(prog_name="graftline")
    except GraftlineError as error:
        typer.echo(f"error: {mask_secrets(str(error))}", err=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
