"""The command that writes an adapter for other software, or says why that software cannot take it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from graftline.progress import Reporter


class Target(StrEnum):
    """Software that loads adapters."""

    VLLM = "vllm"
    PEFT = "peft"
    TRANSFORMERS = "transformers"
    ONNX = "onnx"
    GGUF = "gguf"


AdapterFolder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)]
Base = Annotated[Path, typer.Option("--base", metavar="FOLDER", help="The base that it was trained on.")]
For = Annotated[Target, typer.Option("--target", help="Which software.")]


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    example = "Example: graftline export runs/demo/train/adapter out --base runs/demo/init/base --target vllm"
    app.command("export", epilog=example)(export)


def export(adapter: AdapterFolder, out: OutFolder, base: Base, target: For) -> None:
    """Write an adapter for other software. What had to be changed and the command that loads it are printed."""
    # torch and transformers: seconds to import, which --help need not pay.
    from graftline.export import targets

    if target is Target.ONNX:
        _export_onnx(adapter, out, base)
        return
    if target is Target.GGUF:
        _export_gguf(adapter, out, base)
        return
    software = cast("targets.Target", target.value)
    done = targets.export_adapter(adapter, out, target=software, shape_of=targets.shapes_of(base))
    for change in done.changes:
        typer.echo(f"changed: {change}")
    typer.echo(f"{out}: {done.command}")


def _export_onnx(adapter: Path, out: Path, base: Path) -> None:
    from graftline.export.onnx_adapter import export_adapter
    from graftline.export.onnx_export import cached_graph

    graph = cached_graph(base, out, on_progress=Reporter("graph", "tensors"))
    file = out / "adapter.onnx_adapter"
    export_adapter(adapter, file, base=base, graph=graph)
    typer.echo(f"{file}: for the graph in {graph}, with RunOptions.add_active_adapter")


def _export_gguf(adapter: Path, out: Path, base: Path) -> None:
    from graftline.export.gguf_adapter import export_adapter

    file = out / "adapter.gguf"
    export_adapter(adapter, file, base=base)
    typer.echo(f"{file}: llama-server --model BASE.gguf --lora {file}")
