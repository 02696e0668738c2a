import pytest

from graftline.registry import retry
from graftline.registry.retry import Retry


class Flaky:
    """Fails a number of times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError("try again")
        return "done"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits that would have been made, each at its upper bound."""
    waited: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high)
    return waited


def test_waits_double_up_to_a_cap(waits: list[float]) -> None:
    assert Retry(attempts=8, base_seconds=1, cap_seconds=8).call(Flaky(6), transient=lambda _: True) == "done"
    assert waits == [1, 2, 4, 8, 8, 8]


def test_after_the_last_try_its_error_is_raised(waits: list[float]) -> None:
    flaky = Flaky(99)
    with pytest.raises(OSError, match="try again"):
        Retry(attempts=3).call(flaky, transient=lambda _: True)
    assert flaky.calls == 3
    assert len(waits) == 2


def test_what_does_not_pass_by_itself_is_not_tried_again(waits: list[float]) -> None:
    flaky = Flaky(99)
    with pytest.raises(OSError, match="try again"):
        Retry().call(flaky, transient=lambda _: False)
    assert flaky.calls == 1
    assert waits == []


def test_waits_differ_from_client_to_client(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    for _ in range(20):
        Retry(base_seconds=1).call(Flaky(1), transient=lambda _: True)
    assert len(set(waited)) == 20
    assert all(0 <= wait <= 1 for wait in waited)
