"""The pipelines.yaml that a project starts with: a template with the evidence study's first choice filled in."""

from pathlib import Path
from string import Template

from graftline.plan.evidence import Evidence, yaml_lines

_STARTER = Path(__file__).parent / "templates" / "pipelines.yaml"


def starter(evidence: Evidence) -> str:
    """The text of a pipelines.yaml to start from."""
    arm = evidence.arms[0]
    sections = {name: "\n      ".join(yaml_lines(section)) for name, section in arm.sections().items()}
    text = _STARTER.read_text(encoding="utf-8")
    return Template(text).substitute(
        sections, arm=arm.name, found=" ".join(arm.found.split()), links=", ".join(evidence.links(arm))
    )
