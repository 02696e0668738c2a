"""Energy of a stage: counters where the machine has some, an estimate that says so where it has none."""

import time
from pathlib import Path

import pynvml
import pytest

from graftline.workflow import stage
from graftline.workflow.stage import EnergyMeter, estimate


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without NVML, whatever this one has."""

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)


def make_zone(powercap: Path, zone: str, name: str, microjoules: int) -> Path:
    folder = powercap / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_processors_are_summed_their_parts_and_the_platform_are_not(tmp_path: Path) -> None:
    zones = [
        make_zone(tmp_path, zone, name, 100_000)
        for zone, name in {
            "intel-rapl:0": "package-0",
            "intel-rapl:1": "package-1",
            "intel-rapl:0:0": "core",
            "intel-rapl:2": "psys",
        }.items()
    ]
    meter = EnergyMeter(tmp_path)
    for folder in zones:
        (folder / "energy_uj").write_text("460000")
    found = meter.read(0)
    assert found.watt_hours == pytest.approx(2 * 0.36 / 3600)
    assert found.source == "processors measured (RAPL, all of this machine)"


def test_a_counter_that_starts_again_loses_nothing_if_it_is_looked_at_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_LOOK_SECONDS", 0.01)
    counter = make_zone(tmp_path, "intel-rapl:0", "package-0", 900_000) / "energy_uj"
    meter = EnergyMeter(tmp_path)
    (rapl,) = meter._processors
    for value in (100_000, 800_000, 50_000):  # 0.2 J, 0.7 J and 0.25 J on a counter of 1 J
        spare = counter.with_name("next")
        spare.write_text(f"{value}")
        spare.replace(counter)
        while rapl._last != value:
            time.sleep(0.005)
    assert meter.read(0).watt_hours == pytest.approx(1.15 / 3600)


def test_without_a_counter_it_is_an_estimate_of_core_seconds_and_memory(tmp_path: Path) -> None:
    # Two cores for an hour and 8 GB, by hand: 2 · 12 Wh + 8 · 0.3725 Wh.
    assert estimate(2 * 3600, 3600, 8e9) / 3600 == pytest.approx(26.98)
    meter = EnergyMeter(tmp_path)
    busy = time.process_time() + 0.05
    while time.process_time() < busy:
        pass
    found = meter.read(1e9)
    assert found.watt_hours >= 0.03 * 12 / 3600  # the system counts in ticks of 10 ms
    assert "estimated" in found.source


def test_a_counter_that_only_root_may_read_is_no_counter(tmp_path: Path) -> None:
    folder = make_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (folder / "energy_uj").unlink()  # Tests may run as root, who may read everything.
    assert "no counter can be read here" in EnergyMeter(tmp_path).read(0).source


def test_gpus_are_counted_by_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules = iter([1_000_000, 5_000_000, 4_600_000, 8_600_000])
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: next(millijoules))
    make_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    found = EnergyMeter(tmp_path).read(0)
    assert found.watt_hours == pytest.approx(7200 / 3600)
    assert found.source.endswith("GPUs measured (NVML, all of this machine)")
