"""What stages hold of a machine, by real leases of a real Prefect server; the GPUs are names that stand for some."""

import contextlib
import threading
from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.testing.utilities import prefect_test_harness

from graftline.plan.resources import PLAN, Machine, StageNeeds
from graftline.workflow import leases

GPUS = Machine(("GPU-a", "GPU-b", "GPU-c"), cores=4, memory_gb=10.5)
PROCESSORS = Machine((), cores=4, memory_gb=10.5)


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with prefect_test_harness(server_startup_timeout=400), get_client(sync_client=True) as client:
        yield client


@pytest.fixture(autouse=True)
def on_a_machine_of_its_own(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(leases, "LOOK_SECONDS", 0.1)
    for limit in client.read_global_concurrency_limits():
        client.delete_global_concurrency_limit_by_name(limit.name)


def wanted(
    gpus: int = 0, cores: int | None = None, memory_gb: float | None = None, origin: str = "given"
) -> StageNeeds:
    return StageNeeds("train", gpus, cores, memory_gb, dict.fromkeys(("gpus", "cores", "memory_gb"), origin))


def held(client: SyncPrefectClient) -> dict[str, int]:
    """Slots that somebody holds, by the limit's name without the machine's."""
    found = client.read_global_concurrency_limits()
    return {limit.name: limit.active_slots for limit in found if limit.active_slots}


def test_several_gpus_are_held_together_and_the_next_stage_has_another(client: SyncPrefectClient) -> None:
    with leases.stage(wanted(gpus=2), GPUS) as first, leases.stage(wanted(gpus=1), GPUS) as second:
        assert first == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
        assert second == {"CUDA_VISIBLE_DEVICES": "GPU-c"}
        assert held(client) == {"graftline-GPU-a": 1, "graftline-GPU-b": 1, "graftline-GPU-c": 1}
    assert held(client) == {}


def test_a_stage_that_waits_for_two_gpus_holds_none_and_starts_when_both_are_free(client: SyncPrefectClient) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold_two() -> None:
        with leases.stage(wanted(gpus=2), GPUS):
            entered.set()
            leave.wait(60)

    other = threading.Thread(target=hold_two)
    with contextlib.ExitStack() as stack:
        first = contextlib.ExitStack()
        stack.enter_context(first)
        first.enter_context(leases.stage(wanted(gpus=1), GPUS))
        stack.enter_context(leases.stage(wanted(gpus=1), GPUS))
        other.start()
        assert not entered.wait(3)
        assert sum(held(client).values()) == 2, "GPU-c stays free for a stage that needs only one"
        first.close()
        assert entered.wait(60)
        assert sum(held(client).values()) == 3
        leave.set()
        other.join(60)


def test_an_error_of_the_work_is_not_taken_for_a_busy_gpu(client: SyncPrefectClient) -> None:
    with pytest.raises(TimeoutError, match="the work's own"), leases.stage(wanted(gpus=1), GPUS):
        raise TimeoutError("the work's own")
    assert held(client) == {}


def test_a_stage_without_a_gpu_sees_none(client: SyncPrefectClient) -> None:
    with leases.stage(wanted(), GPUS) as environment:
        assert environment == {"CUDA_VISIBLE_DEVICES": ""}
        assert held(client) == {}


def test_cores_and_memory_are_counted_in_slots_of_the_machine(client: SyncPrefectClient) -> None:
    with leases.stage(wanted(cores=3, memory_gb=2.5), PROCESSORS) as environment:
        assert environment == {"GRAFTLINE_CORES": "3"}
        assert sorted(held(client).values()) == [3, 3]
        with leases.stage(wanted(cores=1, memory_gb=7), PROCESSORS):
            assert sorted(held(client).values()) == [4, 10]


def test_cores_that_are_a_default_bound_no_threads(client: SyncPrefectClient) -> None:
    with leases.stage(wanted(cores=4, origin=PLAN), PROCESSORS) as environment:
        assert environment == {}
        assert list(held(client).values()) == [4]


def test_memory_up_to_the_machine_s_last_part_of_a_gb_can_be_had(client: SyncPrefectClient) -> None:
    with leases.stage(wanted(memory_gb=10.5), PROCESSORS):
        assert list(held(client).values()) == [10]


def test_of_a_limit_that_somebody_made_smaller_all_slots_are_enough(client: SyncPrefectClient) -> None:
    with leases.stage(wanted(cores=4), PROCESSORS):
        (name,) = held(client)
    client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=2))
    with leases.stage(wanted(cores=4), PROCESSORS):
        assert held(client) == {name: 2}


def test_gpus_with_numbers_are_another_machine_s_on_another_machine(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = Machine(("0",), cores=4, memory_gb=10.5)
    with leases.stage(wanted(gpus=1), numbered):
        monkeypatch.setattr(leases.platform, "node", lambda: "another")
        with leases.stage(wanted(gpus=1), numbered):
            assert len(held(client)) == 2


def test_kubernetes_and_runs_without_a_server_hold_nothing(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with leases.stage(wanted(gpus=1, cores=2), GPUS) as environment:
        assert (environment, held(client)) == ({"GRAFTLINE_CORES": "2"}, {})
    monkeypatch.setattr(leases, "has_server", lambda: False)
    with leases.pipeline("pets"):
        assert held(client) == {}
