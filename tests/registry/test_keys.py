from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from graftline.errors import PromotionError, ReleaseError
from graftline.registry.keys import KeyRing
from graftline.registry.store import open_store
from tests.registry.people import NOW, People


@pytest.fixture
def people(tmp_path: Path) -> People:
    return People(tmp_path)


def test_a_key_file_gives_keys_by_name(people: People, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(people.text)
    ring = KeyRing.load(tmp_path / "keys.yaml")
    assert list(ring.keys) == ["bob", "ada", "eve", "mia"]
    assert ring.keys["ada"].roles == ("builder", "maintainer")


def test_the_builder_of_a_release_is_named(people: People, tmp_path: Path) -> None:
    people.release(open_store(str(tmp_path / "store")), tmp_path / "package", builder="ada")
    assert people.keys.verify_release(tmp_path / "package", now=NOW) == "ada"


@pytest.mark.parametrize(
    ("builder", "message"),
    [("eve", "none whose key has the role 'builder'"), ("mallory", "none whose key"), (None, r"has no model\.sig")],
)
def test_a_release_that_no_builder_signed_is_refused(
    people: People, tmp_path: Path, builder: str | None, message: str
) -> None:
    people.release(open_store(str(tmp_path / "store")), tmp_path / "package", builder=builder)
    with pytest.raises(ReleaseError, match=message):
        people.keys.verify_release(tmp_path / "package", now=NOW)


def test_an_expired_builder_does_not_count(tmp_path: Path) -> None:
    people = People(tmp_path, expires={"bob": NOW})
    people.release(open_store(str(tmp_path / "store")), tmp_path / "package", builder="bob")
    people.keys.verify_release(tmp_path / "package", now=NOW - timedelta(seconds=1))
    with pytest.raises(ReleaseError, match=r"role 'builder' now \(ada\)"):
        people.keys.verify_release(tmp_path / "package", now=NOW)


def pem_of(key: object) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()  # type: ignore[attr-defined]


def entry(pem: str, *, name: str = "x", more: str = "") -> str:
    indented = "".join(f"    {line}\n" for line in pem.splitlines())
    return f"- name: {name}\n  roles: [builder]\n{more}  public_key: |\n{indented}"


PEM = pem_of(ec.generate_private_key(ec.SECP256R1()))
GOOD = entry(PEM)
DATE, SOON = "  expires: 2027-01-01\n", "  expires: soon\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "document"),
        ("keys: 7", "keys"),
        ("keys: [", "is no key file"),
        ("keys:\n- name: x", "keys.0.roles"),
        (f"keys:\n{GOOD}users: []\n", "users"),
        (f"keys:\n{GOOD}{GOOD}", "listed twice"),
        (f"keys:\n{GOOD}{GOOD.replace('name: x', 'name: y')}", "listed twice"),
        (f"keys:\n{GOOD.replace('name: x', 'name: X Y')}", "keys.0.name"),
        (f"keys:\n{GOOD.replace('name: x', 'name: ../x')}", "keys.0.name"),
        (f"keys:\n{GOOD.replace('[builder]', 'builder')}", "keys.0.roles"),
        (f"keys:\n{entry(PEM, more=DATE)}", "keys.0.expires"),
        (f"keys:\n{entry(PEM, more=SOON)}", "keys.0.expires"),
        (f"keys:\n{GOOD.replace('MFkw', 'AAAA')}", "not a public key"),
        (f"keys:\n{entry(pem_of(ec.generate_private_key(ec.SECP384R1())))}", "P-256"),
        (f"keys:\n{entry(pem_of(ed25519.Ed25519PrivateKey.generate()))}", "P-256"),
        (f"keys:\n{GOOD.replace('BEGIN PUBLIC', 'BEGIN PRIVATE').replace('END PUBLIC', 'END PRIVATE')}", "PRIVATE key"),
        ("keys: !!python/object/apply:os.system [true]", "keys"),
        ("a: &a [x]\nkeys: *b", "is no key file"),
        ("keys: {? [1]: 2}", "keys"),
        ("x" * (1 << 21), "longer than"),
    ],
)  # fmt: skip
def test_a_key_file_that_is_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(PromotionError, match=message):
        KeyRing.parse(text, origin="keys.yaml")


def test_a_missing_or_binary_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromotionError, match=r"cannot read the key file .*absent\.yaml"):
        KeyRing.load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromotionError, match=r"cannot read the key file .*binary\.yaml"):
        KeyRing.load(tmp_path / "binary.yaml")


@given(st.text(max_size=100))
def test_no_text_makes_the_parser_fail_in_another_way(text: str) -> None:
    with pytest.raises(PromotionError):
        KeyRing.parse(text, origin="keys.yaml")
