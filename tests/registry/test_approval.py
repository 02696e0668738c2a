import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftline.digest import of_bytes
from graftline.errors import PromotionError, ReleaseError
from graftline.registry.approval import ApprovalTarget, SignedApproval, approve, collect, why_not
from graftline.registry.store import Store
from tests.registry.people import NOW, People, forged

TARGET = ApprovalTarget("demo", "production", "v1", of_bytes(b"v1"))


@pytest.fixture
def people(tmp_path: Path) -> People:
    return People(tmp_path)


def reason(people: People, approval: SignedApproval, target: ApprovalTarget = TARGET, **other: Any) -> str | None:
    values = {"valid": timedelta(hours=24), "used": set(), "now": NOW, **other}
    return why_not(approval, target, keys=people.keys, **values)


def test_an_approval_counts_for_what_it_names(people: People, store: Store) -> None:
    approval = people.approve(store, TARGET, "eve")
    assert reason(people, approval) is None
    assert collect(store, TARGET) == (approval,)
    assert SignedApproval.parse(approval.to_bytes()) == approval


def test_approvals_of_several_people_are_collected(people: People, file_store: Store) -> None:
    made = {people.approve(file_store, TARGET, name).statement.approver for name in ("eve", "mia", "eve")}
    assert {approval.statement.approver for approval in collect(file_store, TARGET)} == made
    assert len(collect(file_store, TARGET)) == 3


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (ApprovalTarget("demo", "staging", "v1", TARGET.release), "is for demo/v1 .* in production"),
        (ApprovalTarget("other", "production", "v1", TARGET.release), "is for demo/v1"),
        (ApprovalTarget("demo", "production", "v2", TARGET.release), "is for demo/v1"),
        (ApprovalTarget("demo", "production", "v1", of_bytes(b"changed")), "is for demo/v1"),
    ],
)
def test_an_approval_counts_for_nothing_else(
    people: People, file_store: Store, target: ApprovalTarget, message: str
) -> None:
    approval = people.approve(file_store, TARGET, "eve")
    found = reason(people, approval, target)
    assert found
    assert re.search(message, found)


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline": "other"},
        {"channel": "staging"},
        {"version": "v2"},
        {"release": of_bytes(b"v2")},
        {"time": NOW},
        {"nonce": "00"},
        {"approver": "mia"},
    ],
)
def test_an_edited_statement_is_not_what_was_signed(
    people: People, file_store: Store, change: dict[str, object]
) -> None:
    edited = forged(people.approve(file_store, TARGET, "eve"), **change)
    statement = edited.statement
    target = ApprovalTarget(statement.pipeline, statement.channel, statement.version, statement.release)
    assert reason(people, edited, target) == f"approval of {statement.approver!r}: the signature is not from that key"


@pytest.mark.parametrize("signature", ["", "AAAA", "not base64!", "ä", "MEUCIQ=="])
def test_a_signature_that_is_none_does_not_count(people: People, file_store: Store, signature: str) -> None:
    approval = people.approve(file_store, TARGET, "eve").model_copy(update={"signature": signature})
    assert "not from that key" in str(reason(people, approval))


def test_an_approver_who_is_not_listed_does_not_count(people: People, file_store: Store) -> None:
    unknown = forged(people.approve(file_store, TARGET, "eve"), approver="mallory")
    assert reason(people, unknown) == "approval of 'mallory': no such key in the key file"


def test_a_key_that_is_not_listed_cannot_approve(people: People, file_store: Store) -> None:
    with pytest.raises(PromotionError, match="mallory is not in the key file"):
        people.approve(file_store, TARGET, "mallory")
    assert collect(file_store, TARGET) == ()


def test_an_expired_key_neither_approves_nor_counts(tmp_path: Path, file_store: Store) -> None:
    people = People(tmp_path, expires={"eve": NOW})
    approval = people.approve(file_store, TARGET, "eve", hours_ago=1)
    assert "the key expired" in str(reason(people, approval))
    with pytest.raises(PromotionError, match="of eve expired"):
        people.approve(file_store, TARGET, "eve", hours_ago=0)


def test_an_approval_is_good_for_a_time(people: People, file_store: Store) -> None:
    approval = people.approve(file_store, TARGET, "eve", hours_ago=24)
    assert reason(people, approval) is None
    assert "good for 24 hours" in str(reason(people, approval, now=NOW + timedelta(seconds=1)))


def test_an_approval_from_the_future_does_not_count(people: People, file_store: Store) -> None:
    assert (
        reason(people, people.approve(file_store, TARGET, "eve", hours_ago=-1 / 60)) is None
    )  # clocks differ a little
    assert "in the future" in str(reason(people, people.approve(file_store, TARGET, "eve", hours_ago=-1)))


def test_an_approval_that_was_used_does_not_count_again(people: People, file_store: Store) -> None:
    approval = people.approve(file_store, TARGET, "eve")
    assert "was used for an earlier entry" in str(reason(people, approval, used={approval.statement.digest}))


def test_rubbish_among_the_approvals_is_left_out(
    people: People, file_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    approval = people.approve(file_store, TARGET, "eve")
    for name, data in (("a.json", b"{}"), ("b.json", b"\xff"), ("c.json", approval.to_bytes()[:-5])):
        file_store.put_bytes(f"approvals/demo/production/v1/{name}", data)
    assert collect(file_store, TARGET) == (approval,)
    assert caplog.text.count("does not count") == 3


def test_a_key_that_cannot_be_read_is_refused(people: People, file_store: Store, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="cannot read the key"):
        approve(file_store, TARGET, keys=people.keys, private_key=tmp_path / "absent", now=NOW)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_parser_fail_in_another_way(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        SignedApproval.parse(data)
