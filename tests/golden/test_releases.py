"""What releases are described by: manifests and channel entries, byte for byte, the card, the report, refusals."""

import itertools
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.golden import product
from tests.golden.record import Golden

CREATED = datetime(2020, 11, 24, 6, 18, 0, tzinfo=UTC)
METRICS = (product.MetricRow(name="accuracy", base=0.447, production=None, candidate=0.84, low=0.797, high=0.88),)
LICENSES = (
    product.License(of="base model", name="Apache-2.0"),
    product.License(of="training data", name="WordNet-3.1"),
)


def package(folder: Path, letter: str, *, outcome: str = "pass", against: str = "base") -> bytes:
    """A package folder of four files; the bytes of its manifest."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(letter.encode() * 70_000)
    (folder / "README.md").write_text(f"# {letter}\n", encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "notes für später.txt").write_text("ä", encoding="utf-8")
    lineage = product.Lineage(
        base_digest=product.digest(b"base"),
        source_digest=product.digest(b"source"),
        quantizer_digest=product.digest(b"nf4"),
        data_digest=product.digest(b"rows"),
        template_digest=product.digest(b"chatml"),
        config_digest=product.digest(b"configuration"),
        dvc_lock_digest=None,
        code_revision="0123abc",
        trust_remote_code=False,
    )
    verdict = product.GateVerdict(outcome=outcome, against=against, digest=product.digest(b"verdict"))
    return product.make_package(folder, created=CREATED, lineage=lineage, verdict=verdict)


def test_a_fixed_package_has_the_recorded_manifest(tmp_path: Path, golden: Golden) -> None:
    golden.text("releases/manifest.json", package(tmp_path / "package", "a").decode())


class Registry:
    """A store with two releases by one builder, and a clock that moves an hour with each look."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, product.open_store(str(folder / "store"))
        self._hours = itertools.count()
        product.create_key(folder / "key")
        key = "\n".join(f"    {line}" for line in (folder / "key.pub").read_text(encoding="utf-8").splitlines())
        text = f"keys:\n- name: bob\n  roles: [builder]\n  public_key: |\n{key}\n"
        self.keys = product.KeyRing.parse(text, origin="keys.yaml")

    def release(self, letter: str, **verdict: str) -> str:
        """Publish a signed release; its version."""
        folder = self.folder / letter
        package(folder, letter, **verdict)
        product.sign_folder(folder, self.folder / "key")
        return product.publish(self.store, folder).version

    def promote(self, version: str, channel: str, policy: product.Channel) -> None:
        """Promote it, with a smoke run that finds nothing."""
        wish = product.PromotionRequest(
            pipeline="demo", channel=channel, version=version, actor="ci", reason="the nightly run"
        )
        checks = product.PromotionChecks(policy=policy, keys=self.keys, smoke=lambda folder: None)
        product.promote(self.store, wish, checks, folder=self.folder / "fetched" / version, now=self.now)

    def now(self) -> datetime:
        """An hour later than the last time."""
        return CREATED + timedelta(hours=next(self._hours))

    def entries(self) -> str:
        """Every file of every channel, by its path in the store."""
        files = sorted((self.folder / "store" / "channels").rglob("*.json"))
        return "\n".join(
            f"{path.relative_to(self.folder / 'store').as_posix()}\n{path.read_text(encoding='utf-8')}"
            for path in files
        )


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    numbers = itertools.count(1)
    monkeypatch.setattr("secrets.token_hex", lambda size: f"{next(numbers):0{2 * size}x}")
    return Registry(tmp_path)


def test_promotions_and_a_rollback_write_the_recorded_entries(registry: Registry, golden: Golden) -> None:
    first = registry.release("a")
    registry.promote(first, "staging", product.Channel())
    registry.promote(first, "production", product.Channel(after="staging", soak_hours=0.5))
    second = registry.release("b", against=first)
    registry.promote(second, "production", product.Channel())
    product.rollback(registry.store, pipeline="demo", to_channel="production", actor="ada", reason="wrong answers")
    # Only a rollback reads the machine's clock.
    golden.text("releases/channels.txt", re.sub(r'"time": "(?!2020-)[^"]*"', '"time": "…"', registry.entries()))


def test_a_policy_refuses_in_the_recorded_words(registry: Registry, golden: Golden) -> None:
    held, failed = registry.release("a"), registry.release("b", outcome="fail", against="another")
    registry.promote(held, "production", product.Channel())
    policies = {
        "failed": (failed, product.Channel()),
        "not staged": (
            failed,
            product.Channel(after="staging", soak_hours=24).model_copy(update={"verdicts": ("fail",)}),
        ),
        "nobody approved": (
            failed,
            product.Channel(approvals=product.Approvals(count=2, roles=("security",), other_than_builder=True)),
        ),
    }
    said = []
    for name, (version, policy) in policies.items():
        with pytest.raises(product.GraftlineError) as caught:
            registry.promote(version, "production", policy)
        said.append(f"{name}:\n{caught.value}\n")
    golden.text("releases/refusals.txt", "\n".join(said))


def test_the_card_of_fixed_figures_is_the_recorded_one(golden: Golden) -> None:
    card = product.CardData(
        pipeline="demo",
        base_model="example/base",
        method="LoRA, rank 8",
        task="Sorts a definition into one of ten categories.",
        outcome="pass",
        against="base",
        licenses=LICENSES,
        metrics=METRICS,
        dataset="wordnet",
        num_training_rows=12000,
        num_evaluation_rows=300,
        lineage=(("base", "sha256:00"),),
        files=(("adapter/", "the adapter, in PEFT's format"),),
        training_seconds=251.0,
        hardware="2 CPU cores",
        energy_watt_hours=12.5,
        energy_source="processors measured (RAPL)",
    )
    golden.text("releases/card.md", product.render_card(card))


def test_the_report_of_fixed_figures_is_the_recorded_one(golden: Golden) -> None:
    gate = product.Gate(
        name="task",
        metric="accuracy",
        better="higher",
        candidate=0.84,
        reference=0.447,
        difference=0.393,
        low=0.33,
        high=0.453,
        threshold=-0.02,
        outcome="pass",
        num_items=300,
        detectable=0.061,
    )
    memory = product.MemoryPart(
        name="peak", low_bytes=9 * 10**8, expected_bytes=12 * 10**8, high_bytes=17 * 10**8, measured_bytes=134 * 10**7
    )
    report = product.ReportData(
        pipeline="demo",
        created=CREATED,
        outcome="pass",
        reasons=("accuracy rose by 0.393",),
        facts=(("method", "LoRA, rank 8"),),
        gates=(gate,),
        metrics=METRICS,
        loss=tuple(product.LossPoint(step=step, training=0.35 + 2.5 / step, evaluation=None) for step in range(1, 21)),
        confusion=product.Confusion(labels=("cat", "dog"), counts=((24, 1), (2, 22))),
        stages=(product.StageCost(name="train", seconds=251.4, peak_bytes=2_100_000_000),),
        memory=(memory,),
        lineage=(("base", "sha256:00"),),
    )
    golden.text("releases/report.html", product.render_report(report))
