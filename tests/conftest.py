"""Shared fixtures. One thread: two threads on a busy core can be ten times slower than one for tiny models."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny fp32 Llama with tokenizer. Read-only: copy it before changing it."""
    from tests.tiny import make_tiny_llama  # torch is imported only by tests that need a model

    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
