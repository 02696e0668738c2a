"""One thing that was looked at, and all of them as text."""

from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``note`` works but may surprise, ``missing`` stops the line."""

    name: str
    status: Status
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def render(findings: list[Finding]) -> str:
    """Findings as aligned text."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8}{finding.name:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':<8}{'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)
