import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftline.registry.store import Store, open_store
from tests.registry.servers import BUCKET, make_bucket, ministack_server, moto_server, use_credentials


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    with moto_server() as endpoint:
        make_bucket(endpoint)
        yield endpoint


@pytest.fixture(scope="session")
def ministack_endpoint() -> Iterator[str]:
    with ministack_server() as endpoint:
        make_bucket(endpoint)
        yield endpoint


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials for a test server, and nothing from this machine's own configuration."""
    use_credentials(monkeypatch, tmp_path / "absent")


@pytest.fixture
def moto_store(moto_endpoint: str, s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store on moto's server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_endpoint)
    return open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture
def ministack_store(ministack_endpoint: str, s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store on a second server, which unlike moto verifies checksums."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", ministack_endpoint)
    return open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture
def file_store(tmp_path: Path) -> Store:
    """For behaviour above the store, which the conformance suite need not repeat."""
    return open_store(str(tmp_path / "store"))


@pytest.fixture(params=["file", "moto", "ministack"])
def store(request: pytest.FixtureRequest) -> Store:
    """Every kind of store, empty: the conformance suite runs over all of them."""
    chosen: Store = request.getfixturevalue(f"{request.param}_store")
    return chosen
