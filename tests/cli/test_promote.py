"""A promotion from the command line: a tiny real model, a signed release, a policy, and a smoke run."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from graftline.adapters.peft_format import load_adapter
from graftline.data.preparation import EVALUATION, GENERAL, RESERVE
from graftline.data.rows import Message, Row, write_rows
from graftline.digest import of_bytes
from graftline.registry.channel import read
from graftline.registry.releases import publish
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict, Lineage, Manifest, describe, write_manifest
from graftline.release.signing import sign_folder
from graftline.serve import smoke
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from tests.cli.conftest import Run
from tests.registry.people import People
from tests.registry.test_webhooks import Receiver, receiver
from tests.serve.conftest import make_adapter
from tests.settings.documents import changed

__all__ = ["receiver"]

NOTHING = of_bytes(b"")


@pytest.fixture
def release(project: Path, store: Store, people: People, tiny_llama: Path) -> Manifest:
    """A release of a tiny adapter with recorded answers, signed by bob."""
    return make_release(project, store, people, tiny_llama, method="lora")


def make_release(
    project: Path, store: Store, people: People, tiny_llama: Path, *, method: str = "lora", reserve: int = 0
) -> Manifest:
    """As ``release``, with so many rows that only promotions look at."""
    package = project / "package"
    if reserve:
        made = [
            Row((Message("user", f"{n} paws?", False), Message("assistant", ("cat", "dog")[n % 2], True)), n)
            for n in range(reserve)
        ]
        write_rows(package / RESERVE / EVALUATION, made)
        (package / RESERVE / GENERAL).touch()
    adapter = make_adapter(tiny_llama, package / "adapter", method=method)
    model = load_model(tiny_llama)
    load_adapter(model, adapter, base=read_identity(tiny_llama))
    smoke.record(model, [[5, 6, 7], [20, 21]], package / smoke.SMOKE_FILE)
    lineage = Lineage(
        base_digest=read_identity(tiny_llama).digest,
        source_digest=None,
        quantizer_digest=None,
        data_digest=NOTHING,
        template_digest=NOTHING,
        config_digest=NOTHING,
        dvc_lock_digest=None,
        code_revision="test",
        trust_remote_code=False,
    )
    verdict = GateVerdict(outcome="pass", against="base", digest=NOTHING)
    created = datetime(2026, 11, 24, 6, 18, tzinfo=UTC)
    write_manifest(package, describe(package, pipeline="demo", created=created, lineage=lineage, verdict=verdict))
    sign_folder(package, people.private_key("bob"))
    return publish(store, package)


def test_a_release_that_meets_the_policy_enters_the_channel(
    project: Path, run: Run, store: Store, release: Manifest, tiny_llama: Path
) -> None:
    made = project / "runs" / "demo" / "init" / "base"
    made.parent.mkdir(parents=True)
    made.symlink_to(tiny_llama)

    ended = run("promote", "demo", release.version, "--reason", "nightly", "--as", "ada")

    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0] == f"production of demo holds {release.version} (entry 1)"
    assert "  smoke: matched" in ended.out.splitlines()
    (entry,) = read(store, "demo", "production").entries
    assert (entry.change.actor, entry.change.reason) == ("ada", "nightly")
    assert run("promote", "demo", release.version, "--reason", "again").code == 0
    assert len(read(store, "demo", "production").entries) == 1


def test_the_rows_that_only_promotions_look_at_are_scored_and_each_look_is_counted(
    project: Path, run: Run, store: Store, people: People, tiny_llama: Path
) -> None:
    made = project / "runs" / "demo" / "init" / "base"
    made.parent.mkdir(parents=True)
    made.symlink_to(tiny_llama)
    guards = {"stops": False, "likelihood": False}  # the adapter is random
    asked = {"demo.data.reserve_rows": 100, "demo.guards": guards, "channels.production.reserve": True}
    asked |= {"demo.base.template": "tokenizer", "demo.train.threads": 1}
    release = make_release(project, store, people, tiny_llama, reserve=100)
    promotes = ("promote", "demo", release.version, "--reason", "nightly")

    (project / "pipelines.yaml").write_bytes(changed(**asked, **{"demo.gates.better.test": "superiority"}))
    worse = run(*promotes)
    assert worse.code == 2, worse.err
    assert "reserve: 'fail' in look 1 at " in worse.err or "reserve: 'inconclusive' in look 1 at " in worse.err
    assert "100 rows; better: " in worse.err
    assert read(store, "demo", "production").entries == ()

    (project / "pipelines.yaml").write_bytes(changed(**asked, **{"demo.gates.better.margin": 1.0}))
    ended = run(*promotes)
    assert ended.code == 0, ended.err
    (entry,) = read(store, "demo", "production").entries
    found = entry.change.reserve
    assert found is not None
    assert (found.outcome, found.look, found.against, found.release) == ("pass", 2, "base", None)
    assert found.evidence.startswith("100 rows; better: pass, accuracy ")
    assert "reserve: 'pass' in look 2 at " in run("history", "demo").out


def test_a_policy_that_is_not_met_is_told_before_anything_is_loaded(
    project: Path, run: Run, store: Store, release: Manifest
) -> None:
    (project / "pipelines.yaml").write_bytes(changed(**{"channels.production.approvals": {"count": 2}}))

    ended = run("promote", "demo", release.version, "--reason", "nightly")

    assert ended.code == 2
    assert "approvals" in ended.err
    assert read(store, "demo", "production").entries == ()


def test_a_base_that_is_not_here_is_named_by_its_digest(run: Run, release: Manifest) -> None:
    ended = run("promote", "demo", release.version, "--reason", "nightly")

    assert ended.code == 2
    assert f"the promotion needs the base {release.lineage.base_digest}, not found in " in ended.err


def test_a_channel_that_does_not_exist_is_refused(run: Run, release: Manifest) -> None:
    ended = run("promote", "demo", release.version, "--reason", "nightly", "--channel", "canary")

    assert ended.code == 2
    assert "channel 'canary' is not in pipelines.yaml; expected one of staging, production" in ended.err


def test_a_receiver_that_refuses_leaves_the_promotion_as_it_is_and_is_told_by_the_next_command(
    project: Path, run: Run, store: Store, release: Manifest, tiny_llama: Path, receiver: Receiver
) -> None:
    (project / "pipelines.yaml").write_bytes(
        changed(**{"channels.production.webhooks": [{"url": receiver.url}], "channels.staging": {}})
    )
    receiver.statuses = [400, 400]
    with_base = ("--base", str(tiny_llama))

    promoted = run("promote", "demo", release.version, "--reason", "nightly", *with_base)
    failed = run("tell", "demo", "--channel", "production")
    told = run("tell")

    assert promoted.code == 0, promoted.err
    assert f"production of demo holds {release.version} (entry 1)" in promoted.out
    assert f"warning: {receiver.url.partition('?')[0]} answered 400 to entry 1 of production" in promoted.err
    assert (failed.code, told.code) == (1, 0)
    assert "was told of entry 1 of production" in told.out
    assert receiver.types == ["release.promoted"] * 3
    assert len(set(receiver.ids)) == 1
    assert run("tell").out == ""


def test_a_channel_without_webhooks_tells_nobody_and_says_so(project: Path, run: Run) -> None:
    ended = run("tell", "demo")
    assert (ended.code, ended.out) == (0, "no webhooks: staging, production of pipelines.yaml have none\n")
    assert "did you mean 'production'" in run("tell", "demo", "--channel", "prodution").err
    assert "did you mean demo" in run("tell", "dem").err


def test_an_adapter_that_vllm_cannot_load_does_not_enter_a_channel_that_vllm_serves(
    project: Path, run: Run, store: Store, people: People, tiny_llama: Path
) -> None:
    release = make_release(project, store, people, tiny_llama, method="dora")
    promote = ("promote", "demo", release.version, "--reason", "r", "--as", "ada", "--base", str(tiny_llama))
    (project / "pipelines.yaml").write_bytes(changed(**{"channels.production.served_by": "vllm"}))

    refused = run(*promote)

    assert (refused.code, "Traceback" in refused.err) == (2, False)
    assert "channels.production.served_by is vllm, which cannot load this dora adapter: vLLM has no DoRA" in refused.err
    assert "vLLM can serve a merged model: release with package.merged: true" in refused.err
    assert read(store, "demo", "production").entries == ()
    (project / "pipelines.yaml").write_bytes(changed())
    assert run(*promote).code == 0
