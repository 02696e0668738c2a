"""S3 servers for tests: every one is real and spoken to over HTTP."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.ports import free_port, wait_for_port

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "models"


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """moto's S3 on a free port; yields its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def ministack_server() -> Iterator[str]:
    """ministack's S3 in a process of its own; yields its address. Skips where it is not installed."""
    command = Path(sys.executable).with_name("ministack")
    if not command.is_file():
        pytest.skip("ministack is not installed; it is among the development dependencies")
    port = free_port()
    environment = {"GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1", "SERVICES": "s3", "S3_PERSIST": "0"}
    process = subprocess.Popen(
        [command], env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_port(port, process, what="ministack")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def use_credentials(monkeypatch: pytest.MonkeyPatch, absent: Path) -> None:
    """Credentials for a test server, and nothing from this machine's own configuration."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(absent))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def make_bucket(endpoint: str) -> None:
    """Create the bucket that the tests use."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
