"""Checkpoints copied while a training runs: another checkout goes on from there, to the bytes of one never stopped."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftline.errors import StoreError, StoreUnavailableError
from graftline.registry.store import open_store
from graftline.train.checkpoint import checkpoints_in, save_trainable
from graftline.train.results import StepMetrics
from graftline.train.trainer import train
from graftline.workflow import kept_checkpoints
from graftline.workflow.kept_checkpoints import kept_copies
from tests.ports import free_port
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, moto_server
from tests.sections import train_section
from tests.train.rows import lora_model, make_rows

NAME = "pets/train-0123"


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_checkpoints, "_LOOK_SECONDS", 0.01)


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "kept")
        return
    with moto_server() as endpoint:
        for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}).items():
            monkeypatch.setenv(name, value)
        make_bucket(endpoint)
        yield f"s3://{BUCKET}/kept"


class StoppedError(Exception):
    """A machine that is gone."""


def train_six_steps(base: Path, work: Path, *, stopped_at: int = 0) -> bytes:
    """The adapter's bytes after six steps; with ``stopped_at`` the training breaks after that step."""

    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == stopped_at:
            raise StoppedError

    model = lora_model(base)
    settings = train_section(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2, device="cpu", threads=1)
    train(model, make_rows(40), settings=settings, work=work, on_step=on_step)
    out = work.with_name(f"{work.name}-trained")
    out.mkdir()
    save_trainable(model, out)
    return (out / "adapter.safetensors").read_bytes()


def test_a_training_goes_on_in_another_checkout(address: str, tiny_llama: Path, tmp_path: Path) -> None:
    expected = train_six_steps(tiny_llama, tmp_path / "alone")
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(StoppedError), kept_copies(first, address, name=NAME):
        train_six_steps(tiny_llama, first, stopped_at=5)
    store = open_store(address)
    assert {key.split("/")[2] for key in store.list(NAME)} >= {"checkpoint-4"}

    with kept_copies(second, address, name=NAME):
        assert [folder.name for folder in checkpoints_in(second)] == ["checkpoint-4"]
        assert train_six_steps(tiny_llama, second) == expected
    assert store.list(NAME) == []


def test_a_copy_that_is_not_whole_is_passed_over(address: str, tiny_llama: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(StoppedError), kept_copies(first, address, name=NAME):
        train_six_steps(tiny_llama, first, stopped_at=5)
    open_store(address).put_bytes(f"{NAME}/checkpoint-6/state.pt", b"half")
    with kept_copies(second, address, name=NAME):
        assert [folder.name for folder in checkpoints_in(second)] == ["checkpoint-4"]


def test_what_is_here_and_newer_stays(address: str, tiny_llama: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(StoppedError), kept_copies(work, address, name=NAME):
        train_six_steps(tiny_llama, work, stopped_at=3)
    with pytest.raises(StoppedError):
        train_six_steps(tiny_llama, work, stopped_at=5)
    with kept_copies(work, address, name=NAME):
        assert [folder.name for folder in checkpoints_in(work)] == ["checkpoint-2", "checkpoint-4"]


def test_a_place_that_cannot_be_read_ends_the_stage_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnavailableError), kept_copies(tmp_path, f"s3://{BUCKET}/kept", name=NAME):
        pytest.fail("it trains")
    with pytest.raises(StoreError, match="is unknown"), kept_copies(tmp_path, "gs://bucket", name=NAME):
        pytest.fail("it trains")


def test_a_place_that_cannot_be_written_does_not_stop_a_training(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), kept_copies(tmp_path / "work", str(tmp_path / "kept"), name=NAME):
        (tmp_path / "kept").write_text("a file where a folder must be")
        train_six_steps(tiny_llama, tmp_path / "work")
    assert "was not copied, which is tried again" in caplog.text


def test_without_a_place_nothing_is_copied(tmp_path: Path) -> None:
    with kept_copies(tmp_path / "work", None, name=NAME):
        pass
    assert list(tmp_path.iterdir()) == []


def test_copies_of_another_training_stay(tiny_llama: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "kept"))
    store.put_bytes("pets/train-01234/checkpoint-2/graftline.json", b"{}")
    with kept_copies(tmp_path / "work", str(tmp_path / "kept"), name=NAME):
        train_six_steps(tiny_llama, tmp_path / "work")
    assert store.list("pets") == ["pets/train-01234/checkpoint-2/graftline.json"]
