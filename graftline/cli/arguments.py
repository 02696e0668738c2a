"""Arguments that several commands share."""

from typing import Annotated

import typer

KEY_FILE = "keys.yaml"
"""Whose signatures count; in the folder of pipelines.yaml."""

PipelineName = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A name from pipelines.yaml.", show_default=False)
]
Version = Annotated[
    str, typer.Argument(metavar="VERSION", help="A release, as `history` shows it.", show_default=False)
]
ChannelName = Annotated[
    str | None, typer.Option("--channel", metavar="NAME", help="A channel; by default the pipeline's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Actor = Annotated[
    str | None, typer.Option("--actor", "--as", metavar="NAME", help="Who does it; by default the user's name.")
]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, in a sentence for people.")]
