"""A promotion in the store is served; what does not verify is not, and the old one stays."""

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from graftline.adapters.peft_format import load_adapter
from graftline.checkpoint.identity import read_identity
from graftline.digest import Digest, of_bytes
from graftline.errors import PromotionError
from graftline.quant.load import load_model
from graftline.registry import channel as channels
from graftline.registry.channel import Change
from graftline.registry.file_store import FileStore
from graftline.registry.keys import KeyRing
from graftline.registry.leases import held_versions
from graftline.registry.releases import publish
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict, Lineage, describe, write_manifest
from graftline.release.signing import sign_folder
from graftline.serving import smoke
from graftline.serving.app import Server
from graftline.serving.base import Base, Runtime
from graftline.serving.catalog import Catalog
from graftline.serving.follower import Followed, Follower
from graftline.serving.scheduler import Scheduler
from tests.registry.people import People
from tests.serving.conftest import make_adapter, run
from tests.tiny import make_tiny_llama

PROMPTS = [[5, 6, 7, 8], [20, 21], list(range(30, 50))]


def make_release(
    store: Store,
    base: Path,
    work: Path,
    *,
    seed: int,
    answers_of: Path | None = None,
    has_answers: bool = True,
    private_key: Path | None = None,
) -> tuple[str, Digest]:
    """A release with an adapter and recorded answers (of another adapter if asked); returns version and digest."""
    package = work / f"package-{seed}"
    adapter = make_adapter(base, package / "adapter", seed=seed)
    if has_answers:
        model = load_model(base)
        load_adapter(model, answers_of or adapter, base=read_identity(base))
        smoke.record(model, PROMPTS, package / smoke.SMOKE_FILE)
    nothing = of_bytes(b"")
    manifest = describe(
        package,
        pipeline="demo",
        created=datetime(2026, 1, 1, 0, 0, seed, tzinfo=UTC),
        lineage=Lineage(
            base_digest=read_identity(base).digest,
            source_digest=None,
            quantizer_digest=None,
            data_digest=nothing,
            template_digest=nothing,
            config_digest=nothing,
            dvc_lock_digest=None,
            code_revision="test",
            trust_remote_code=False,
        ),
        verdict=GateVerdict(outcome="pass", against="base", digest=nothing),
    )
    write_manifest(package, manifest)
    if private_key:
        sign_folder(package, private_key)
    published = publish(store, package)
    return published.version, published.digest


def promote(store: Store, version: str, digest: Digest) -> None:
    log = channels.read(store, "demo", "production")
    change = Change(
        action="promote",
        version=version,
        release=digest,
        verdict=GateVerdict(outcome="pass", against="base", digest=of_bytes(b"")),
        actor="somebody",
        reason="a test",
        time=datetime(2026, 1, 2, tzinfo=UTC),
    )
    channels.append(store, channels.next_entry(log, change))


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def make_follower(
    store: FileStore, tiny: Path, runtime: Runtime, folder: Path, keys: KeyRing | None = None
) -> Follower:
    catalog = Catalog()
    catalog.add_base("tiny", Base(tiny, runtime))
    follower = Follower(
        store,
        (Followed("demo", "production"),),
        catalog,
        folder,
        keys=keys,
        smoke=smoke.check,
        poll_seconds=0.05,
    )
    follower.catalog = catalog  # type: ignore[attr-defined]
    return follower


@pytest.fixture
def follower(store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path) -> Follower:
    return make_follower(store, tiny, runtime, tmp_path / "fetched")


def served(follower: Follower) -> str | None:
    return follower.catalog.resolve("demo@production").release  # type: ignore[attr-defined]


def assert_refused(follower: Follower, reason: str) -> None:
    """The follower looks, serves no version and says why."""
    follower.look()
    state = follower.status()["demo@production"]
    assert state["version"] is None
    assert reason in state["error"]


def test_a_promotion_and_a_rollback_are_served_without_a_restart(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    first, second = (make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2))
    promote(store, *first)
    follower.start()
    assert served(follower) == f"demo@{first[0]}"
    for version, digest in (second, first):
        promote(store, version, digest)
        deadline = time.monotonic() + 10
        while served(follower) != f"demo@{version}":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    follower.stop()
    assert follower.status()["demo@production"]["error"] is None
    assert follower.status()["demo@production"]["entry"] == 3


def test_a_look_that_finds_nothing_new_costs_one_request_and_some_read_the_listing_again(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1))
    follower.look()
    asked: list[str] = []
    original_get, original_list = store.get, store.list
    monkeypatch.setattr(store, "get", lambda key: asked.append(key) or original_get(key))
    monkeypatch.setattr(store, "list", lambda prefix: asked.append(prefix) or original_list(prefix))
    follower.look()
    assert asked == ["channels/demo/production/0000000002.json"]
    for _ in range(20):
        follower.look()
    assert asked.count("channels/demo/production") == 1


def test_what_is_served_is_held_in_the_store(follower: Follower, store: FileStore, tiny: Path, tmp_path: Path) -> None:
    releases = [make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2, 3)]
    for release in releases:
        promote(store, *release)
        follower.look()
        assert set(held_versions(store, "demo", now=datetime.now(UTC))) == {release[0]}
    names = {model.name for model in follower.catalog.models()}  # type: ignore[attr-defined]
    assert names == {"tiny", "demo@production", f"demo@{releases[1][0]}", f"demo@{releases[2][0]}"}


def test_the_served_tokens_are_those_of_the_release(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1))
    follower.look()
    model = follower.catalog.resolve("demo@production")  # type: ignore[attr-defined]
    for sample in smoke.read(tmp_path / "package-1"):
        assert smoke.greedy(model, sample.prompt, len(sample.answer)) == sample.answer


def test_a_release_whose_answers_differ_is_not_served_and_the_reason_is_told(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    follower.look()
    other = make_adapter(tiny, tmp_path / "other", seed=9)
    promote(store, *make_release(store, tiny, tmp_path, seed=2, answers_of=other))
    follower.look()
    assert served(follower) == f"demo@{good[0]}"
    state = follower.status()["demo@production"]
    assert state["version"] == good[0]
    assert "recorded answer 0 differs at token" in state["error"]


def test_a_changed_byte_in_the_store_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    follower.look()
    version, digest = make_release(store, tiny, tmp_path, seed=2)
    file = next((tmp_path / "store").rglob(f"{version}/adapter/adapter_model.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(bytes(data))
    promote(store, version, digest)
    follower.look()
    assert served(follower) == f"demo@{good[0]}"
    assert follower.status()["demo@production"]["error"]


def test_a_release_of_another_base_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    other = make_tiny_llama(tmp_path / "other-base", seed=8, num_hidden_layers=1)
    promote(store, *make_release(store, other, tmp_path, seed=1))
    assert_refused(follower, "was trained on the base")


@pytest.mark.parametrize("signer", [None, "mallory"])
def test_a_release_without_a_signature_that_counts_is_not_served(
    signer: str | None, store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    people = People(tmp_path)
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", people.keys)
    good = make_release(store, tiny, tmp_path, seed=1, private_key=people.private_key("bob"))
    promote(store, *good)
    follower.look()
    assert served(follower) == f"demo@{good[0]}"
    private_key = people.private_key(signer) if signer else None
    promote(store, *make_release(store, tiny, tmp_path, seed=2, private_key=private_key))
    follower.look()
    assert served(follower) == f"demo@{good[0]}"
    assert "sign" in follower.status()["demo@production"]["error"]


def test_a_release_that_is_not_the_one_that_was_promoted_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    version, _ = make_release(store, tiny, tmp_path, seed=1)
    promote(store, version, of_bytes(b"what was judged"))
    assert_refused(follower, "it was changed after it was promoted")


def test_a_release_without_recorded_answers_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1, has_answers=False))
    assert_refused(follower, "no recorded answers")


def test_a_release_of_another_template_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    changed = make_tiny_llama(tmp_path / "changed", num_hidden_layers=1)  # the same weights
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    promote(store, *make_release(store, changed, tmp_path, seed=1))
    assert_refused(follower, "was trained with the template")


def test_clients_get_the_old_release_and_operators_the_reason_when_a_new_one_is_refused(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    body = {"model": "demo@production", "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 4}
    with run(Server(follower.catalog, Scheduler(), follower)) as url:  # type: ignore[attr-defined]
        before = httpx.post(f"{url}/v1/completions", json=body).json()
        assert before["system_fingerprint"] == f"demo@{good[0]}"
        other = make_adapter(tiny, tmp_path / "other", seed=9)
        promote(store, *make_release(store, tiny, tmp_path, seed=2, answers_of=other))
        deadline = time.monotonic() + 10
        while not (state := httpx.get(f"{url}/ready").json()["channels"]["demo@production"])["error"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "recorded answer 0 differs at token" in state["error"]
        assert state["version"] == good[0]
        assert httpx.get(f"{url}/ready").status_code == 200
        after = httpx.post(f"{url}/v1/completions", json=body).json()
    assert after["choices"] == before["choices"]
    assert after["system_fingerprint"] == before["system_fingerprint"]
    assert f"demo@production stays at {good[0]}: " in caplog.text


def test_a_server_whose_channel_was_never_served_is_not_ready(follower: Follower) -> None:
    with run(Server(follower.catalog, Scheduler(), follower)) as url:  # type: ignore[attr-defined]
        response = httpx.get(f"{url}/ready")
    assert response.status_code == 503
    assert response.json()["channels"]["demo@production"]["version"] is None


def test_an_unreachable_store_leaves_what_is_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    follower.look()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").write_text("no folder")
    follower.look()
    assert served(follower) == f"demo@{good[0]}"


def test_the_smoke_run_of_a_promotion_needs_recorded_answers(tiny: Path, runtime: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    make_adapter(tiny, folder / "adapter")
    with pytest.raises(PromotionError, match="no recorded answers"):
        smoke.check_release(folder, base=tiny, runtime=runtime)
    model = load_model(tiny)
    load_adapter(model, folder / "adapter", base=read_identity(tiny))
    smoke.record(model, PROMPTS, folder / smoke.SMOKE_FILE)
    smoke.check_release(folder, base=tiny, runtime=runtime)


def test_a_damaged_record_of_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / smoke.SMOKE_FILE).write_text('{"format": 1, "samples": [{"prompt": "x"}]}')
    with pytest.raises(PromotionError, match="damaged"):
        smoke.read(tmp_path)
