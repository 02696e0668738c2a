"""The plugin for vLLM, against a stand-in of its published base class, registry and request: vLLM itself never ran."""

import asyncio
import sys
import tomllib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from ruamel.yaml import YAML

from graftline.adapters.peft_format import AdapterWeights
from graftline.cli.following import follow
from graftline.errors import ConfigError
from graftline.registry import channel as channels
from graftline.registry.file_store import FileStore
from graftline.registry.rollout import go_back
from graftline.serve import vllm_plugin
from tests.serve.following import make_release, promote
from tests.serve.test_rollouts import start_rollout
from tests.settings.documents import changed
from tests.tiny import make_tiny_llama

ROOT = Path(__file__).resolve().parents[2]


class LoRAResolver(ABC):
    """As published: ``vllm.lora.resolver.LoRAResolver``."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any: ...


class Registry:
    """As published: ``LoRAResolverRegistry.register_resolver(name, resolver)``."""

    registered: ClassVar[dict[str, LoRAResolver]] = {}

    @classmethod
    def register_resolver(cls, name: str, resolver: LoRAResolver) -> None:
        assert isinstance(resolver, LoRAResolver)
        cls.registered[name] = resolver


@dataclass
class LoRARequest:
    """As published."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    base_model_name: str | None = None
    tensorizer_config_dict: dict[str, Any] | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        assert self.lora_int_id > 0
        assert self.lora_path


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.lora.request"].LoRARequest = LoRARequest  # type: ignore[attr-defined]
    sys.modules["vllm.lora.resolver"].LoRAResolver = LoRAResolver  # type: ignore[attr-defined]
    sys.modules["vllm.lora.resolver"].LoRAResolverRegistry = Registry  # type: ignore[attr-defined]
    Registry.registered.clear()


@pytest.fixture
def environment(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """vLLM's environment; the folder that adapters go to."""
    values = {"STORE": str(tmp_path / "store"), "BASE": str(tiny), "FOLDER": str(tmp_path / "adapters")}
    values["UNSIGNED"] = "1"
    for name, value in values.items():
        monkeypatch.setenv(f"GRAFTLINE_{name}", value)
    return tmp_path / "adapters"


def resolve(name: str) -> LoRARequest | None:
    """What vLLM would do with a name that is not loaded, in a process of its own."""
    vllm_plugin.register()
    found: LoRARequest | None = asyncio.run(Registry.registered["graftline"].resolve_lora("tiny", name))
    return found


def test_a_promoted_release_is_fetched_rewritten_and_has_the_same_id_in_every_process(
    environment: Path, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    first, second = (make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2))
    promote(store, *first)
    promote(store, *second)
    found = [resolve(f"demo@{version}") for version, _ in (first, second, first)]
    assert all(one is not None for one in found)
    assert found[0] == found[2]
    assert len({one.lora_int_id for one in found if one}) == 2
    assert found[0] is not None
    assert (found[0].lora_name, found[0].base_model_name) == (f"demo@{first[0]}", "tiny")
    written = AdapterWeights.open(Path(found[0].lora_path))
    assert written.spec.alpha == written.spec.rank  # as vLLM needs it
    assert Path(found[0].lora_path).is_relative_to(environment)


def test_names_that_move_and_names_of_others_are_not_resolved(
    environment: Path, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1))
    for name in ("demo@production", "tiny", "somebody/adapter", "demo@", "@x", "demo@../../etc"):
        assert resolve(name) is None


def test_only_what_a_channel_holds_tries_or_has_held_is_served(
    environment: Path, store: FileStore, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held, bad, tried, never = (make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2, 3, 4))
    for release in (held, bad):
        promote(store, *release)
    log = channels.read(store, "demo", "production")
    back = log.entries[0].change.model_copy(update={"action": "rollback"})
    channels.append(store, channels.next_entry(log, back))
    start_rollout(store, *tried)
    assert resolve(f"demo@{held[0]}")
    assert resolve(f"demo@{tried[0]}")
    for release in (bad, never):
        caplog.clear()
        assert resolve(f"demo@{release[0]}") is None
        assert "is in no channel of production, or was gone back from" in caplog.text
    head = channels.head(store, "demo", "production")
    assert head is not None
    go_back(store, head, reason="bad")
    assert resolve(f"demo@{tried[0]}") is None
    assert resolve(f"demo@{held[0]}")


def test_what_does_not_verify_is_not_served_and_the_log_says_why(
    environment: Path, store: FileStore, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_tiny_llama(tmp_path / "other-base", seed=8, num_hidden_layers=1)
    promote(store, *make_release(store, other, tmp_path, seed=1))
    version = channels.read(store, "demo", "production").entries[0].change.version
    assert resolve(f"demo@{version}") is None
    assert "was trained on" in caplog.text
    version, digest = make_release(store, tiny, tmp_path, seed=2)
    file = next((tmp_path / "store").rglob(f"{version}/adapter/adapter_model.safetensors"))
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    promote(store, version, digest)
    assert resolve(f"demo@{version}") is None
    (tmp_path / "store").rename(tmp_path / "away")
    assert resolve(f"demo@{version}") is None


def test_vllm_starts_where_the_plugin_is_only_installed_and_not_where_it_is_half_set_up(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTLINE_BASE", "nowhere")
    with pytest.raises(ConfigError, match="GRAFTLINE_BASE is nowhere; there is no such folder"):
        vllm_plugin.register()
    monkeypatch.setenv("GRAFTLINE_BASE", str(environment.parent))
    monkeypatch.delenv("GRAFTLINE_UNSIGNED")
    with pytest.raises(ConfigError, match=r"GRAFTLINE_PROJECT is not set.*GRAFTLINE_UNSIGNED=1: check no signature"):
        vllm_plugin.register()
    monkeypatch.delenv("GRAFTLINE_BASE")
    monkeypatch.delenv("GRAFTLINE_FOLDER")
    with pytest.raises(ConfigError, match="GRAFTLINE_BASE, GRAFTLINE_FOLDER not set"):
        vllm_plugin.register()
    monkeypatch.delenv("GRAFTLINE_STORE")
    vllm_plugin.register()
    assert Registry.registered == {}


def test_the_entry_point_names_the_function() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert points == {"vllm.general_plugins": {"graftline": "graftline.serve.vllm_plugin:register"}}


def test_a_channel_with_its_shares_is_a_manifest_of_llm_d(
    store: FileStore, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="so no signature can be checked"):
        follow(["demo"], print_llm_d="pool")
    with pytest.raises(ConfigError, match="nothing was ever promoted into production of demo"):
        follow(["demo"], print_llm_d="pool", unsigned=True)
    first, second = (make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2))
    promote(store, *first)
    start_rollout(store, *second, share=5)
    follow(["demo@production"], print_llm_d="pool", unsigned=True)
    (found,) = YAML(typ="safe").load_all(capsys.readouterr().out)
    assert (found["kind"], found["metadata"]["name"]) == ("InferenceModelRewrite", "demo-production")
    assert found["apiVersion"] == "inference.networking.x-k8s.io/v1alpha2"
    assert found["spec"] == {
        "poolRef": {"name": "pool"},
        "rules": [
            {
                "matches": [{"model": {"type": "Exact", "value": "demo@production"}}],
                "targets": [
                    {"modelRewrite": f"demo@{first[0]}", "weight": 95},
                    {"modelRewrite": f"demo@{second[0]}", "weight": 5},
                ],
            }
        ],
    }
