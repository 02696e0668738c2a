"""pip and npm, run for real: against a folder of wheels, and against a small registry over HTTP."""

import base64
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from graftline.data.sources import fetch, packages, parse, resolve
from graftline.errors import SourceError, SourceUnavailableError
from tests.data.sources.servers import FileServer, status, whole
from tests.data.sources.test_archive import make_tar, make_zip

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


WHEEL_FILES = {
    "tiny_rows/rows.jsonl": b'{"prompt": "a", "completion": "b"}\n',
    "tiny_rows-1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-rows\nVersion: 1.2\n",
    "tiny_rows-1.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_rows-1.2.dist-info/RECORD": b"",
}
ROWS = parse("pypi:tiny-rows==1.2/tiny_rows/rows.jsonl")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel in a folder that is to be pip's only index."""
    return make_zip(tmp_path_factory.mktemp("index") / "tiny_rows-1.2-py3-none-any.whl", WHEEL_FILES)


@pytest.fixture(autouse=True)
def only_index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_inside_a_wheel_is_fetched_once_and_then_without_network(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sha256(wheel.read_bytes())

    path = fetch(ROWS, sha256=digest, cache=cache)

    assert (path.name, path.read_bytes()) == ("rows.jsonl", WHEEL_FILES["tiny_rows/rows.jsonl"])
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch(ROWS, sha256=digest, cache=cache) == path
    assert fetch(ROWS, sha256=None, cache=cache) == path
    assert resolve(ROWS, cache=cache).hex == digest
    with pytest.raises(SourceError, match=r"holds no 'tiny_rows/row\.json'; .* nearest: tiny_rows/rows\.jsonl"):
        fetch(parse("pypi:tiny-rows==1.2/tiny_rows/row.json"), sha256=digest, cache=cache)


def test_a_wheel_of_another_digest_is_refused(wheel: Path, cache: Path) -> None:
    with pytest.raises(
        SourceError, match=f"has digest sha256:{sha256(wheel.read_bytes())}; expected sha256:{'0' * 64}"
    ):
        fetch(ROWS, sha256="0" * 64, cache=cache)

    assert list((cache / "entries").glob("*")) == []


def test_a_version_that_does_not_exist_shows_what_pip_said(cache: Path) -> None:
    with pytest.raises(SourceError, match=r"tiny-rows==9\.9/x: pip failed: .*No matching distribution found"):
        fetch(parse("pypi:tiny-rows==9.9/x"), sha256=None, cache=cache)


def test_a_source_distribution_is_refused_because_building_it_runs_its_code(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tar(tmp_path / "evil-1.0.tar.gz", {"setup.py": b"raise SystemExit('ran')"}, prefix="evil-1.0/")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(SourceError, match=r"No matching distribution found for evil==1\.0"):
        fetch(parse("pypi:evil==1.0/setup.py"), sha256=None, cache=cache)


@pytest.fixture
def registry(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A registry with one package; gives its tarball."""
    tarball = make_tar(
        tmp_path / "nouns-3.1.0.tgz",
        {
            "package.json": json.dumps(
                {"name": "nouns", "version": "3.1.0", "scripts": {"prepare": "exit 1"}}
            ).encode(),
            "dict/data.noun": b"nouns\n",
        },
    ).read_bytes()
    dist = {
        "tarball": f"{server.url}/nouns/-/nouns-3.1.0.tgz",
        "shasum": hashlib.sha1(tarball).hexdigest(),
        "integrity": f"sha512-{base64.b64encode(hashlib.sha512(tarball).digest()).decode()}",
    }
    versions = {"3.1.0": {"name": "nouns", "version": "3.1.0", "dist": dist}}
    packument = {"name": "nouns", "dist-tags": {"latest": "3.1.0"}, "versions": versions}
    body = json.dumps(packument).encode()
    server.answers["/nouns"] = [whole(body, **{"Content-Type": "application/json"})]
    server.answers["/nouns/-/nouns-3.1.0.tgz"] = [whole(tarball)]
    server.answers["/absent"] = [status(404)]
    monkeypatch.setenv("npm_config_registry", server.url)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    return tarball


@needs_npm
def test_a_file_inside_an_npm_package_is_fetched(registry: bytes, cache: Path) -> None:
    path = fetch(parse("npm:nouns@3.1.0/dict/data.noun"), sha256=sha256(registry), cache=cache)

    assert path.name == "data.noun"
    assert path.read_bytes() == b"nouns\n"


@needs_npm
@pytest.mark.parametrize("address", ["npm:nouns@9.9.9/x", "npm:absent@1.0.0/x"])
def test_an_npm_package_that_does_not_exist_is_an_error(registry: bytes, cache: Path, address: str) -> None:
    with pytest.raises(SourceError, match=f"{address}: npm failed: .*check name and version"):
        fetch(parse(address), sha256=None, cache=cache)


@needs_npm
def test_a_registry_that_is_not_there_is_unavailable(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")

    with pytest.raises(
        SourceUnavailableError, match=r"npm failed: .*ECONNREFUSED.*; check the network, then run again"
    ):
        fetch(parse("npm:nouns@3.1.0/x"), sha256=None, cache=cache)


def test_an_index_that_is_not_there_is_unavailable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")

    with pytest.raises(SourceUnavailableError, match=r"pip failed: .*; check the network, then run again"):
        fetch(ROWS, sha256=None, cache=cache)


def test_a_full_disk_is_called_a_full_disk() -> None:
    error = packages._failure(ROWS, "npm", "npm error code ENOSPC\nnpm error syscall write\n")

    assert "npm failed: npm error code ENOSPC | npm error syscall write; the disk is full: free some" in str(error)


def test_a_machine_without_npm_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(SourceError, match="needs npm, which is not on the PATH; install Node"):
        fetch(parse("npm:nouns@3.1.0/x"), sha256=None, cache=cache)
