"""Shared fixtures. One thread: two threads on a busy core can be ten times slower than one for tiny models."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

from pathlib import Path

import pytest

LONGEST_FIRST = (
    "tests/line/test_line.py",
    "tests/flows/test_deployed.py",
    "tests/scaffold/test_wheel.py",
    "tests/infra/test_dependencies.py",
    "tests/workflow/test_pull_request.py",
    "tests/line/test_evaluate_pr.py",
    "tests/flows/test_surroundings.py",
    "tests/line/test_pairs.py",
    "tests/workflow/test_scored_once.py",
    "tests/train/test_resume.py",
    "tests/train/test_distributed.py",
    "tests/workflow/test_archive.py",
    "tests/workflow/test_plan.py",
)
"""Files that take longest, begun first so that at the end no worker waits for one of them.

pytest-xdist gives out files by their number of tests, and these have few: `--no-loadscope-reorder` in the Makefile.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


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
