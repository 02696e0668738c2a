from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from graftline.errors import PromotionError, ReleaseError
from graftline.registry.keys import KeyFile, KeyRing
from graftline.registry.store import open_store
from graftline.release.signing import sign_folder
from tests.registry.people import NOW, People
from tests.release.packages import make_package


@pytest.fixture
def people(tmp_path: Path) -> People:
    return People(tmp_path)


def test_a_key_file_gives_keys_by_name(people: People, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(people.text)
    ring = KeyRing.load(tmp_path / "keys.yaml")
    assert list(ring.keys) == ["bob", "ada", "eve", "mia", "pia", "rob"]
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


def test_a_key_without_a_person_is_its_own(people: People) -> None:
    assert [people.keys.person(name) for name in ("bob", "ada", "nobody")] == ["bob", "ada", "nobody"]


@pytest.mark.parametrize(("given", "person"), [("Ada  Lovelace ", "ada lovelace"), ("ＡDA", "ada"), ("ada", "ada")])
def test_a_person_s_name_has_one_spelling(given: str, person: str) -> None:
    ring = KeyRing.parse(f"keys:\n{entry(PEM, more=f'  person: {given}{chr(10)}')}", origin="keys.yaml")
    assert ring.person("x") == person


@pytest.mark.parametrize("given", ["''", "'  '", '"a\\nb"', '"a\\u202eb"', "7", "[a]", "x" * 101])
def test_a_person_that_is_no_name_is_refused(given: str) -> None:
    with pytest.raises(PromotionError, match=r"keys\.0\.person"):
        KeyRing.parse(f"keys:\n{entry(PEM, more=f'  person: {given}{chr(10)}')}", origin="keys.yaml")


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()])
def test_a_key_that_no_key_file_takes_signs_nothing(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    pem = ec.generate_private_key(curve).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key").write_bytes(pem)
    make_package(tmp_path / "package")
    with pytest.raises(ReleaseError, match=rf"another kind \(ECDSA over {curve.name}\); expected ECDSA over P-256"):
        sign_folder(tmp_path / "package", tmp_path / "key")
    assert not (tmp_path / "package" / "model.sig").exists()


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_a_key_file_that_is_no_file_is_not_taken_for_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "keys.yaml"
    file = KeyFile(path, may_be_absent=True)
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(PromotionError, match="cannot read the key file"):
        KeyFile(path, may_be_absent=True)
    assert file.is_unsigned
    file.refresh()
    assert not file.is_unsigned
    with pytest.raises(PromotionError, match="cannot read the key file"):
        _ = file.ring


def test_nothing_is_checked_where_that_alone_is_said_and_an_empty_file_is_refused() -> None:
    assert KeyRing.parse("unsigned: true\n", origin="keys.yaml").unsigned
    for text in ("accepted: []\n", "unsigned: false\n", "{}\n"):
        with pytest.raises(PromotionError, match=r"keys\.yaml: .*keys is missing; .*`unsigned: true`"):
            KeyRing.parse(text, origin="keys.yaml")
