"""What is judged, packed and published is what was scored: every later stage hashes what lies before it.

Stages fetch to release in this process, on a tiny base with a release in production; then one thing is damaged.
"""

import base64
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from graftline import settings
from graftline.digest import of_file
from graftline.errors import GraftlineError, LockedError, MergeError, ReleaseError
from graftline.evaluate.scores import read_scores
from graftline.registry import channel
from graftline.registry.channel import ChannelChange, Log
from graftline.registry.promotion import PromotionChecks, PromotionRequest
from graftline.registry.promotion import promote as promoting
from graftline.registry.releases import fetch, is_whole, list_versions, publish, release_key, verify
from graftline.registry.store import open_store
from graftline.release.manifest import GateVerdict, check_folder, describe, read_manifest, write_manifest
from graftline.release.provenance import PROVENANCE_NAME, signed_with
from graftline.release.signing import sign_folder
from graftline.settings import Channel
from graftline.workflow import formats, leases, resolve, scored
from graftline.workflow.formats import RECORD, Kind, compress_merged
from graftline.workflow.published import is_in_store
from tasks import evaluate, gate, init, merge, package, release, train, validate
from tasks import fetch as fetching
from tests.line.project import read_yaml, write_yaml
from tests.registry.entries import promotion_of
from tests.registry.people import People
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import make_rows, tiny_settings

UNTIL_SCORES = (fetching, validate, init, train, evaluate)
AFTER_SCORES = (merge, gate, package, release)


def run_stages(opened: Opened, *stages: Any) -> None:
    for part in stages:
        name = part.__name__.rpartition(".")[2]
        if name in ("evaluate", "merge"):  # As DVC does with a stage's outputs before it runs.
            shutil.rmtree(opened.at.folder(name), ignore_errors=True)
        part.run(*opened)
        if part not in (resolve, package, release):
            (opened.at.folder(name) / "stage.json").write_text(json.dumps({"seconds": 1.0, "peak_rss_mb": 90}))


def promote(opened: Opened, version: str) -> None:
    """Put a release into production, without the checks that are tested elsewhere."""
    store = open_store(str(opened.at.root / opened.pipeline.release.store))
    folder = opened.at.root / "fetched"
    manifest = fetch(store, opened.at.name, version, folder)
    shutil.rmtree(folder)
    change = promotion_of(manifest, datetime.now(UTC).replace(microsecond=0))
    log = channel.read(store, opened.at.name, "production")
    channel.append(store, channel.next_entry(Log(opened.at.name, "production", log.entries), change))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one release in production and a second candidate that was compared with it."""
    folder = tmp_path_factory.mktemp("scored") / "project"
    make_tiny_llama(folder / "base")
    (folder / "keys.yaml").write_text("keys: []\nunsigned: true\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(80)))
    pipeline = tiny_settings()
    pipeline["data"] |= {"evaluation_rows": 20}
    pipeline["train"] |= {"steps": 2, "batch_size": 4, "checkpoint_every": 0}
    pipeline["gates"]["accuracy"] |= {"margin": 0.9, "min_items": 1}
    pipeline["evaluate"]["forgetting"] = {"source": "path:text.txt"}
    (folder / "text.txt").write_text("Some general words.\nOther general words.\n")
    write_yaml(folder, {"pipelines": {"pets": pipeline}, "channels": {"production": {}}})
    opened = open_pipeline("pets", folder)
    run_stages(opened, resolve, *UNTIL_SCORES, *AFTER_SCORES)
    promote(opened, read_manifest(opened.at.folder("package")).version)
    pipeline["train"] |= {"steps": 3}
    write_yaml(folder, {"pipelines": {"pets": pipeline}, "channels": {"production": {}}})
    run_stages(open_pipeline("pets", folder), resolve, *UNTIL_SCORES, *AFTER_SCORES)
    return folder


@pytest.fixture
def opened(finished: Path, tmp_path: Path) -> Opened:
    """A copy that a test may damage; the base in its cache is found again by its content."""
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    return open_pipeline("pets", folder)


def damage(path: Path) -> None:
    """One bit of one byte, near the end of a file: behind the header of tensors."""
    data = bytearray(path.read_bytes())
    data[-16] ^= 0x40
    path.unlink()  # It may be a hard link.
    path.write_bytes(data)


def in_base(name: str) -> Callable[[Opened], Path]:
    return lambda opened: next((opened.at.cache / "bases").glob("*-float32")) / name


def in_runs(name: str) -> Callable[[Opened], Path]:
    return lambda opened: opened.at.runs / name


def test_scores_say_by_digest_what_was_scored_and_compared_with(opened: Opened) -> None:
    store = open_store(str(opened.at.root / opened.pipeline.release.store))
    first, second = list_versions(store, "pets")
    by_name = {path.stem: read_scores(path).scored for path in scored.scores_folder(opened.at).glob("*.jsonl")}
    assert by_name.keys() == {"anchor", "base", "candidate", "production"}
    candidate, production, base = (by_name[name] for name in ("candidate", "production", "base"))
    assert candidate
    assert production
    assert base
    assert production.release
    assert (production.release.version, production.release.digest) == (first, verify(store, "pets", first).digest)
    assert candidate.release is base.release is base.adapter is None
    assert len({candidate.adapter, production.adapter}) == 2
    assert {found.base for found in (candidate, production, base)} == {candidate.base}
    assert candidate.rows == of_file(opened.at.folder("fetch") / "evaluation.jsonl")
    manifest = verify(store, "pets", second)
    assert (manifest.verdict.against, manifest.verdict.release) == (first, production.release.digest)
    anchor = manifest.verdict.anchor
    assert anchor
    assert (anchor.version, anchor.release, anchor.is_better) == (first, production.release.digest, False)
    assert manifest.judged
    assert (manifest.judged.adapter, manifest.judged.rows) == (candidate.adapter, candidate.rows)
    assert manifest.format == 2


def test_what_is_as_it_was_scored_passes_again(opened: Opened) -> None:
    run_stages(opened, *AFTER_SCORES)


DAMAGED = {
    "adapter": in_runs("train/adapter/adapter_model.safetensors"),
    "adapter's settings": in_runs("train/adapter/adapter_config.json"),
    "weights of the base": in_base("model.safetensors"),
    "architecture of the base": in_base("config.json"),
    "tokenizer": in_base("tokenizer.json"),
    "evaluation rows": in_runs("fetch/evaluation.jsonl"),
    "general texts": in_runs("fetch/general.jsonl"),
    "the candidate's scores": in_runs("evaluate/scores/candidate.jsonl"),
    "production's scores": in_runs("evaluate/scores/production.jsonl"),
}


@pytest.mark.parametrize("stage", [gate, package], ids=["gate", "package"])
@pytest.mark.parametrize("name", DAMAGED)
def test_one_bit_that_changed_after_the_scoring_stops_gate_and_package(opened: Opened, name: str, stage: Any) -> None:
    damage(DAMAGED[name](opened))
    with pytest.raises(GraftlineError, match=r"sha256:|scores|the tokenizer in"):
        stage.run(*opened)


def test_the_refusal_names_both_digests_and_the_command(opened: Opened) -> None:
    path = opened.at.folder("train") / "adapter" / "adapter_model.safetensors"
    was = read_scores(scored.scores_folder(opened.at) / "candidate.jsonl").scored
    damage(path)
    with pytest.raises(GraftlineError, match=r"adapter: scored (sha256:\w+), found (sha256:\w+);.*") as caught:
        gate.run(*opened)
    assert was
    assert f"adapter: scored {was.adapter}, found sha256:" in str(caught.value)
    assert "dvc repro --force --single-item evaluate@pets" in str(caught.value)
    run_stages(opened, evaluate, *AFTER_SCORES)  # That command's work, and what follows it.


def test_a_template_that_was_changed_after_the_scoring_stops_the_gate(opened: Opened) -> None:
    text = (opened.at.root / "pipelines.yaml").read_text()
    (opened.at.root / "pipelines.yaml").write_text(text.replace("template: none", "template: chatml"))
    with pytest.raises(GraftlineError):
        gate.run(*open_pipeline("pets", opened.at.root))


def test_scores_that_do_not_say_what_was_scored_are_refused(opened: Opened) -> None:
    path = scored.scores_folder(opened.at) / "base.jsonl"
    header, _, lines = path.read_text().partition("\n")
    old = {key: value for key, value in json.loads(header).items() if key not in ("scored", "lines")} | {"format": 1}
    path.write_text(json.dumps(old) + "\n" + lines)
    read_scores(path)
    with pytest.raises(GraftlineError, match="the scores of base do not say which bytes were scored"):
        gate.run(*opened)


def test_scores_on_other_rows_are_refused(opened: Opened) -> None:
    path = scored.scores_folder(opened.at) / "production.jsonl"
    found = read_scores(path)
    assert found.scored
    other = str(found.scored.rows)
    path.write_text(path.read_text().replace(other, f"sha256:{'0' * 64}"))
    with pytest.raises(GraftlineError, match=f"rows: the candidate was scored on {other}"):
        gate.run(*opened)


@pytest.mark.parametrize("name", ["adapter", "base"])
def test_a_merged_model_of_something_else_is_refused(opened: Opened, name: str) -> None:
    path = opened.at.folder("merge") / "parity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: f"sha256:{'0' * 64}"}))
    with pytest.raises(GraftlineError, match=f"made of another {name} than was scored.*merge@pets"):
        gate.run(*opened)


def test_a_merged_model_that_was_damaged_after_it_was_compared_is_not_packed(opened: Opened) -> None:
    damage(opened.at.folder("merge") / "model" / "model.safetensors")
    with pytest.raises(ReleaseError, match="model: merged sha256:"):
        package.run(*opened)


def test_a_verdict_that_was_changed_by_hand_is_not_packed(opened: Opened) -> None:
    path = opened.at.folder("gate") / "verdict.json"
    record = json.loads(path.read_text())
    record["outcome"] = record["gates"][0]["outcome"] = "fail"
    path.write_text(json.dumps(record))
    with pytest.raises(GraftlineError, match=r"verdict.json says fail .*gate@pets"):
        package.run(*opened)


def test_a_verdict_of_other_scores_is_not_packed(opened: Opened) -> None:
    verdict = (opened.at.folder("gate") / "verdict.json").read_bytes()
    path = scored.scores_folder(opened.at) / "candidate.jsonl"
    header, _, lines = path.read_text().partition("\n")
    path.write_text(json.dumps(json.loads(header)) + "\n" + lines)  # Other bytes, the same content.
    gate.run(*opened)
    assert (opened.at.folder("gate") / "verdict.json").read_bytes() != verdict
    (opened.at.folder("gate") / "verdict.json").write_bytes(verdict)
    with pytest.raises(GraftlineError, match="belongs to other scores or was changed"):
        package.run(*opened)


def test_a_package_that_does_not_say_what_was_scored_is_not_published(opened: Opened) -> None:
    path = opened.at.folder("package") / "manifest.json"
    record = json.loads(path.read_text())
    del record["judged"]
    record["format"] = 1
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    with pytest.raises(ReleaseError, match=r"does not say which bytes were scored.*package@pets"):
        release.run(*opened)


def test_what_a_verdict_was_against_does_not_depend_on_what_is_resolved_later(opened: Opened) -> None:
    path = opened.at.runs / resolve.RESOLVED
    record = json.loads(path.read_text())
    first = record["champion"]["version"]
    record["champion"] = {"version": "20200101T000000Z-000000000000", "release": f"sha256:{'0' * 64}"}
    path.write_text(json.dumps(record))
    package.run(*opened)
    assert read_manifest(opened.at.folder("package")).verdict.against == first
    assert first in (opened.at.folder("package") / "report.html").read_text(encoding="utf-8")


def test_gates_that_do_not_ask_about_production_are_against_the_base(opened: Opened) -> None:
    text = (opened.at.root / "pipelines.yaml").read_text()
    text = text.replace("against: production", "against: base")
    (opened.at.root / "pipelines.yaml").write_text(text)
    document = read_yaml(opened.at.root)
    document["pipelines"]["pets"]["guards"] = dict.fromkeys(settings.Guards.model_fields, False)
    write_yaml(opened.at.root, document)
    opened = open_pipeline("pets", opened.at.root)
    run_stages(opened, resolve, evaluate, gate, package)
    assert read_manifest(opened.at.folder("package")).verdict == GateVerdict(
        outcome="pass", against="base", digest=of_file(opened.at.folder("gate") / "verdict.json")
    )


def test_a_production_whose_manifest_was_changed_after_its_promotion_is_not_scored(opened: Opened) -> None:
    record = json.loads((opened.at.runs / resolve.RESOLVED).read_text())
    record["champion"]["release"] = f"sha256:{'0' * 64}"
    (opened.at.runs / resolve.RESOLVED).write_text(json.dumps(record))
    with pytest.raises(ReleaseError, match="it was changed after it was promoted"):
        evaluate.run(*opened)


def test_the_anchor_is_the_release_that_the_channel_s_log_names_not_what_production_holds(opened: Opened) -> None:
    """The second release was not shown to be better than the first: it is in production, the first stays the anchor."""
    store = open_store(str(opened.at.root / opened.pipeline.release.store))
    first, second = list_versions(store, "pets")
    manifest = verify(store, "pets", second)
    log = channel.read(store, "pets", "production")
    change = ChannelChange(
        action="promote",
        version=second,
        release=manifest.digest,
        verdict=manifest.verdict,
        actor="ada",
        reason="test",
        time=datetime.now(UTC).replace(microsecond=0),
        anchor=channel.anchor_of(log.entries[-1]),
    )
    channel.append(store, channel.next_entry(log, change))
    run_stages(opened, resolve, evaluate, gate, package)
    resolved = json.loads((opened.at.runs / resolve.RESOLVED).read_text())["champion"]
    assert (resolved["version"], resolved["anchor"]["version"]) == (second, first)
    verdict = json.loads((opened.at.folder("gate") / "verdict.json").read_text())
    assert verdict["anchor"]["version"] == first
    assert {each["name"]: each["against"] for each in verdict["gates"]}["anchor: accuracy"] == "anchor"
    assert f"anchor {first}: it stays the anchor (accuracy " in (opened.at.folder("gate") / "verdict.md").read_text()
    released = read_manifest(opened.at.folder("package")).verdict
    assert (released.against, released.anchor and released.anchor.version) == (second, first)
    report, card = ((opened.at.folder("package") / name).read_text() for name in ("report.html", "README.md"))
    assert f"anchor {first}: it stays" in report
    chosen = "20 evaluation rows (drawn from the source); the gates on accuracy chose this release by them"
    assert chosen in report
    assert chosen in card


def other_outcome(path: Path) -> None:
    record = json.loads(path.read_text())
    record["outcome"] = record["gates"][0]["outcome"] = "inconclusive"
    path.write_text(json.dumps(record))


def another_file(path: Path) -> None:
    shutil.copyfile(path, path.with_name("another.jsonl"))


def not_compared(path: Path) -> None:
    path.write_text(json.dumps({"merged": False}))


def another_anchor(path: Path) -> None:
    record = json.loads(path.read_text())
    record["anchor"] |= {"version": "another", "is_better": True}
    path.write_text(json.dumps(record))


TAMPERED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "another adapter": ("adapter/adapter_model.safetensors", damage, "adapter: scored sha256:"),
    "an adapter of other settings": ("adapter/adapter_config.json", damage, "adapter: scored sha256:"),
    "an adapter with one file more": ("adapter/graftline.json", another_file, "adapter: scored sha256:"),
    "another tokenizer": ("adapter/tokenizer.json", damage, "tokenizer: scored sha256:"),
    "another merged model": ("merged/model.safetensors", damage, "model: merged sha256:"),
    "a merged model that nobody compared": (
        "evaluation/parity.json",
        not_compared,
        "no record that they were compared",
    ),
    "another verdict": ("evaluation/verdict.json", other_outcome, "outcome: judged pass, here inconclusive"),
    "another anchor": ("evaluation/verdict.json", another_anchor, "anchor: judged "),
    "other scores of the base": ("evaluation/base.jsonl", damage, "evaluation/base.jsonl: judged sha256:"),
    "no scores of the base": ("evaluation/base.jsonl", Path.unlink, "evaluation/base.jsonl: judged sha256:"),
    "no scores of the candidate": ("evaluation/candidate.jsonl", Path.unlink, "no scores of the candidate"),
    "no verdict": ("evaluation/verdict.json", Path.unlink, "evaluation/verdict.json is missing"),
    "scores that the verdict does not come from": (
        "evaluation/production.jsonl",
        another_file,
        "evaluation/another.jsonl: judged None",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_release_whose_files_are_not_what_was_judged_is_refused_by_verify_and_release(
    opened: Opened, name: str
) -> None:
    """Its manifest is right for its bytes: only the digests in its evaluation tell."""
    file, tamper, problem = TAMPERED[name]
    package_folder = opened.at.folder("package")
    tamper(package_folder / file)
    was = read_manifest(package_folder)
    again = describe(
        package_folder,
        pipeline="pets",
        created=was.created,
        lineage=was.lineage,
        verdict=was.verdict,
        judged=was.judged,
    )
    write_manifest(package_folder, again)
    check_folder(package_folder, again)
    with pytest.raises(ReleaseError, match="is not what was judged") as caught:
        release.run(*opened)
    assert problem in str(caught.value)
    store = open_store(str(opened.at.root / opened.pipeline.release.store))
    publish(store, package_folder)
    with pytest.raises(ReleaseError, match=re.escape(problem)):
        verify(store, "pets", again.version)


def test_a_signed_package_says_what_it_was_made_from_and_one_that_says_otherwise_is_refused(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people, out = People(tmp_path), opened.at.folder("package")
    monkeypatch.setenv("GRAFTLINE_SIGNING_KEY", str(people.private_key("bob")))
    package.run(*opened)
    data = (out / PROVENANCE_NAME).read_bytes()
    assert signed_with(data, {name: key.ecdsa for name, key in people.keys.keys.items()}) == "bob"
    statement = json.loads(base64.b64decode(json.loads(data)["payload"]))
    dependencies = {one["name"]: one for one in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert dependencies["base"]["uri"] == "path:base"
    assert dependencies["rows"]["uri"] == "path:rows.jsonl"
    store = open_store(str(opened.at.root / opened.pipeline.release.store))
    verify(store, "pets", publish(store, out).version)

    old = read_manifest(out)
    lineage = old.lineage.model_copy(update={"data_digest": of_file(out / "README.md")})
    described = describe(
        out, pipeline="pets", created=old.created, lineage=lineage, verdict=old.verdict, judged=old.judged
    )
    write_manifest(out, described)
    with pytest.raises(ReleaseError, match="names another rows than the manifest"):
        verify(store, "pets", publish(store, out).version)


def nothing_is_smoked(_: Path) -> None:
    raise AssertionError("the release should not come this far")


@pytest.mark.parametrize(
    ("part", "field", "problem"),
    [
        ("lineage", "base_digest", "base: scored sha256:"),
        ("lineage", "template_digest", "template: scored sha256:"),
        ("verdict", "release", "against: judged sha256:"),
        ("verdict", "against", "against: judged base"),
        ("verdict", "digest", "verdict: judged sha256:"),
        ("judged", "adapter", "adapter: judged sha256:"),
        ("judged", "rows", "rows: judged sha256:"),
    ],
)
def test_a_manifest_that_says_something_else_than_the_scores_is_refused_by_promotion(
    opened: Opened, tmp_path: Path, part: str, field: str, problem: str
) -> None:
    path = opened.at.folder("package") / "manifest.json"
    record = json.loads(path.read_text())
    record[part][field] = "base" if field == "against" else f"sha256:{'0' * 64}"
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    people = People(tmp_path)
    sign_folder(opened.at.folder("package"), people.private_key("bob"))
    store = open_store(str(opened.at.root / opened.pipeline.release.store))
    version = publish(store, opened.at.folder("package")).version
    wish = PromotionRequest(pipeline="pets", channel="production", version=version, actor="ada", reason="test")
    checks = PromotionChecks(policy=Channel(), keys=people.keys, smoke=nothing_is_smoked)
    with pytest.raises(ReleaseError, match=re.escape(problem)):
        promoting(store, wish, checks, folder=tmp_path / "fetched")


def test_whether_a_release_is_still_in_the_store(opened: Opened) -> None:
    store = open_store(str(opened.at.root / opened.pipeline.release.store))
    record = json.loads((opened.at.folder("release") / "release.json").read_text())
    section = opened.pipeline.release
    assert is_in_store(section, record, opened.at)
    assert is_in_store(section, {}, opened.at)
    assert is_in_store(section, record | {"location": "s3://elsewhere/releases/pets/1"}, opened.at)
    store.delete(release_key("pets", record["version"], "smoke.json"))
    assert not is_whole(store, "pets", record["version"])
    store.delete(release_key("pets", record["version"], "manifest.json"))
    assert not is_in_store(section, record, opened.at)
    release.run(*opened)
    assert is_in_store(section, record, opened.at)


def test_the_resolution_of_a_run_under_way_is_not_written_by_another_command(opened: Opened) -> None:
    path = opened.at.runs / resolve.RESOLVED
    path.write_text("{}")
    with leases.hold_folder(opened.at.runs / ".work"):
        holder = opened.at.runs / ".work" / ".holder.json"
        holder.write_text(json.dumps(json.loads(holder.read_text()) | {"pid": 1 << 22}))
        with pytest.raises(LockedError, match=r"a run of pets reads .*resolved.json"):
            resolve.run_alone(*opened)
        assert path.read_text() == "{}"
    resolve.run_alone(*opened)
    assert json.loads(path.read_text())["champion"]["version"]


@pytest.mark.parametrize(
    ("kind", "command"), [("fp8", "vllm serve {}"), ("gguf-q8_0", "llama-server --model {}/model.gguf")]
)
def test_a_layout_of_the_merged_model_is_written_with_the_evidence_that_it_still_passes(
    opened: Opened,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: Kind,
    command: str,
) -> None:
    out = tmp_path / "served" / kind
    monkeypatch.chdir(opened.at.root)
    monkeypatch.setattr("sys.argv", ["formats", "pets", kind, str(out)])
    formats.main()
    assert command.format(out) in capsys.readouterr().out
    told = json.loads((out / RECORD).read_text(encoding="utf-8"))
    parity = json.loads((opened.at.folder("merge") / "parity.json").read_text(encoding="utf-8"))
    assert told["made_of"] == {"base": parity["base"], "adapter": parity["adapter"], "merged": parity["model"]}
    assert told["parity"]["passed"] is True
    assert told["parity"]["mean_kl"] > parity["parity"]["mean_kl"], "8 bits are measured, not the merged model"
    assert told["verdict"]["outcome"] == "pass"
    assert [path.name for path in out.parent.iterdir()] == [kind], "nothing else is left there"
    with pytest.raises(MergeError, match="exists; nothing is overwritten"):
        compress_merged(*opened, kind, out)


def test_a_layout_whose_answers_differ_or_that_fails_the_gates_is_not_written(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = {name: gate.replace(margin=0.0001) for name, gate in opened.pipeline.gates.items()}
    strict = opened.pipeline.replace(gates=gates)
    limits = replace(formats.REQUANTIZED_LIMITS, max_mean_kl=0.0)
    monkeypatch.setattr(formats, "REQUANTIZED_LIMITS", limits)
    found = compress_merged(strict, opened.at, "w4a16", tmp_path / "out")
    assert any(problem.startswith("parity: mean KL is") for problem in found.problems)
    assert any(problem.startswith("the gates say") for problem in found.problems)
    assert found.num_bytes < found.merged_bytes
    assert not list(tmp_path.glob("out*")) + list(tmp_path.glob(".out*"))


def test_only_the_merged_model_that_was_compared_is_quantized(opened: Opened, tmp_path: Path) -> None:
    damage(opened.at.folder("merge") / "model" / "model.safetensors")
    with pytest.raises(MergeError, match="is not the model that was compared with the judged one; merge again"):
        compress_merged(*opened, "fp8", tmp_path / "out")
    (opened.at.folder("merge") / "parity.json").write_text('{"merged": false, "reason": null}', encoding="utf-8")
    with pytest.raises(MergeError, match=r"has no merged model, .* write `package.merged: true`"):
        compress_merged(*opened, "fp8", tmp_path / "out")
