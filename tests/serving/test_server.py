"""A server is put together from settings, and not exposed without a token."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from graftline.checkpoint.identity import BaseIdentity, read_identity, write_identity
from graftline.digest import of_bytes
from graftline.errors import BaseMismatchError, ServingError
from graftline.merge.fold import merge_folder
from graftline.serving import smoke
from graftline.serving.base import Runtime
from graftline.serving.server import ServeSettings, check_exposure, make_server
from tests.serving.conftest import make_adapter
from tests.tiny import make_tiny_llama


def test_bases_adapters_and_merged_models_are_served_side_by_side(
    tiny: Path, adapters: dict[str, Path], runtime: Runtime, tmp_path: Path
) -> None:
    merge_folder(tiny, adapters["lora"], tmp_path / "merged", dtype=torch.float32)
    settings = ServeSettings(
        bases=(("tiny", tiny), ("merged", tmp_path / "merged")), adapters=tuple(adapters.items()), runtime=runtime
    )
    server = make_server(settings)
    assert [model.name for model in server.catalog.models()] == ["tiny", "merged", *adapters]
    assert all(server.catalog.resolve(name).parent == "tiny" for name in adapters)


def test_an_adapter_without_its_base_is_refused(tiny: Path, runtime: Runtime, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=4, num_hidden_layers=1)
    adapter = make_adapter(other, tmp_path / "adapter")
    with pytest.raises(ServingError, match="serve its own base"):
        make_server(ServeSettings(bases=(("tiny", tiny),), adapters=(("a", adapter),), runtime=runtime))


def test_an_adapter_of_another_template_is_refused(tiny: Path, runtime: Runtime, tmp_path: Path) -> None:
    changed = make_tiny_llama(tmp_path / "changed", num_hidden_layers=1)
    config = changed / "chat_template.jinja"
    config.write_text(config.read_text().replace("assistant", "helper"))
    adapter = make_adapter(changed, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="with the template"):
        make_server(ServeSettings(bases=(("tiny", tiny),), adapters=(("a", adapter),), runtime=runtime))


def test_an_adapter_trained_without_a_chat_template_is_prompted_without_one(
    tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", template="none")
    server = make_server(ServeSettings(bases=(("tiny", tiny),), adapters=(("plain", adapter),), runtime=runtime))
    served = server.catalog.resolve("plain")
    assert served.template == "none"
    tokens = served.base.encode_chat([("user", "a plant")], served.template)
    assert served.base.tokenizer.decode(tokens) == "a plant"
    with pytest.raises(ServingError, match="one prompt"):
        served.base.encode_chat([("system", "be brief"), ("user", "a plant")], served.template)


def test_the_same_weights_with_another_alpha_are_another_adapter(
    tiny: Path, adapters: dict[str, Path], runtime: Runtime, tmp_path: Path
) -> None:
    other = shutil.copytree(adapters["lora"], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    settings = ServeSettings(
        bases=(("tiny", tiny),), adapters=(("one", adapters["lora"]), ("two", other)), runtime=runtime
    )
    catalog = make_server(settings).catalog
    answers = {smoke.greedy(catalog.resolve(name), [5, 6, 7], 8) for name in ("one", "two")}
    assert len(answers) == 2


def test_a_base_that_was_made_with_an_adapter_cannot_be_asked_alone(
    tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    paired = shutil.copytree(tiny, tmp_path / "paired")
    identity = read_identity(tiny)
    write_identity(paired, BaseIdentity(identity.digest, pair=of_bytes(b"factors")))
    server = make_server(ServeSettings(bases=(("paired", paired),), runtime=runtime))
    with pytest.raises(ServingError, match="no model 'paired'"):
        server.catalog.resolve("paired")


def test_a_server_of_nothing_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ServingError, match="nothing to serve"):
        make_server(ServeSettings(bases=(), runtime=runtime))


def test_two_models_of_one_name_are_refused(tiny: Path, runtime: Runtime) -> None:
    with pytest.raises(ServingError, match="already"):
        make_server(ServeSettings(bases=(("tiny", tiny), ("tiny", tiny)), runtime=runtime))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_no_token(host: str) -> None:
    check_exposure(host, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(ServingError, match="GRAFTLINE_SERVE_TOKENS"):
        check_exposure(host, ())
    check_exposure(host, ("secret",))
