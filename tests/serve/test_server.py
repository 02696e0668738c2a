"""A server is put together from settings, and not exposed without a token."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from graftline.data.rows import Message
from graftline.digest import of_bytes
from graftline.errors import BaseMismatchError, ServingError
from graftline.export.onnx_export import cached_graph
from graftline.export.onnx_session import GRAPH_FILE, Step
from graftline.merge.fold import merge_folder
from graftline.serve import smoke
from graftline.serve.served_base import Base, Runtime, best_device, check_device, default_precision
from graftline.serve.server import ServeSettings, check_exposure, make_server
from graftline.weights.identity import BaseIdentity, read_identity, write_identity
from tests.serve.conftest import greedy_tokens, library_model, make_adapter, make_quantized
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
    tokens = served.base.encode_chat([Message("user", "a plant", supervised=False)], served.template)
    assert served.base.tokenizer.decode(tokens) == "a plant"
    with pytest.raises(ServingError, match="one prompt"):
        served.base.encode_chat(
            [Message(role, "be brief", supervised=False) for role in ("system", "user")], served.template
        )


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


@pytest.fixture(scope="module", params=["loftq", "pissa"])
def paired(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 4-bit base that was made together with an adapter (LoftQ; PiSSA, which is QPiSSA there), and the adapter."""
    root = tmp_path_factory.mktemp(request.param)
    init = {"pissa": "qpissa"}.get(request.param, request.param)
    base = make_quantized(tiny, root / "base", init=init)
    return base, make_adapter(base, root / "adapter", method=request.param)


def test_bases_of_equal_weights_and_other_configurations_share_nothing(
    tiny: Path, adapters: dict[str, Path], runtime: Runtime, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8")) | {"rms_norm_eps": 0.5}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bases = [Base(folder, runtime) for folder in (tiny, other)]
    file, _ = bases[0].prepare_adapter(adapters["lora"])
    with pytest.raises(BaseMismatchError, match="was trained on the base"):
        bases[1].prepare_adapter(adapters["lora"])
    for given in (None, file):
        with bases[0].adapters.use(given) as one, bases[1].adapters.use(given) as another:
            assert one.key != another.key  # requests of equal keys share batches


def test_an_adapter_that_was_made_with_its_base_answers_as_the_library_does(
    paired: tuple[Path, Path], tiny: Path, runtime: Runtime
) -> None:
    base, adapter = paired
    catalog = make_server(
        ServeSettings(bases=(("tiny", tiny), ("own", base)), adapters=(("a", adapter),), runtime=runtime)
    ).catalog
    served = catalog.resolve("a")
    assert served.parent == "own"
    prompt, model = [5, 6, 7, 8, 9], library_model(base, adapter)
    assert list(smoke.greedy(served, prompt, 12)) == greedy_tokens(model, prompt, 12, frozenset())
    step = Step([prompt], [len(prompt)], every_position=True)
    found = served.base.new_runner(served.adapter).step(served.base.session.new_cache(1, 8), step)
    with torch.no_grad():
        np.testing.assert_allclose(found, model(torch.tensor([prompt])).logits.numpy(), atol=1e-4)


def test_an_adapter_that_was_made_with_its_base_is_refused_on_any_other(
    paired: tuple[Path, Path], tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    plain = make_quantized(tiny, tmp_path / "plain")
    for other in (tiny, plain):
        with pytest.raises(ServingError, match="serve its own base"):
            make_server(ServeSettings(bases=(("b", other),), adapters=(("a", paired[1]),), runtime=runtime))


def test_a_merged_model_answers_as_its_base_with_the_adapter(
    tiny: Path, adapters: dict[str, Path], runtime: Runtime, tmp_path: Path
) -> None:
    merge_folder(tiny, adapters["dora"], tmp_path / "merged", dtype=torch.float32)
    settings = ServeSettings(
        bases=(("tiny", tiny), ("merged", tmp_path / "merged")), adapters=(("dora", adapters["dora"]),), runtime=runtime
    )
    catalog = make_server(settings).catalog
    prompt = catalog.resolve("tiny").base.encode_chat(
        [Message("user", "Definition: a tall plant\nCategory:", supervised=False)], "tokenizer"
    )
    merged, unmerged, plain = (smoke.greedy(catalog.resolve(n), prompt, 16) for n in ("merged", "dora", "tiny"))
    assert merged == unmerged != plain
    # Merged adds no latency because nothing is added: but for the weights both graphs are the same to the byte.
    graphs = [cached_graph(folder, runtime.graphs) / GRAPH_FILE for folder in (tiny, tmp_path / "merged")]
    assert graphs[0].read_bytes() == graphs[1].read_bytes()


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


def test_the_gpu_is_used_where_torch_and_onnx_runtime_both_can(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("graftline.serve.served_base.onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr("graftline.serve.served_base.torch.cuda.is_available", lambda: True)
    assert best_device() == "cuda"
    check_device("cuda")
    providers.remove("CUDAExecutionProvider")
    assert best_device() == "cpu"
    check_device("cpu")
    with pytest.raises(ServingError, match="torch sees a GPU, ONNX Runtime has CPUExecutionProvider: install"):
        check_device("cuda")


def test_the_default_precision_is_one_that_the_device_computes() -> None:
    assert (default_precision("cuda"), default_precision("cpu")) == ("fp16", "fp32")
