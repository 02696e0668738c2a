import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftline.digest import of_bytes
from graftline.errors import BaseMismatchError, CheckpointError
from graftline.weights.identity import (
    IDENTITY_FILE,
    BaseIdentity,
    base_digest,
    check_pair,
    read_identity,
    verify_identity,
    write_identity,
)

A, B = of_bytes(b"a"), of_bytes(b"b")


def test_digest_is_the_documented_formula(tmp_path: Path) -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    line = ["w", "F32", [1, 2], hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]
    text = json.dumps([line], separators=(",", ":"))
    assert base_digest(tmp_path).hex == hashlib.sha256(text.encode()).hexdigest()


def test_digest_changes_with_name_dtype_shape_and_bytes(tmp_path: Path) -> None:
    variants = [
        {"w": torch.zeros(4)},
        {"v": torch.zeros(4)},
        {"w": torch.zeros(2, 2)},
        {"w": torch.zeros(4, dtype=torch.int32)},
        {"w": torch.ones(4)},
    ]
    digests = set()
    for index, tensors in enumerate(variants):
        (tmp_path / str(index)).mkdir()
        save_file(tensors, tmp_path / str(index) / "model.safetensors")
        digests.add(base_digest(tmp_path / str(index)))
    assert len(digests) == len(variants)


def test_identity_of_a_folder_without_record_is_computed(tiny_llama: Path) -> None:
    identity, weights = read_identity(tiny_llama), base_digest(tiny_llama)
    assert identity == BaseIdentity(identity.digest, weights=weights)
    assert identity.is_called(identity.digest)
    assert identity.is_called(weights)
    assert not identity.is_called(A)
    assert not identity.is_called(None)


def test_record_is_read_back_and_verified(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    found = read_identity(tmp_path / "m")
    identity = BaseIdentity(found.digest, A, {"code": "nf4"}, B, found.weights)
    write_identity(tmp_path / "m", identity)
    assert read_identity(tmp_path / "m") == identity == verify_identity(tmp_path / "m")


def test_changed_weight_does_not_verify_and_both_digests_are_named(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    recorded = base_digest(tmp_path / "m")
    write_identity(tmp_path / "m", BaseIdentity(recorded))
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BaseMismatchError) as caught:
        verify_identity(tmp_path / "m")
    assert str(recorded) in str(caught.value)
    assert str(base_digest(tmp_path / "m")) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"digest": None},
        {"digest": "sha256:12"},
        {"digest": 5},
        {"pair": "md5:00"},
        {"quantizer": "nf4"},
        {"extra": 1},
    ],
)
def test_damaged_record_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    write_identity(tmp_path, BaseIdentity(A))
    record = json.loads((tmp_path / IDENTITY_FILE).read_text()) | changes
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=IDENTITY_FILE):
        read_identity(tmp_path)


def test_pair_is_accepted_only_together() -> None:
    check_pair(BaseIdentity(A), None)
    check_pair(BaseIdentity(A), B)
    check_pair(BaseIdentity(A, pair=B), B)
    with pytest.raises(BaseMismatchError, match="no adapter"):
        check_pair(BaseIdentity(A, pair=B), None)
    with pytest.raises(BaseMismatchError, match=f"{B}.*{A}"):
        check_pair(BaseIdentity(A, pair=B), A)
