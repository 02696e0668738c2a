"""Which device a run gets, with stand-ins for Prefect's limits; real leases of a real server: test_deployed.py."""

import contextlib
from collections.abc import Iterator

import pytest

from graftline.workflow import leases


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Limits that somebody holds; tests add and remove."""
    taken: set[str] = set()

    @contextlib.contextmanager
    def slot(limit: str, *, timeout_seconds: float | None) -> Iterator[None]:
        if limit in taken:
            assert timeout_seconds is not None, f"would wait for {limit} for ever"
            raise TimeoutError
        taken.add(limit)
        yield
        taken.discard(limit)

    monkeypatch.setattr(leases, "has_server", lambda: True)
    monkeypatch.setattr(leases, "_limit", lambda name: name)
    monkeypatch.setattr(leases, "_slot", slot)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return taken


def test_of_two_gpus_the_free_one_is_taken_and_given_back(held: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with leases.device() as first, leases.device() as second:
        assert (first, second) == ("GPU-a", "GPU-b")
        assert held == {"graftline-GPU-a", "graftline-GPU-b"}
    assert held == set()


def test_a_gpu_that_becomes_free_while_all_were_busy_is_found(held: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    held |= {"graftline-GPU-a", "graftline-GPU-b"}
    tries: list[str] = []
    slot = leases._slot

    def free_after_three(limit: str, *, timeout_seconds: float | None) -> contextlib.AbstractContextManager[None]:
        tries.append(limit)
        if len(tries) == 4:
            held.discard("graftline-GPU-b")
        return slot(limit, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(leases, "_slot", free_after_three)
    with leases.device() as device:
        assert device == "GPU-b"
    assert tries == ["graftline-GPU-a", "graftline-GPU-b"] * 2


def test_an_error_of_the_work_is_not_taken_for_a_busy_device(held: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with pytest.raises(TimeoutError, match="the work's own"), leases.device():
        raise TimeoutError("the work's own")


def test_a_machine_without_gpus_computes_one_stage_at_a_time(held: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with leases.device() as device:
        assert device is None
        (limit,) = held
        assert limit.startswith("graftline-cpu-")


def test_kubernetes_and_runs_without_a_server_hold_nothing(held: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with leases.device() as device:
        assert (device, held) == (None, set())
    monkeypatch.setattr(leases, "has_server", lambda: False)
    with leases.pipeline("pets"):
        assert held == set()
