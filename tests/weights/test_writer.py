import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftline.digest import Digest, of_bytes
from graftline.errors import CheckpointError
from graftline.weights.identity import base_digest, read_identity
from graftline.weights.reader import INDEX_FILE, CheckpointReader
from graftline.weights.writer import CheckpointWriter

TENSORS = {
    "a": torch.randn(10, 10),
    "b": torch.randn(7).bfloat16(),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "strided": torch.randn(4, 6).T,
    "bytes": torch.arange(255, dtype=torch.uint8),
}
JOB = of_bytes(b"this job")


def write(folder: Path, **options: object) -> Digest:
    with CheckpointWriter(folder, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        return writer.finish()


def write_some(folder: Path, count: int, *, job: Digest | None = JOB, max_shard_bytes: int = 300) -> None:
    """As a process that was killed after ``count`` tensors leaves it."""
    with CheckpointWriter(folder, job=job, max_shard_bytes=max_shard_bytes) as writer:
        for name in [n for n in TENSORS if n not in writer][:count]:
            writer.add(name, TENSORS[name])


def assert_equal_to_source(folder: Path) -> None:
    reader = CheckpointReader(folder)
    assert set(reader.names()) == set(TENSORS)
    assert all(torch.equal(reader.read(name), TENSORS[name]) for name in TENSORS)


def test_written_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    write(tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_shards_and_index_are_written_and_read_back(tmp_path: Path) -> None:
    write(tmp_path / "m", max_shard_bytes=300)
    index = json.loads((tmp_path / "m" / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert_equal_to_source(tmp_path / "m")


def test_digest_does_not_depend_on_shards_or_order(tmp_path: Path) -> None:
    one, many = write(tmp_path / "one"), write(tmp_path / "many", max_shard_bytes=64)
    with CheckpointWriter(tmp_path / "reversed") as writer:
        for name in reversed(TENSORS):
            writer.add(name, TENSORS[name])
        turned = writer.finish()
    assert one == many == turned == base_digest(tmp_path / "many")


def test_identity_is_recorded_with_source_quantizer_and_pair(tmp_path: Path) -> None:
    source, pair = of_bytes(b"source"), of_bytes(b"pair")
    with CheckpointWriter(tmp_path / "m") as writer:
        writer.add("a", TENSORS["a"])
        digest = writer.finish(source_digest=source, quantizer={"code": "nf4"}, pair=pair)
    identity = read_identity(tmp_path / "m")
    assert (identity.digest, identity.source_digest, identity.pair) == (digest, source, pair)
    assert identity.quantizer == {"code": "nf4"}


def test_nothing_appears_before_finish_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m") as writer:
        writer.add("a", TENSORS["a"])
        (writer.stage / "config.json").write_text("{}")
        assert not (tmp_path / "m").exists()
        writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "graftline-base.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("count", range(len(TENSORS) + 1))
def test_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, count: int) -> None:
    expected = write(tmp_path / "whole", max_shard_bytes=300)
    write_some(tmp_path / "m", count)
    with CheckpointWriter(tmp_path / "m", job=JOB, max_shard_bytes=300) as writer:
        assert len(writer.names()) == count
    write_some(tmp_path / "m", len(TENSORS))
    with CheckpointWriter(tmp_path / "m", job=JOB, max_shard_bytes=300) as writer:
        assert writer.finish() == expected
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "m" / file.name).read_bytes() == file.read_bytes()


def test_half_written_tensor_and_half_journal_line_are_written_again(tmp_path: Path) -> None:
    write_some(tmp_path / "m", 3)
    stage = tmp_path / ".m.part"
    with (stage / "journal.jsonl").open("a") as journal:
        journal.write('{"name": "scal')
    shard = max(stage.glob("shard-*"))
    shard.write_bytes(shard.read_bytes() + b"half a tensor")
    write_some(tmp_path / "m", len(TENSORS))
    with CheckpointWriter(tmp_path / "m", job=JOB, max_shard_bytes=300) as writer:
        writer.finish()
    assert_equal_to_source(tmp_path / "m")


def test_damaged_bytes_of_an_interrupted_run_are_written_again(tmp_path: Path) -> None:
    write_some(tmp_path / "m", 2, max_shard_bytes=10**6)
    shard = tmp_path / ".m.part" / "shard-00000.part"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # the last byte of the second tensor
    shard.write_bytes(data)
    with CheckpointWriter(tmp_path / "m", job=JOB) as writer:
        assert writer.names() == ["a"]


def test_what_another_job_left_is_not_used(tmp_path: Path) -> None:
    write_some(tmp_path / "m", 3)
    with CheckpointWriter(tmp_path / "m", job=of_bytes(b"another")) as writer:
        assert writer.names() == []
    write_some(tmp_path / "n", 3, job=None)
    with CheckpointWriter(tmp_path / "n") as writer:
        assert writer.names() == []


def test_run_that_ended_inside_finish_is_done_again(tmp_path: Path) -> None:
    write_some(tmp_path / "m", len(TENSORS), max_shard_bytes=10**6)
    stage = tmp_path / ".m.part"
    (stage / "shard-00000.part").rename(stage / "model.safetensors")
    write_some(tmp_path / "m", len(TENSORS), max_shard_bytes=10**6)
    with CheckpointWriter(tmp_path / "m", job=JOB) as writer:
        writer.finish()
    assert_equal_to_source(tmp_path / "m")


def test_a_shard_whose_header_is_full_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.weights.writer._HEADER_BYTES", 400)
    monkeypatch.setattr("graftline.weights.writer._DATA_START", 408)
    write(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) == 2
    assert_equal_to_source(tmp_path / "m")


def test_a_name_twice_and_an_unknown_dtype_are_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m") as writer:
        writer.add("a", TENSORS["a"])
        with pytest.raises(CheckpointError, match="twice"):
            writer.add("a", TENSORS["a"])
        with pytest.raises(CheckpointError, match="complex64"):
            writer.add("z", torch.zeros(2, dtype=torch.complex64))


def test_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "m")
    with pytest.raises(CheckpointError, match="exists already"):
        CheckpointWriter(tmp_path / "m")
    assert_equal_to_source(tmp_path / "m")


def test_full_disk_is_an_error_that_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with CheckpointWriter(tmp_path / "m") as writer:
        monkeypatch.setattr("graftline.weights.writer.Shard.append", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*\.m\.part: No space left on device"):
            writer.add("a", TENSORS["a"])
    assert not (tmp_path / "m").exists()
