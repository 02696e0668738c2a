from collections.abc import Iterator
from pathlib import Path

import pytest

from graftline.data.sources import cache as arrival
from graftline.retry import Retry
from tests.data.sources.servers import FileServer, file_server
from tests.registry.servers import make_bucket, moto_server


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """moto's S3 with an empty bucket."""
    with moto_server() as running:
        make_bucket(running)
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries are real, their pauses a hundred times shorter."""
    monkeypatch.setattr(arrival, "RETRY", Retry(attempts=arrival.RETRY.attempts, base_seconds=0.01))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers are on this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
