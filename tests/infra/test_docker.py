"""The images: pinned, without root, and with everything that they copy."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "infra" / "docker").glob("Dockerfile.c*[ua]"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
    lines = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, arguments.strip()) for name, _, arguments in lines]


def test_there_is_an_image_for_cpu_and_one_for_cuda() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_image_does_not_run_as_root(path: Path) -> None:
    users = [arguments for name, arguments in instructions(path) if name == "USER"]
    assert users == ["10001:10001"]
    after = instructions(path)[[name for name, _ in instructions(path)].index("USER") :]
    assert "RUN" not in {name for name, _ in after}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_python_and_every_package_are_pinned(path: Path) -> None:
    (image,) = [arguments for name, arguments in instructions(path) if name == "ARG"]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm", image)
    installs = [a for name, a in instructions(path) if name == "RUN" and "pip install" in a]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in command for command in installs)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_nothing_else_is_sent_to_the_builder(path: Path) -> None:
    copied = {part for name, arguments in instructions(path) if name == "COPY" for part in arguments.split()[:-1]}
    ignore = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_the_two_images_differ_only_in_what_a_gpu_needs() -> None:
    cpu, cuda = (instructions(path) for path in DOCKERFILES)
    assert [name for name, _ in cpu] == [name for name, _ in cuda]
    differing = [name for (name, a), (_, b) in zip(cpu, cuda, strict=True) if a != b]
    assert differing == ["RUN", "RUN", "ENV"]


def test_what_is_compiled_at_run_time_lies_where_the_image_can_write_and_pods_keep_it() -> None:
    """A pod's root is read-only, and compiled layers cost minutes: the caches lie in the mounted /cache."""
    about = dict(_variables(DOCKERFILES[1]))
    kept = [about[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "GRAFTLINE_CACHE")]
    assert all(place.startswith("/cache/") for place in kept)
    pool = json.loads((DOCKERFILES[1].parents[1] / "k8s" / "work-pool.json").read_text(encoding="utf-8"))
    pod = pool["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]
    assert "/cache" in [mount["mountPath"] for mount in pod["volumeMounts"]]
    text = DOCKERFILES[1].read_text(encoding="utf-8")
    assert {"g++", "gcc", "libc6-dev"} <= set(text.split())


def _variables(path: Path) -> list[tuple[str, str]]:
    (given,) = (arguments for name, arguments in instructions(path) if name == "ENV")
    return [(name, value) for name, _, value in (pair.partition("=") for pair in given.split())]
