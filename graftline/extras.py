"""Which packages an optional extra brings: what is missing is named with the command that installs it.

``pip install graftline`` alone plans, trains, judges and merges. The table follows pyproject.toml; a test compares
them.
"""

import importlib

from graftline.errors import ConfigError

EXTRAS = {
    "serve": ("fastapi", "onnx", "onnx_ir", "onnxruntime", "prometheus_client", "starlette", "uvicorn"),
    "flow": ("dvc", "great_expectations", "prefect"),
    "s3": ("boto3", "botocore", "dvc_s3"),
    "ray": ("ray",),
    "scale": ("prefect_dask", "prefect_ray"),
    "trackers": ("tensorboard", "dvclive"),
    "telemetry": ("opentelemetry",),
    "structured": ("llguidance",),
    "harness": ("lm_eval",),
}
"""An extra to the names under which its packages are imported."""


class MissingExtraError(ConfigError):
    """A package is not installed that only an extra brings."""


def install_command(extra: str) -> str:
    """What installs an extra."""
    return f"pip install 'graftline[{extra}]'"


def explain(error: ImportError) -> str | None:
    """What to tell somebody who lacks a package; None if no extra brings it.

    Args:
        error: what the import raised; ``error.name`` is the module that was not found.
    """
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if extra is None or not isinstance(error, ModuleNotFoundError):
        return None
    return f"the package {package} is not installed; install what this command needs: {install_command(extra)}"


def require(module: str) -> None:
    """Import a module that another process is about to need, so that its absence is told here.

    Raises:
        MissingExtraError: it is not installed; the extra that brings it is named.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = explain(error)
        if message is None:
            raise
        raise MissingExtraError(message) from error
