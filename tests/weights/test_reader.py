import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.errors import CheckpointError
from graftline.weights.reader import INDEX_FILE, CheckpointReader, read_json_object


def make_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.arange(6)}
    folder.mkdir()
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name == 'a' else 2}-of-00002.safetensors" for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def edit_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    for name, shard in changes.items():
        index["weight_map"][name] = shard
        if shard is None:
            del index["weight_map"][name]
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_tensors_of_a_model_folder_equal_those_of_the_safetensors_library(tiny_llama: Path) -> None:
    reader, expected = CheckpointReader(tiny_llama), load_file(tiny_llama / "model.safetensors")
    assert reader.names() == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor)
        assert reader.info(name).shape == tuple(tensor.shape)
    assert reader.total_bytes == sum(t.nbytes for t in expected.values())
    assert reader.largest_bytes == max(t.nbytes for t in expected.values())


def test_shards_are_read_as_one_folder(tmp_path: Path) -> None:
    expected = make_shards(tmp_path / "m")
    reader = CheckpointReader(tmp_path / "m")
    assert reader.names() == ["a", "b", "c"]
    assert all(torch.equal(reader.read(name), expected[name]) for name in expected)
    assert "a" in reader
    assert "d" not in reader


def test_empty_and_scalar_tensors_keep_their_shape(tmp_path: Path) -> None:
    save_file({"none": torch.empty(0, 7), "one": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert reader.read("none").shape == (0, 7)
    assert reader.read("one").item() == 3.0


def test_unknown_name_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        CheckpointReader(tiny_llama).read("nope")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    make_shards(tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the shard model-00002-of-00002"):
        CheckpointReader(tmp_path / "m")


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "model.bin", "..", ""]
)
def test_shard_name_that_leaves_the_folder_or_is_no_safetensors_is_refused(tmp_path: Path, shard: str) -> None:
    make_shards(tmp_path / "m")
    edit_index(tmp_path / "m", a=shard)
    with pytest.raises(CheckpointError, match=r"name of a \.safetensors file beside it"):
        CheckpointReader(tmp_path / "m")


def test_what_the_index_names_and_no_shard_holds_is_kept_as_absent(tmp_path: Path) -> None:
    make_shards(tmp_path / "m")
    edit_index(tmp_path / "m", ghost="model-00001-of-00002.safetensors", b=None)
    reader = CheckpointReader(tmp_path / "m")
    assert reader.absent == {"ghost": "model-00001-of-00002.safetensors"}
    assert reader.names() == ["a", "b", "c"]


def test_of_a_tensor_in_two_shards_the_index_says_which_counts(tmp_path: Path) -> None:
    expected = make_shards(tmp_path / "m")
    save_file(
        {"a": torch.zeros(3, 4), "b": expected["b"], "c": expected["c"]},
        tmp_path / "m" / "model-00002-of-00002.safetensors",
    )
    assert torch.equal(CheckpointReader(tmp_path / "m").read("a"), expected["a"])
    edit_index(tmp_path / "m", a="model-00002-of-00002.safetensors", d="model-00001-of-00002.safetensors")
    assert torch.equal(CheckpointReader(tmp_path / "m").read("a"), torch.zeros(3, 4))
    edit_index(tmp_path / "m", a=None)
    with pytest.raises(CheckpointError, match=r"holds 'a' in model-00001-of-00002\.safetensors and in model-00002"):
        CheckpointReader(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    make_shards(tmp_path / "m")
    (tmp_path / "m" / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        CheckpointReader(tmp_path / "m")


def test_pickle_weights_are_refused_and_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match="pickle files can run code and are never loaded"):
        CheckpointReader(tmp_path)


def test_folder_without_weights_and_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has neither"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        CheckpointReader(tmp_path / "nowhere")


def test_file_cut_short_after_it_was_opened_is_noticed(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    reader = CheckpointReader(tmp_path / "m")
    last = max(reader.names(), key=lambda name: reader.info(name).offset)
    with (tmp_path / "m" / "model.safetensors").open("r+b") as stream:
        stream.truncate(reader.info(last).offset + 1)
    with pytest.raises(CheckpointError, match="was cut short while it was read"):
        reader.read(last)


def test_json_object_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text("3")
    with pytest.raises(CheckpointError, match="holds int"):
        read_json_object(file)
