import pytest

from graftline import retry
from graftline.retry import Retry, may_pass


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


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 507, 520])
def test_a_server_that_is_busy_or_out_of_order_may_answer_later(status: int) -> None:
    assert may_pass(status)


@pytest.mark.parametrize("status", [0, 200, 302, 400, 401, 403, 404, 412, 501, 505])
def test_a_refusal_does_not_pass_by_itself(status: int) -> None:
    assert not may_pass(status)


def test_a_long_wait_is_told_and_shows_no_password(waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    def refused() -> None:
        raise OSError("https://user:hunter2@host/rows?token=hunter3 refused the connection")

    with pytest.raises(OSError, match="refused"):
        Retry(attempts=3, base_seconds=0.8).call(refused, transient=lambda _: True)

    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith("try 2 of 3 failed (OSError: https://***@host/rows?token=***")
    assert "hunter" not in caplog.text
