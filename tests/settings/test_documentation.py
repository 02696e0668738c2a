import runpy
from pathlib import Path

from graftline.settings.channels import Document

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))


def test_the_page_is_what_the_script_writes() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

    assert written == SCRIPT["page"](), "run: python docs/make_configuration.py"


def test_the_page_has_every_model_of_the_schema() -> None:
    shown = {section.__name__ for _, section in SCRIPT["SECTIONS"]}

    assert shown | {"Pipeline"} == set(Document.model_json_schema()["$defs"])
