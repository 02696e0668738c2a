"""The compose file: complete, pinned, closed to other machines, and in step with the rest of the project."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "infra" / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))


def test_the_services_are_those_of_a_whole_machine() -> None:
    assert set(SERVICES) == {"postgres", "s3", "bucket", "prefect", "deploy", "worker", "serving"}


def test_every_image_has_a_version() -> None:
    for service in SERVICES.values():
        assert re.search(r":[\w.-]+\}?$", service["image"]), service["image"]
        assert "latest" not in service["image"]
    assert SERVICES["s3"]["image"].endswith(PINS["moto"])


def test_our_own_containers_cannot_write_to_themselves_or_gain_rights() -> None:
    own = [name for name, service in SERVICES.items() if "graftline:cpu" in service["image"]]
    assert len(own) == 5
    for name in own:
        service = SERVICES[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_nothing_listens_to_other_machines() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_a_service_waits_for_what_it_needs() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES, name
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed], f"{name} waits for {needed}"


def test_volumes_are_declared() -> None:
    mounts = [m.split(":")[0] for service in SERVICES.values() for m in service.get("volumes", [])]
    assert {mount for mount in mounts if re.fullmatch(r"[\w-]+", mount)} == set(COMPOSE["volumes"])


def test_every_required_variable_is_in_the_example_and_has_no_value_there() -> None:
    required = set(re.findall(r"\$\{(\w+):\?", TEXT))
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "infra" / "env.example").read_text(), flags=re.MULTILINE))
    assert set(example) == required
    assert not any(example.values())


def test_the_worker_polls_the_pool_that_is_made_and_that_the_deployments_name() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (pool,) = {deployment["work_pool"]["name"] for deployment in deployments}
    assert f"work-pool create {pool} " in SERVICES["deploy"]["command"][-1]
    assert f"--pool {pool} " in SERVICES["worker"]["command"][-1]


@pytest.mark.parametrize("name", ["prefect", "serving"])
def test_the_health_check_asks_the_port_that_is_served(name: str) -> None:
    port = SERVICES[name]["ports"][0].rsplit(":", 1)[1]
    assert f":{port}/" in SERVICES[name]["healthcheck"]["test"][-1]
