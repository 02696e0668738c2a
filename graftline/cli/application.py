"""The application with all commands. torch, Prefect and DVC are imported on demand, so that ``--help`` is fast."""

from importlib.metadata import version
from typing import Annotated

import typer

from graftline.cli import following, pipelines, releases, serving, telling

app = typer.Typer(
    help="Fine-tune a language model with adapters, prove that it is better, and release it.\n\n"
    "Start with `graftline init`, then `graftline config check`, then `graftline retrain PIPELINE`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
pipelines.add_to(app)
pipelines.add_stages_to(app)
releases.add_promote_to(app)
releases.add_to(app)
telling.add_to(app)
serving.add_export_to(app)
serving.add_to(app)
serving.add_rows_to(app)
following.add_to(app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"graftline {version('graftline')}")
        raise typer.Exit


@app.callback()
def start(
    print_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command; the help text is the application's."""
