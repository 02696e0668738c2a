"""A promotion from the command line: a tiny real model, a signed release, a policy, and a smoke run."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from graftline.adapters.peft_format import load_adapter
from graftline.digest import of_bytes
from graftline.registry.channel import read
from graftline.registry.releases import publish
from graftline.registry.store import Store, open_store
from graftline.release.manifest import GateVerdict, Lineage, Manifest, describe, write_manifest
from graftline.release.signing import sign_folder
from graftline.serve import smoke
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from tests.cli.conftest import Run
from tests.registry.people import People
from tests.serve.conftest import make_adapter
from tests.settings.documents import changed

NOTHING = of_bytes(b"")


@pytest.fixture
def store(project: Path) -> Store:
    return open_store(str(project / "store"))


@pytest.fixture
def people(project: Path) -> People:
    made = People(project)
    (project / "keys.yaml").write_text(made.text)
    return made


@pytest.fixture
def release(project: Path, store: Store, people: People, tiny_llama: Path) -> Manifest:
    """A release of a tiny adapter with recorded answers, signed by bob."""
    package = project / "package"
    adapter = make_adapter(tiny_llama, package / "adapter")
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
    assert f"the smoke run needs the base {release.lineage.base_digest}, not found in " in ended.err


def test_a_channel_that_does_not_exist_is_refused(run: Run, release: Manifest) -> None:
    ended = run("promote", "demo", release.version, "--reason", "nightly", "--channel", "canary")

    assert ended.code == 2
    assert "channel 'canary' is not in pipelines.yaml; expected one of staging, production" in ended.err
