"""Where a session computes, and in which order it uses memory that torch uses too."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from graftline.errors import ExportError
from graftline.export.onnx_export import export_graph
from graftline.export.onnx_session import GraphSession, KvCache, Step, check_placement, provider_settings
from tests.tiny import make_tiny_llama


def test_onnx_runtime_is_given_torchs_stream() -> None:
    assert provider_settings("cuda", 140_234) == ("CUDAExecutionProvider", {"user_compute_stream": "140234"})
    assert provider_settings("cpu", None) == ("CPUExecutionProvider", {})


@pytest.mark.parametrize("stream", [None, 0])
def test_cuda_without_a_stream_to_share_is_a_mistake(stream: int | None) -> None:
    with pytest.raises(ExportError, match="a CUDA session needs a stream of its own"):
        provider_settings("cuda", stream)


def test_every_use_of_a_cache_is_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    @contextlib.contextmanager
    def recorded(stream: Any) -> Iterator[None]:
        entered.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "stream", recorded)
    stream: Any = SimpleNamespace()
    caches = [KvCache((torch.zeros(3, 1, 4, 2), torch.ones(3, 1, 4, 2)), stream) for _ in range(2)]
    caches[0].copy_row(0, 1, 2)
    caches[0].take_row(2, caches[1], 3)
    caches[0].rows(0, 2).copy_row(0, 1, 1)
    assert entered == [stream] * 3


@pytest.fixture(scope="module")
def session(graph: Path) -> GraphSession:
    return GraphSession(graph)


def test_a_cuda_session_with_attention_on_the_cpu_is_refused_and_the_node_named(session: GraphSession) -> None:
    """A session on this CPU is what a CUDA session without a kernel for anything would be."""
    placed = session.placement()
    attention = next(name for _, operator, name in placed if operator == "GroupQueryAttention")
    with pytest.raises(ExportError, match=f"{attention} .GroupQueryAttention. by its CPUExecutionProvider"):
        check_placement(placed, precision="fp32")


def moved(placed: list[tuple[str, str, str]], *stay: str) -> list[tuple[str, str, str]]:
    """The same nodes on the GPU, but for some operators."""
    return [
        (where if operator in stay else "CUDAExecutionProvider", operator, name) for where, operator, name in placed
    ]


@pytest.mark.parametrize("operator", ["MatMul", "SkipSimplifiedLayerNormalization", "Gather", "GroupQueryAttention"])
def test_any_node_that_matters_counts(operator: str, session: GraphSession) -> None:
    with pytest.raises(ExportError, match=f".{operator}. by its CPUExecutionProvider.*--precision fp16"):
        check_placement(moved(session.placement(), operator), precision="fp32")


def test_shapes_and_switches_may_be_computed_on_the_cpu(session: GraphSession) -> None:
    placed = session.placement()
    assert {"Shape", "Concat", "Greater"} <= {operator for _, operator, _ in placed}
    check_placement(moved(placed, "Shape", "Concat", "Greater"), precision="fp16")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="two streams need CUDA and onnxruntime-gpu",
)
def test_caches_that_grow_shrink_and_are_freed_on_a_gpu_give_the_logits_of_untouched_ones(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    export_graph(base, tmp_path / "graph", precision="fp16")
    session = GraphSession(tmp_path / "graph", device="cuda")
    runner = session.runner()
    tokens = np.random.default_rng(0).integers(4, 500, (4, 24)).tolist()

    def alone(row: int) -> np.ndarray:
        cache = session.new_cache(1, 64)
        return runner.step(cache, Step([tokens[row]], [24]))[0]

    expected = [alone(row) for row in range(4)]
    for _ in range(50):
        cache = session.new_cache(4, 64)
        runner.step(cache, Step([row[:23] for row in tokens], [23] * 4))
        grown = session.new_cache(8, 64)
        for row in range(4):
            grown.take_row(row, cache, 23)
        del cache
        grown.copy_row(3, 0, 23)
        session.new_cache(8, 64).copy_row(0, 1, 64)  # takes the memory that was freed
        view = grown.rows(0, 3)
        found = runner.step(view, Step([tokens[row][23:] for row in (3, 1, 2)], [24] * 3))
        for logits, row in zip(found, (3, 1, 2), strict=True):
            np.testing.assert_allclose(logits, expected[row], atol=0.05)
