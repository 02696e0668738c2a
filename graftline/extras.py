"""Missing dependencies: the extra that provides a package, and versions that are refused.

``pip install graftline`` alone can plan, train, judge and merge. The tables follow pyproject.toml; a test compares
them.
"""

import functools
import importlib
import sys
from importlib import metadata

from graftline.errors import ConfigError

EXTRAS = {
    "serve": ("fastapi", "onnx", "onnx_ir", "onnxruntime", "prometheus_client", "starlette", "uvicorn"),
    "flow": ("dvc", "great_expectations", "prefect"),
    "s3": ("boto3", "botocore", "dvc_s3"),
    "ray": ("ray",),
    "scale": ("prefect_dask", "prefect_ray"),
    "search": ("optuna",),
    "trackers": ("tensorboard", "dvclive"),
    "telemetry": ("opentelemetry",),
    "structured": ("llguidance",),
    "harness": ("lm_eval",),
}
"""Each extra with the import names of its packages."""

DECIDE_NUMBERS = {"torch": ">=2.8" if sys.platform == "darwin" else ">=2.11", "transformers": ">=5.23,<6"}
"""Packages that determine training and evaluation results. pip only warns if another install replaced one of them."""


class MissingExtraError(ConfigError):
    """A package that only an extra provides is not installed."""


def install_command(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'graftline[{extra}]'"


def explain(error: ImportError) -> str | None:
    """The message for a missing package; None if no extra provides it.

    Args:
        error: what the import raised; ``error.name`` is the module that was not found.
    """
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if extra is None or not isinstance(error, ModuleNotFoundError):
        return None
    return f"the package {package} is not installed; install what this command needs: {install_command(extra)}"


def require(module: str) -> None:
    """Import a module that another process will need, so that a missing one is reported here.

    Raises:
        MissingExtraError: it is not installed; the extra that provides it is named.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = explain(error)
        if message is None:
            raise
        raise MissingExtraError(message) from error


class VersionError(ConfigError):
    """A package that determines results has a version that is not known to give correct numbers."""


@functools.cache
def refuse_other_versions() -> None:
    """Check the versions of packages that determine results, before training, judging or serving.

    Other versions usually run but give other numbers: a transformers that scales the loss differently trains another
    adapter, without an error.

    Raises:
        VersionError: one is outside the range in pyproject.toml.
        MissingExtraError: one is not installed.
    """
    for package, supported in DECIDE_NUMBERS.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise MissingExtraError(f"the package {package} is not installed; run: pip install graftline") from error
        if not _is_in(installed, supported):
            raise VersionError(
                f"{package} {installed} is installed; graftline computes with {package}{supported}, and another "
                f"version may change results without an error; run: pip install '{package}{supported}'"
            )


def _is_in(version: str, supported: str) -> bool:
    """Whether a version is supported; vendors' builds count (2.13.0a0+git1 in NVIDIA's images, 2.13.0+cpu)."""
    from packaging.specifiers import SpecifierSet  # not needed by `graftline --help`, which imports this module
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(version).base_version) in SpecifierSet(supported)
    except InvalidVersion:
        return False
