from pathlib import Path

from graftline.digest import of_bytes
from graftline.registry.overview import ReleaseDiff, diff
from graftline.release.manifest import GateVerdict, describe
from tests.release.packages import CREATED, LINEAGE, VERDICT, make_package, write_files


def test_a_release_does_not_differ_from_itself(tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    assert diff(manifest, manifest) == ReleaseDiff((), (), (), {})


def test_files_and_origin_that_differ_are_named(tmp_path: Path) -> None:
    first = make_package(tmp_path / "1")
    write_files(tmp_path / "2", "b")
    (tmp_path / "2" / "empty.txt").unlink()
    (tmp_path / "2" / "new.txt").touch()
    lineage = LINEAGE.model_copy(update={"data_digest": of_bytes(b"more rows"), "quantizer_digest": None})
    verdict = GateVerdict(outcome="pass", against=first.version, digest=VERDICT.digest)
    second = describe(tmp_path / "2", pipeline="demo", created=CREATED, lineage=lineage, verdict=verdict)

    found = diff(first, second)

    assert (found.added, found.removed) == (("new.txt",), ("empty.txt",))
    assert found.changed == ("README.md", "adapter/adapter_model.safetensors")
    assert found.origin == {
        "data_digest": (str(of_bytes(b"rows")), str(of_bytes(b"more rows"))),
        "quantizer_digest": (str(of_bytes(b"nf4")), "none"),
        "verdict_against": ("base", first.version),
    }
