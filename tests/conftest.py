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


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("golden", "the record of today's behaviour (tests/golden)")
    group.addoption("--update-golden", action="store_true", help="rewrite the records that differ, and show how")
    group.addoption(
        "--golden-exact",
        action="store_true",
        help="compare bytes, too, with those that this machine gave before (.cache/golden); keep them the first time",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What ``--update-golden`` has rewritten."""
    passed = terminalreporter.getreports("passed")
    texts = [text for report in passed for name, text in report.user_properties if name == "golden"]
    if texts:
        terminalreporter.section("records that were rewritten")
        for text in texts:
            terminalreporter.write_line(str(text))
