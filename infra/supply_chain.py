"""The packages of requirements.lock: a bill of materials, licences, known vulnerabilities; and graftline's own wheel.

``make supply-chain`` and ``make wheel`` call this file, and so does the release workflow. What is allowed stands in
infra/supply-chain.yaml.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from io import BytesIO
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from license_expression import ExpressionError, LicenseExpression, get_spdx_licensing
from packageurl import PackageURL
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?==(?P<version>[^\s;\\]+)", re.MULTILINE)
_SPDX = get_spdx_licensing()


@dataclass(frozen=True)
class Package:
    """A package of the lock."""

    name: str
    """As packaging normalizes it."""
    version: str
    hashes: tuple[str, ...] = ()
    """SHA-256 of its files, in hex."""


@dataclass(frozen=True)
class Rules:
    """What infra/supply-chain.yaml says."""

    allowed: frozenset[str]
    spelled: Mapping[str, str]
    packages: Mapping[str, Mapping[str, Any]]
    accepted: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, file: Path) -> "Rules":
        """Read the file; what it states of a package or an advisory needs a reason.

        Raises:
            SystemExit: a reason is missing.
        """
        found = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
        for name, stated in (found["packages"] | found["accepted"]).items():
            if not stated.get("why"):
                raise SystemExit(f"{file}: {name} has no `why`; say why it is allowed")
        packages = {str(canonicalize_name(name)): stated for name, stated in found["packages"].items()}
        return cls(frozenset(found["allowed"]), found["spelled"], packages, found["accepted"])


def locked(root: Path = ROOT) -> list[Package]:
    """The packages of requirements.lock, by name, and torch, whose build is chosen where it is installed."""
    text = (root / "requirements.lock").read_text(encoding="utf-8")
    starts = list(_PIN.finditer(text))
    ends = [*(match.start() for match in starts[1:]), len(text)]
    found = [
        Package(canonicalize_name(match["name"]), match["version"], _hashes(text[match.end() : end]))
        for match, end in zip(starts, ends, strict=True)
    ]
    pins = _PIN.finditer((root / "constraints.txt").read_text(encoding="utf-8"))
    found += [Package("torch", match["version"]) for match in pins if match["name"] == "torch"]
    return sorted(found, key=lambda package: (package.name, package.version))


def _hashes(text: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"--hash=sha256:([0-9a-f]{64})", text)))


# --- licences ----------------------------------------------------------------------------------------------------


def licence_of(package: Package, rules: Rules) -> str:
    """Its licence as an SPDX expression, or what its metadata says where that is none; empty if it says nothing."""
    if package.name in rules.packages:
        return str(rules.packages[package.name]["licence"])
    try:
        return _declared(distribution(package.name), rules.spelled)
    except PackageNotFoundError:
        return ""


def _declared(installed: Distribution, spelled: Mapping[str, str]) -> str:
    metadata = installed.metadata
    if expressions := metadata.get_all("License-Expression"):
        return str(expressions[0])
    text = " ".join(metadata.get_all("License") or []).strip()
    if text in spelled or (text and _parsed(text) is not None):
        return spelled.get(text, text)
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if "License ::" in line]
    named = [spelled.get(line, line) for line in classifiers if line not in ("OSI Approved", "DFSG approved")]
    return " OR ".join(named) or text.partition("\n")[0]


def _parsed(expression: str) -> LicenseExpression | None:
    try:
        return _SPDX.parse(expression, validate=True)
    except ExpressionError:
        return None


def is_allowed(expression: str, allowed: Iterable[str]) -> bool:
    """Whether one may use what is licensed so: one side of an OR, both of an AND. Unknown words are not allowed."""
    parsed = _parsed(expression)
    return parsed is not None and _holds(parsed, frozenset(allowed))


def _holds(node: LicenseExpression, allowed: frozenset[str]) -> bool:
    if isinstance(node, _SPDX.OR):
        return any(_holds(part, allowed) for part in node.args)
    if isinstance(node, _SPDX.AND):
        return all(_holds(part, allowed) for part in node.args)
    return node.render() in allowed  # with its exception, if it has one


def refused_licences(packages: Iterable[Package], rules: Rules) -> list[str]:
    """A line for every package whose licence is not allowed or not known."""
    found = []
    for package in packages:
        licence = licence_of(package, rules)
        stated = rules.packages.get(package.name, {})
        if not stated.get("allowed") and not is_allowed(licence, rules.allowed):
            found.append(f"{package.name} {package.version}: {licence or 'no licence that its metadata names'}")
    return found


# --- bill of materials -------------------------------------------------------------------------------------------


def bill_of_materials(packages: Iterable[Package], rules: Rules, *, version: str) -> str:
    """CycloneDX 1.6 JSON of graftline and what its lock names, with hashes and licences. Equal input, equal bytes."""
    tool = Component(name="graftline", version=version, type=ComponentType.APPLICATION, bom_ref="graftline")
    components = [_component(package, rules) for package in packages]
    content = "\n".join(f"{package.name}=={package.version} {package.hashes}" for package in packages)
    bom = Bom(
        components=components,
        metadata=BomMetaData(component=tool, timestamp=datetime.fromtimestamp(source_date(), UTC)),
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"graftline {version}\n{content}"),
    )
    bom.register_dependency(tool, components)
    return json.dumps(json.loads(JsonV1Dot6(bom).output_as_string()), indent=2, sort_keys=True) + "\n"


def _component(package: Package, rules: Rules) -> Component:
    address = PackageURL("pypi", name=package.name, version=package.version)
    licence = licence_of(package, rules)
    return Component(
        name=package.name,
        version=package.version,
        type=ComponentType.LIBRARY,
        bom_ref=address.to_string(),
        purl=address,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=value) for value in package.hashes],
        licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
    )


# --- advisories --------------------------------------------------------------------------------------------------


def known_vulnerabilities(
    packages: Iterable[Package], dump: Path, accepted: Mapping[str, Any], today: date
) -> list[str]:
    """A line for every advisory of an OSV dump that concerns a locked version and was not accepted.

    ``dump`` is the archive of one JSON record an advisory that osv.dev publishes for PyPI
    (https://google.github.io/osv.dev/data/, https://ossf.github.io/osv-schema/).
    """
    versions = {package.name: package.version for package in packages}
    found = []
    with zipfile.ZipFile(dump) as archive:
        for name in sorted(archive.namelist()):
            record = json.loads(archive.read(name))
            until = accepted.get(record["id"], {}).get("until")
            if record.get("withdrawn") or (until and today <= until):
                continue
            hit = [package for package, version in _named(record, versions) if _concerns(record, package, version)]
            found += [f"{package} {versions[package]}: {record['id']} {record.get('summary', '')}" for package in hit]
    return found


def _named(record: Mapping[str, Any], versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    names = {canonicalize_name(part["package"]["name"]) for part in _affected(record)}
    return ((name, versions[name]) for name in sorted(names) if name in versions)


def _affected(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in record.get("affected", []) if part.get("package", {}).get("ecosystem") == "PyPI"]


def _concerns(record: Mapping[str, Any], name: str, version: str) -> bool:
    """Whether the version is listed, or lies in a range (OSV schema, "evaluation algorithm")."""
    parts = [part for part in _affected(record) if canonicalize_name(part["package"]["name"]) == name]
    listed = [str(item) for part in parts for item in part.get("versions", [])]
    ranges = [item for part in parts for item in part.get("ranges", []) if item["type"] == "ECOSYSTEM"]
    return _same(version, listed) or any(_in_range(Version(version), item["events"]) for item in ranges)


def _same(version: str, listed: Iterable[str]) -> bool:
    for item in listed:
        try:
            if Version(item) == Version(version):
                return True
        except InvalidVersion:
            if item == version:
                return True
    return False


def _in_range(version: Version, events: Iterable[Mapping[str, str]]) -> bool:
    inside = False
    for event in sorted(events, key=lambda event: Version(next(iter(event.values())))):
        ((kind, value),) = event.items()
        if kind == "introduced" and version >= Version(value):
            inside = True
        elif (kind == "fixed" and version >= Version(value)) or (kind == "last_affected" and version > Version(value)):
            inside = False
    return inside


# --- the wheel ---------------------------------------------------------------------------------------------------


def source_date() -> int:
    """Seconds of SOURCE_DATE_EPOCH, else of the commit's date: what was made later from the same commit is equal."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    shown = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(shown.stdout)


def build_wheel(source: Path, out: Path, *, epoch: int, umask: int = 0o022) -> Path:
    """Build a wheel of a source tree into ``out``; setuptools is the one of this environment."""
    build = (
        f"import os; os.umask({umask}); from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    )
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(epoch)}
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the wheel was not built: {done.stderr[-2000:]}")
    return out / done.stdout.split()[-1]


def wheel_of_commit(out: Path, revision: str = "HEAD") -> Path:
    """Build the commit's wheel twice, in different folders and with different masks, and keep it if both are equal.

    Raises:
        SystemExit: they differ.
    """
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        made = []
        for name, umask in (("first", 0o022), ("a second", 0o077)):
            with tarfile.open(fileobj=BytesIO(archive)) as files:
                files.extractall(Path(temporary) / name, filter="data")
            target = Path(temporary) / f"{name} wheel"
            target.mkdir()
            made.append(build_wheel(Path(temporary) / name, target, epoch=source_date(), umask=umask))
        first, second = (path.read_bytes() for path in made)
        if first != second:
            raise SystemExit(f"two builds of {revision} differ in their bytes; neither was kept")
        (out / made[0].name).write_bytes(first)
    return out / made[0].name


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("licences", help="compare the licences with infra/supply-chain.yaml")
    verbs.add_parser("sbom", help="write the bill of materials").add_argument("out", type=Path)
    verbs.add_parser("advisories", help="compare the versions with an OSV dump").add_argument("dump", type=Path)
    verbs.add_parser("wheel", help="build HEAD's wheel twice and compare").add_argument("out", type=Path)
    given = parser.parse_args()
    if given.verb == "wheel":
        print(wheel_of_commit(given.out.absolute()))
        return 0
    rules, packages = Rules.read(ROOT / "infra" / "supply-chain.yaml"), locked()
    if given.verb == "sbom":
        import tomllib

        version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(bill_of_materials(packages, rules, version=version), encoding="utf-8")
        print(f"{given.out}: {len(packages)} packages")
        return 0
    if given.verb == "licences":
        found, remedy = (
            refused_licences(packages, rules),
            "allow it in infra/supply-chain.yaml, or do without the package",
        )
    else:
        today = datetime.now(UTC).date()
        found = known_vulnerabilities(packages, given.dump, rules.accepted, today)
        remedy = "take a newer version (constraints.txt, make lock), or accept it in infra/supply-chain.yaml"
    print("\n".join([*found, remedy] if found else [f"{given.verb}: {len(packages)} packages, nothing to say"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
