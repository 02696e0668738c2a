import io

import pytest

from graftline.logs import Reporter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("graftline.logs.time.monotonic", lambda: now[0])
    return now


def test_a_line_has_the_rate_and_the_time_left(clock: list[float]) -> None:
    out = io.StringIO()
    report = Reporter("train", "steps", stream=out)
    report(0, 100)
    clock[0] += 10
    report(20, 100, note="loss 0.5")
    assert out.getvalue() == "train  20/100 steps  2 steps/s  40 s left  loss 0.5\n"


def test_lines_come_at_most_every_two_seconds_and_at_the_end(clock: list[float]) -> None:
    out = io.StringIO()
    report = Reporter("init", "tensors", stream=out)
    for done in range(41):
        report(done, 40)
        clock[0] += 0.125
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["16/40", "32/40", "40/40"]


def test_short_work_prints_nothing(clock: list[float]) -> None:
    out = io.StringIO()
    report = Reporter("gate", "items", stream=out)
    for done in range(5):
        report(done, 4)
        clock[0] += 0.1
    assert out.getvalue() == ""


def test_the_rate_of_a_resumed_run_counts_from_where_it_went_on(clock: list[float]) -> None:
    out = io.StringIO()
    report = Reporter("train", "steps", stream=out)
    report(50, 100)
    clock[0] += 10
    report(60, 100)
    assert out.getvalue() == "train  60/100 steps  1 steps/s  40 s left\n"
