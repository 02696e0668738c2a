"""What pyproject.toml asks for, where it is not there: the extra that brings a package, versions that are refused.

``pip install graftline`` alone plans, trains, judges and merges. The tables follow pyproject.toml; a test compares
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
    "scale": ("prefect_dask", "prefect_ray"),
    "trackers": ("tensorboard", "dvclive"),
    "telemetry": ("opentelemetry",),
    "structured": ("llguidance",),
    "harness": ("lm_eval",),
}
"""An extra to the names under which its packages are imported."""

DECIDE_NUMBERS = {"torch": ">=2.8" if sys.platform == "darwin" else ">=2.13", "transformers": ">=5.23,<6"}
"""Packages that compute what is trained and judged. pip only warns where another install has replaced one of them."""


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


class VersionError(ConfigError):
    """A package that decides what is computed has a version for which nobody has shown that the numbers are right."""


@functools.cache
def refuse_other_versions() -> None:
    """Look at the versions of what computes; for the start of whatever trains, judges or serves.

    Other versions mostly run and give other numbers: a transformers that scales the loss differently trains another
    adapter, without an error.

    Raises:
        VersionError: one is not in the range that pyproject.toml names.
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
    """Whether a release is supported; vendors' builds of it count (2.13.0a0+git1 in NVIDIA's images, 2.13.0+cpu)."""
    from packaging.specifiers import SpecifierSet  # not needed by `graftline --help`, which imports this module
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(version).base_version) in SpecifierSet(supported)
    except InvalidVersion:
        return False
